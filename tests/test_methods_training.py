"""Every method of adapted linears under the real trainer: in one process, and in two sittings under ZeRO 2 and 3 in two, to the same end."""

import json

import pytest
import torch

from rwkv_miss import METHODS, read_checkpoint

from . import program
from .conftest import close, make_arch, random_tensors
from .program import losses

STEPS = 4
OPTIONS = {"adalora": {"init_rank": 6}}  # of methods whose defaults do nothing in so few steps, or do not fit widths of 48 and 192


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A random v7 base over bytes, and 16 conversations with unequal answers."""
    folder = tmp_path_factory.mktemp("methods")
    torch.save(random_tensors(make_arch(7, vocab_size=256)), folder / "base.pth")
    talks = [("q" * (i % 5 + 1), "ab c" * (1 + 7 * (i % 3))) for i in range(16)]
    rows = [{"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]} for question, answer in talks]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def train(files, proj_dir, method, *flags):
    options = json.dumps({"rank": 6, **OPTIONS.get(method, {})})
    return program.succeed(program.run([
        "--load_model", str(files / "base.pth"), "--data_file", str(files / "data.jsonl"), "--proj_dir", str(proj_dir), "--tokenizer", "bytes",
        "--peft", method, "--peft_config", options, "--lr_init", "1e-2", "--lr_schedule", "constant", "--packing", "0", "--accelerator", "cpu",
        # Adam makes a whole step of a gradient that is nothing but rounding, unless its epsilon is above that
        "--adam_eps", "1e-4", "--eval_split", "0", *flags]))


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.adapts_linears])
def test_two_sittings_under_zero_in_two_processes_equal_one(files, tmp_path, method):
    train(files, tmp_path / "one", method, "--micro_bsz", "8", "--epoch_steps", str(STEPS))
    two = ["--devices", "2", "--micro_bsz", "2", "--accumulate_grad_batches", "2"]
    train(files, tmp_path / "two", method, *two, "--epoch_steps", str(STEPS // 2), "--strategy", "deepspeed_stage_2")
    train(files, tmp_path / "two", method, *two, "--epoch_steps", str(STEPS), "--strategy", "deepspeed_stage_3", "--resume", "auto")
    curve = losses(tmp_path / "one")
    assert curve[-1] < curve[0], "it learns"
    assert losses(tmp_path / "two") == pytest.approx(curve, rel=1e-5)  # the same sums in another order
    ours, theirs = (read_checkpoint(tmp_path / run / "adapter.pth") for run in ("one", "two"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        close(name, theirs[name], tensor, 1e-3)
