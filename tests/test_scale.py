"""Many processes and machines: every stage trains the same adapter, stage 3 holds shares only, launchers, and ranks that die."""

import json
import random

import pytest
import torch

import src.deepspeed_anywhere
from rwkv_miss import read_checkpoint, read_metadata
from src.model import RWKV

from . import program
from .conftest import close, make_arch, random_tensors
from .program import succeed

STAGES = [f"deepspeed_stage_{stage}{offload}" for stage in "123" for offload in ("", "_offload")]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A random bf16 base of odd width, which two processes do not share evenly, and 8 rows: 2 steps of 4."""
    folder = tmp_path_factory.mktemp("scale")
    torch.save(random_tensors(make_arch(7, vocab_size=256, n_embd=135, head_size=15), torch.bfloat16), folder / "base.pth")
    rng = random.Random(0)
    rows = [{"text": "".join(rng.choices("abcd ", k=rng.randint(3, 20)))} for _ in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def flags_of(files, proj_dir, *flags):
    own = [] if "--micro_bsz" in flags else ["--micro_bsz", "4"]
    return ["--load_model", str(files / "base.pth"), "--data_file", str(files / "rows.jsonl"), "--proj_dir", str(proj_dir), "--tokenizer", "bytes",
            "--packing", "0", "--accelerator", "cpu", "--lr_init", "1e-2", "--weight_decay", "20", "--adam_eps", "1e-3", "--peft_config", "r=5",
            *own, *flags]


def losses(proj_dir):
    return [json.loads(line)["loss"] for line in (proj_dir / "metrics.jsonl").read_text().splitlines()]


TWO = ["--devices", "2", "--micro_bsz", "2", "--strategy"]


@pytest.fixture(scope="module")
def plain(files, tmp_path_factory):
    """The run in one process that all others must equal."""
    proj_dir = tmp_path_factory.mktemp("plain") / "run"
    succeed(program.run(flags_of(files, proj_dir)))
    return proj_dir


def look_inside(rank):
    """Assertions within a stage-3 run: what a process holds of the base, before the first step and while the head runs."""
    setup, head_of = src.deepspeed_anywhere.AnywhereDeepSpeed._setup_model, RWKV.features

    def checked_setup(self, model):
        sizes = {name: p.numel() for name, p in model.named_parameters()}
        assert "base.pth" in open("/proc/self/maps").read(), "the base is read when it is shared out, and not before"
        setup(self, model)
        for name, p in model.named_parameters():
            assert p.numel() == 0 and p.ds_tensor.numel() == -(-sizes[name] // 2), f"{name} is held whole"
            assert p.ds_tensor.dtype == torch.float32
        assert "base.pth" not in open("/proc/self/maps").read(), "the file is still mapped"
        return model

    def checked_features(self, *args, **kwargs):
        out = head_of(self, *args, **kwargs)
        whole = [name for name, p in self.named_parameters() if p.numel() > 10_000]  # DeepSpeed leaves smaller ones whole
        # the head may have been fetched ahead, nothing that was used before may still be there
        assert set(whole) <= {"head.weight"}, f"{whole} are whole after the last layer"
        return out

    src.deepspeed_anywhere.BUCKET = 1000  # as small against this model as the real one is against a real model
    src.deepspeed_anywhere.AnywhereDeepSpeed._setup_model = checked_setup
    RWKV.features = checked_features


@pytest.fixture(scope="module")
def stage_1(files, tmp_path_factory, plain):
    """The same on two processes, where the sums come in another order; the large epsilon keeps Adam from blowing up a gradient near zero."""
    proj_dir = tmp_path_factory.mktemp("stage-1") / "run"
    succeed(program.run(flags_of(files, proj_dir, *TWO, "deepspeed_stage_1")))
    assert losses(proj_dir) == pytest.approx(losses(plain), rel=1e-5)
    ours, theirs = (read_checkpoint(path / "adapter.pth") for path in (plain, proj_dir))
    for name, tensor in ours.items():
        close(name, theirs[name], tensor, 1e-5)
    return proj_dir


@pytest.mark.parametrize("strategy", STAGES[1:])
def test_every_stage_trains_the_same_adapter_into_the_same_file(files, tmp_path, stage_1, strategy):
    """Bit for bit where the gradients are summed alike; ZeRO-3 averages them before the sum over ranks."""
    sabotage = look_inside if "3" in strategy else None
    succeed(program.run(flags_of(files, tmp_path / "run", *TWO, strategy), sabotage))
    assert losses(tmp_path / "run") == pytest.approx(losses(stage_1), rel=1e-6)
    ours, theirs = (read_checkpoint(proj_dir / "adapter.pth") for proj_dir in (stage_1, tmp_path / "run"))
    assert list(ours) == list(theirs)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)
    metadata = [read_metadata(proj_dir / "adapter.pth") for proj_dir in (stage_1, tmp_path / "run")]
    assert metadata[0] == metadata[1]
