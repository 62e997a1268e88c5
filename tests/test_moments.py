"""AdamW with moments in 8 bits: what a run trains, keeps and resumes with."""

import importlib.metadata
import shutil
import sys

import pytest
import torch

from rwkv_miss import read_checkpoint
from rwkv_miss.errors import UserError
from src.common import moments as packing
from src.common.moments import packed, unpacked
from src.model import RWKV
from src.planning.memory import memory_parts
from src.planning.plan import check_optimizer
from src.training.optimizer import adamw, parameter_groups

from . import program
from .conftest import make_arch, save_base, settled_config, slow
from .program import flags_of, losses, succeed, write_data

pytest.importorskip("bitsandbytes")
RATE = 1e-3


def optimizers(model, **settings):
    """AdamW with moments in fp32 and in 8 bits, over two copies of the model's parameters."""
    made = []
    for name in ("adamw", "adamw8bit"):
        copy = RWKV(model.arch)
        copy.load_state_dict(model.state_dict())
        groups = parameter_groups(copy, RATE, 0.1, lr_map={"ffn": 0.5})
        config = settled_config(peft="none", optimizer=name, accelerator="cpu", strategy="auto")
        made.append((copy, adamw(groups, config, RATE)))
    return made


def test_the_first_steps_are_adamws_and_the_memory_is_as_counted():
    """The first step is exact: its moments are packed afterwards. Tensors of few numbers are exact in all."""
    arch = make_arch(7, n_layer=1, vocab_size=130, n_embd=64, head_size=32)
    (exact, wanted), (model, found) = optimizers(RWKV(arch))
    pairs = list(zip(exact.named_parameters(), model.parameters()))
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 5):
        for (name, p), q in pairs:
            p.grad = torch.randn(p.shape, generator=generator) * 0.9 ** len(name)
            q.grad = p.grad.clone()
        wanted.step(), found.step()
        for (name, p), q in pairs:
            packs = p.numel() >= 4096 and step > 1
            apart = (p - q).abs() / (step * RATE)  # shares of the way that Adam went
            assert apart.mean() < (0.02 if packs else 1e-4) and apart.max() < 1, name
            assert packs <= bool(apart.max() > 1e-3), f"{name}: is it packed?"
    for optimizer, name in ((wanted, "adamw"), (found, "adamw8bit")):
        config = settled_config(peft="none", optimizer=name, micro_bsz=1)
        counted = memory_parts(arch, config, "cpu", "torch", "fp32", 16, 16)["Adam"]
        kept = [
            tensor.nbytes
            for state in optimizer.state.values()
            for key, tensor in state.items()
            if key != "step" and not key.startswith("qmap")  # one for all
        ]
        assert sum(kept) == counted


def test_moments_that_are_unpacked_and_packed_again_have_the_same_bits(monkeypatch):
    """Whichever part is unpacked. Blocks have their largest number on either side of 0; one is 0."""
    from bitsandbytes.optim import AdamW8bit

    p = torch.nn.Parameter(torch.zeros(90, 50))
    optimizer = AdamW8bit([p], lr=RATE)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        p.grad = torch.randn(p.shape, generator=generator).pow(5)
        p.grad[10:30] = 0
        optimizer.step()
    state = optimizer.state[p]
    moments = unpacked(state)
    whole = {key: value.view(p.shape) if value.dim() else value for key, value in moments.items()}
    again = packed(whole, p.device)
    assert again["step"] == 3 and again.keys() == state.keys()
    for number in "12":
        scales = state[f"absmax{number}"]
        assert torch.equal(again[f"absmax{number}"], scales) and 0 < (scales == 0).sum() < len(scales)
        matters = scales.repeat_interleave(256)[:4500].view(p.shape) > 0
        assert torch.equal(again[f"state{number}"][matters], state[f"state{number}"][matters])
    monkeypatch.setattr(packing, "AT_ONCE", 512)
    for key, value in packed(whole, p.device).items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(again[key])), f"{key} in slices"
    for start, size in ((0, 4500), (300, 1), (255, 258), (4400, 100), (512, 0)):
        part = unpacked(state, start, size)
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(part[key], moments[key][start : start + size]), (key, start, size)


@pytest.mark.parametrize("strategy", ["auto", slow("deepspeed_stage_3"), slow("deepspeed_stage_1")])
def test_a_stopped_run_resumes_with_the_same_bits(tmp_path, strategy):
    save_base(tmp_path / "base.pth", n_layer=1, n_embd=64, head_size=32)
    write_data(tmp_path)
    flags = "--peft none --optimizer adamw8bit --lr_init 1e-3 --lr_schedule constant --epoch_steps 4"
    flags += " --save_steps 2 --save_total_limit 2 --strategy " + strategy
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    succeed(program.run(flags_of(tmp_path, unbroken, *flags.split())))
    shutil.copytree(unbroken, resumed)
    newest = "checkpoints/step-00000004.pth"
    (resumed / newest).unlink()
    succeed(program.run(flags_of(tmp_path, resumed, *flags.split(), "--resume", "auto")))
    assert losses(resumed) == losses(unbroken) and losses(unbroken)[-1] < losses(unbroken)[0]
    got, want = (read_checkpoint(folder / newest) for folder in (resumed, unbroken))
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []
    assert len(want["head.weight:exp_avg"].view(-1)[:256].unique()) < 200, "is it in 8 bits?"


@pytest.mark.parametrize("version, seen", [("0.49.2", "here is 0.49.2"), (None, "which is not installed")])
def test_the_package_is_asked_for_before_anything_is_read(monkeypatch, version, seen):
    def installed(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    check_optimizer("adamw")
    with pytest.raises(
        UserError, match=rf"bitsandbytes, 0.50 or newer, {seen}; pip install 'bitsandbytes>=0.50'"
    ):
        check_optimizer("adamw8bit")


def test_a_package_that_does_not_work_here_is_told_before_anything_is_read(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match=r"importing .* fails here \(ModuleNotFoundError: .*mend the install"):
        check_optimizer("adamw8bit")
