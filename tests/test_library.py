"""The library on models as other programs hold them: compiled, wrapped, sharded, in HF Trainer."""

import copy

import pytest
import torch
from torch import nn

import rwkv_miss
from rwkv_miss.adapter import adapted_linears


class DistributedDataParallel(nn.Module):
    """A wrapper with torch's name and attribute, which needs no process group."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


DeepSpeedEngine = type("DeepSpeedEngine", (DistributedDataParallel,), {})


def small(width=12):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 8))


def adapted(method="miss", targets=("0", "2"), rank=2, **options):
    """A model, and its copy that carries an adapter with values."""
    base = small()
    model = copy.deepcopy(base)
    rwkv_miss.inject(model, method, targets=list(targets), rank=rank, **options)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return base, model


@pytest.mark.parametrize(
    "wrap",
    [
        torch.compile,
        DistributedDataParallel,
        nn.DataParallel,
        DeepSpeedEngine,
        lambda model: DistributedDataParallel(torch.compile(model)),
        lambda model: torch.compile(DistributedDataParallel(model)),
    ],
    ids=["compiled", "ddp", "dp", "deepspeed", "ddp of compiled", "compiled ddp"],
)
def test_wrappers_are_looked_through(wrap, tmp_path):
    base, model = adapted()
    rwkv_miss.save_adapter(model, tmp_path / "plain.pth")
    rwkv_miss.save_adapter(wrap(model), tmp_path / "wrapped.pth")
    plain, wrapped = (rwkv_miss.read_checkpoint(tmp_path / f"{name}.pth") for name in ("plain", "wrapped"))
    assert plain.keys() == wrapped.keys() == {"0.miss", "2.miss"}
    assert all(torch.equal(plain[name], wrapped[name]) for name in plain)

    rwkv_miss.inject(other := copy.deepcopy(base), targets=["0", "2"], rank=2)
    rwkv_miss.load_adapter(wrap(other), tmp_path / "plain.pth")
    assert torch.equal(other[0].miss, model[0].miss)

    x = torch.randn(3, 12)
    with rwkv_miss.disabled(wrap(model)):
        assert torch.equal(model(x), base(x))
    assert not torch.equal(model(x), base(x))


def test_a_compiled_model_is_injected_and_a_wrapped_one_is_not(tmp_path):
    base, model = adapted()
    rwkv_miss.save_adapter(model, tmp_path / "a.pth")
    for change in (
        lambda model: rwkv_miss.inject(model, targets=["0"], rank=2),
        lambda model: rwkv_miss.load_adapter(model, tmp_path / "a.pth"),
    ):
        compiled = torch.compile(copy.deepcopy(base))
        change(compiled)
        assert adapted_linears(compiled._orig_mod) and compiled._orig_mod.injection.linears[0] == "0"
        wrapped = DistributedDataParallel(copy.deepcopy(base))
        with pytest.raises(
            rwkv_miss.UserError, match=r"in DistributedDataParallel already.* call inject\(\) first"
        ):
            change(wrapped)
        assert not adapted_linears(wrapped)


def test_fsdp1_is_refused(tmp_path):
    _, model = adapted()
    wrapped = type("FullyShardedDataParallel", (DistributedDataParallel,), {})(model)
    with pytest.raises(rwkv_miss.UserError, match=r"FSDP1.*fully_shard"):
        rwkv_miss.save_adapter(wrapped, tmp_path / "a.pth")


def test_an_unknown_wrapper_is_named_with_the_place_of_the_model(tmp_path):
    _, model = adapted()
    holder = nn.ModuleDict({"policy": model})
    with pytest.raises(
        rwkv_miss.UserError,
        match="this ModuleDict carries no adapter; its module policy does: give model.policy",
    ):
        rwkv_miss.save_adapter(holder, tmp_path / "a.pth")
    with pytest.raises(rwkv_miss.UserError, match=r"this Linear carries no adapter; call inject\(\) first"):
        rwkv_miss.save_adapter(nn.Linear(2, 2), tmp_path / "a.pth")
