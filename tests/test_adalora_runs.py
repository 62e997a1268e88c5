"""AdaLoRA in runs: pruning agrees between processes and strategies, and goes on in a resumed run as if
nothing had happened.
"""

import json
import random

import pytest
import torch

import rwkv_miss
from src.model import RWKV

from . import program
from .conftest import close, make_arch, random_tensors
from .program import at_file, flags_of, interrupt, losses

TWO = ["--devices", "2", "--micro_bsz", "2", "--accumulate_grad_batches", "2", "--strategy"]
OPTIONS = {"rank": 4, "init_rank": 6, "tinit": 2, "tfinal": 3, "delta_t": 2}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A random base over bytes, whose wide factors ZeRO-3 shares out, and 24 rows of very unequal lengths."""
    folder = tmp_path_factory.mktemp("methods")
    torch.save(random_tensors(make_arch(7, vocab_size=256, n_embd=64)), folder / "base.pth")
    torch.save(
        random_tensors(make_arch(7, n_layer=1, vocab_size=256, n_embd=320, head_size=32)), folder / "wide.pth"
    )
    rng = random.Random(0)
    rows = [{"text": "".join(rng.choices("abcd ", k=rng.choice([3, 9, 60])))} for _ in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def run(files):
    """run(proj_dir, *flags, base, sabotage, **options) -> (exit code, everything printed)"""

    def start(proj_dir, *flags, base="base", sabotage=None, **options):
        # Adam makes a whole step of a gradient that is nothing but rounding, unless its epsilon is above that
        own = "--micro_bsz 8 --epoch_count 4 --adam_eps 1e-4 --peft adalora --peft_config".split()
        own += [json.dumps(OPTIONS | options), "--load_model", files / f"{base}.pth"]
        return program.run(flags_of(files, proj_dir, *own, *flags), sabotage)

    return start


@pytest.fixture(scope="module")
def plain(run, tmp_path_factory):
    proj_dir = tmp_path_factory.mktemp("plain") / "run"
    program.succeed(run(proj_dir))
    return proj_dir


def left(proj_dir):
    """The singular values, in which 0 is a pruned one."""
    tensors = rwkv_miss.read_checkpoint(proj_dir / "adapter.pth")
    return {
        name: tensors[name] - tensors[name.replace("lora_E", "offset")]
        for name in tensors
        if name.endswith("lora_E")
    }


def same_run(one, other):
    """The same sums in another order, and the same pruning."""
    assert losses(one) == pytest.approx(losses(other), rel=1e-5)
    for (name, values), others in zip(left(one).items(), left(other).values(), strict=True):
        assert torch.equal(values == 0, others == 0), name
        close(name, others, values, 1e-3)


def test_two_processes_prune_what_one_does(run, plain, tmp_path):
    program.succeed(run(tmp_path / "two", *TWO, "deepspeed_stage_2"))
    same_run(plain, tmp_path / "two")
    ranks = [int((values != 0).sum()) for values in left(plain).values()]
    assert sum(ranks) == 12 * 4 and len(set(ranks)) > 1, "4 in the mean, and not the same everywhere"
    assert losses(plain)[-1] < losses(plain)[0]


@pytest.mark.slow
def test_zero_3_shares_out_factors_and_prunes_the_same(run, tmp_path):
    # 40 x 320 numbers: above what stage 3 leaves whole
    options = {"rank": 30, "init_rank": 40, "base": "wide"}
    flags = ["--epoch_count", "2", "--ctx_len", "32"]
    program.succeed(run(tmp_path / "one", *flags, **options))
    program.succeed(run(tmp_path / "two", *flags, *TWO, "deepspeed_stage_3", **options))
    same_run(tmp_path / "one", tmp_path / "two")
    assert sum(int((values != 0).sum()) for values in left(tmp_path / "one").values()) == 6 * 30


def test_an_interrupted_run_prunes_as_if_it_had_not_been(files, run, plain, tmp_path):
    """Ctrl-C in the middle of the pruning: averages and offsets go on, bit for bit."""
    stop = at_file("metrics.jsonl", 6, tmp_path / "parts", interrupt)
    code, output = run(tmp_path / "parts", sabotage=stop)
    stopped = len(losses(tmp_path / "parts"))
    assert code == 130 and 2 < stopped < 9, output
    program.succeed(run(tmp_path / "parts", "--resume", "auto"))
    assert losses(tmp_path / "parts") == losses(plain)
    ours, theirs = (
        rwkv_miss.read_checkpoint(proj_dir / "adapter.pth") for proj_dir in (plain, tmp_path / "parts")
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    live = RWKV.load(files / "base.pth")
    rwkv_miss.load_adapter(live, plain / "adapter.pth")
    rwkv_miss.merge_file(files / "base.pth", plain / "adapter.pth", tmp_path / "merged.pth")
    ids = torch.tensor([list(b"abcd ab")])
    close("logits", RWKV.load(tmp_path / "merged.pth")(ids)[0], live(ids)[0], 2e-5)
