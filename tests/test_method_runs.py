"""Methods that need more of the trainer than MiSS does, as a user runs them: alone, in two processes, interrupted and resumed."""

import json
import random

import pytest
import torch

import rwkv_miss
from src.model import RWKV

from . import program
from .conftest import close, make_arch, random_tensors
from .program import losses

TWO = ["--devices", "2", "--micro_bsz", "2", "--accumulate_grad_batches", "2", "--strategy"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A random base over bytes and 24 rows of very unequal lengths: 6 steps of 8 in two passes."""
    folder = tmp_path_factory.mktemp("methods")
    torch.save(random_tensors(make_arch(7, vocab_size=256)), folder / "base.pth")
    rng = random.Random(0)
    rows = [{"text": "".join(rng.choices("abcd ", k=rng.choice([3, 9, 60])))} for _ in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def train(files):
    """train(proj_dir, method, options, *flags) -> everything printed"""

    def start(proj_dir, method, options, *flags, sabotage=None):
        return program.succeed(program.run(
            ["--load_model", str(files / "base.pth"), "--data_file", str(files / "rows.jsonl"), "--proj_dir", str(proj_dir), "--tokenizer", "bytes",
             "--packing", "0", "--accelerator", "cpu", "--lr_init", "1e-2", "--micro_bsz", "8", "--epoch_count", "2", "--peft", method,
             "--peft_config", options, *flags], sabotage))

    return start


def same_run(one, other):
    """The same sums in another order."""
    assert losses(one) == pytest.approx(losses(other), rel=1e-5)
    for name, tensor in rwkv_miss.read_checkpoint(one / "adapter.pth").items():
        close(name, rwkv_miss.read_checkpoint(other / "adapter.pth")[name], tensor, 1e-3)


@pytest.fixture(scope="module")
def pissa(train, tmp_path_factory):
    proj_dir = tmp_path_factory.mktemp("pissa") / "run"
    train(proj_dir, "pissa", "r=7")
    return proj_dir


@pytest.mark.parametrize("strategy", ["deepspeed_stage_2", "deepspeed_stage_3"])
def test_pissa_in_two_processes_is_pissa_in_one_and_merges(files, train, pissa, tmp_path, strategy):
    train(tmp_path / "two", "pissa", "r=7", *TWO, strategy)
    same_run(pissa, tmp_path / "two")
    curve = losses(pissa)
    assert curve[-1] < 0.9 * curve[0]
    live = RWKV.load(files / "base.pth")
    rwkv_miss.load_adapter(live, tmp_path / "two/adapter.pth")
    rwkv_miss.merge_file(files / "base.pth", tmp_path / "two/adapter.pth", tmp_path / "merged.pth")
    ids = torch.tensor([list(b"abcd ab")])
    close("logits", RWKV.load(tmp_path / "merged.pth")(ids)[0], live(ids)[0], 2e-5)
