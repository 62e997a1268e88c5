"""Merge in memory: the numbers of a merged file, the base back bit for bit, and plain modules again."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import rwkv_miss
from rwkv_miss.adapter import METHODS
from rwkv_miss.quantised import quantise_

from .conftest import close
from .test_adapters import CASES, filled, rwkv

LINEAR = [name for name, method in METHODS.items() if method.adapts_linears]


def same_model(model, base):
    """The modules, tensors and trained parameters of a model are exactly another one's."""
    assert [type(module) for module in model.modules()] == [type(module) for module in base.modules()]
    got, want = model.state_dict(), base.state_dict()
    assert list(got) == list(want) and all(torch.equal(got[name], want[name]) for name in want)
    trained = [[name for name, p in m.named_parameters() if p.requires_grad] for m in (model, base)]
    assert trained[0] == trained[1] and not hasattr(model, "injection")


@pytest.mark.parametrize("method,options", CASES)
def test_the_merged_model_is_the_merged_file_and_the_base_comes_back(method, options, tmp_path):
    torch.manual_seed(0)
    # Bat's tensors have a row for every output
    model = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 8, bias=False)).to(torch.bfloat16)
    model[2].weight.requires_grad_(False)
    base = copy.deepcopy(model)
    rwkv_miss.inject(model, method, targets=["0", "2"], rank=1 if method == "mora" else 2, **options)
    filled(model).eval()
    rwkv_miss.save_adapter(model, tmp_path / "a.pth")
    rwkv_miss.write_checkpoint(tmp_path / "base.pth", base.state_dict().items())
    rwkv_miss.merge_file(tmp_path / "base.pth", tmp_path / "a.pth", tmp_path / "merged.pth")

    x = torch.randn(5, 16).to(torch.bfloat16)
    live, before = model(x), {name: t.clone() for name, t in model.state_dict().items()}
    rwkv_miss.merge(model)
    merged = rwkv_miss.read_checkpoint(tmp_path / "merged.pth")
    plain = copy.deepcopy(base)
    plain.load_state_dict(merged)
    if method == "pissa":  # whose frozen weight is rounded in memory
        close("merged", model[0].weight, merged["0.weight"], 1e-2)
    else:
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in merged.items())
        assert torch.equal(model(x), plain(x))
    close("merged", model(x), live, 3e-2)
    rwkv_miss.save_adapter(model, tmp_path / "again.pth")
    assert (tmp_path / "again.pth").read_bytes() == (tmp_path / "a.pth").read_bytes()

    unloaded = rwkv_miss.unload(copy.deepcopy(model))
    assert torch.equal(unloaded(x), model(x)) and type(unloaded[0]) is nn.Linear
    rwkv_miss.unmerge(model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(model(x), live)
    rwkv_miss.unload(model)
    if method == "pissa":
        close("base", model[0].weight, base[0].weight, 1e-2)
        model.load_state_dict(base.state_dict())
    same_model(model, base)
    rwkv_miss.inject(model, method, targets=["0"], rank=1)


@pytest.mark.parametrize("method,parts", [("miss", "emb,ln,state"), ("state", ""), ("state", "ln")])
def test_whole_tensors_are_merged_disabled_and_taken_off(method, parts, tmp_path):
    model = rwkv().to(torch.bfloat16).eval()
    base, ids = copy.deepcopy(model), torch.arange(11)[None]
    rwkv_miss.inject(model, method, None, parts, **({"rank": 8} if method == "miss" else {}))
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    rwkv_miss.save_adapter(model, tmp_path / "a.pth")
    rwkv_miss.write_checkpoint(tmp_path / "base.pth", base.state_dict().items())
    rwkv_miss.merge_file(tmp_path / "base.pth", tmp_path / "a.pth", tmp_path / "merged.pth")
    live, want = model(ids)[0], base(ids)[0]
    assert not torch.allclose(live, want, rtol=1e-2)
    with rwkv_miss.disabled(model):
        assert torch.equal(model(ids)[0], want)
    assert torch.equal(model(ids)[0], live)

    loaded = copy.deepcopy(base)
    rwkv_miss.load_adapter(loaded, tmp_path / "a.pth")
    with rwkv_miss.disabled(loaded):
        assert torch.equal(loaded(ids)[0], want)
    rwkv_miss.merge(model)
    merged = rwkv_miss.read_checkpoint(tmp_path / "merged.pth")
    for name, tensor in model.state_dict().items():
        if name in merged:
            assert torch.equal(tensor, merged[name]) and tensor.dtype == merged[name].dtype, name
    rwkv_miss.save_adapter(model, tmp_path / "again.pth")
    assert (tmp_path / "again.pth").read_bytes() == (tmp_path / "a.pth").read_bytes()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in merged.items())
    rwkv_miss.unmerge(model)
    assert torch.equal(model(ids)[0], live)
    same_model(rwkv_miss.unload(model), base)
    same_model(rwkv_miss.unload(loaded), base)

    freed = copy.deepcopy(base)
    rwkv_miss.load_adapter(freed, tmp_path / "a.pth", keep_first=False)
    rwkv_miss.merge(freed, keep_base=False)
    rwkv_miss.save_adapter(freed, tmp_path / "again.pth")
    assert (tmp_path / "again.pth").read_bytes() == (tmp_path / "a.pth").read_bytes()
    for name, tensor in rwkv_miss.unload(freed).state_dict().items():
        if name in merged:
            assert torch.equal(tensor, merged[name]) and tensor.dtype == merged[name].dtype, name


@pytest.mark.parametrize("method", ["lora", "pissa"])
def test_a_merged_adapter_with_a_trained_weight_is_saved_as_before(method, tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(torch.bfloat16)
    rwkv_miss.inject(model, method, targets=["0", "1"], rank=2)
    filled(model)[0].weight.requires_grad_(True)
    rwkv_miss.save_adapter(model, tmp_path / "a.pth")
    rwkv_miss.merge(model)
    merged = model[0].weight.detach().clone()
    rwkv_miss.save_adapter(model, tmp_path / "again.pth")
    assert (tmp_path / "again.pth").read_bytes() == (tmp_path / "a.pth").read_bytes()
    assert torch.equal(model[0].weight, merged)
    rwkv_miss.unmerge(model)
    rwkv_miss.merge(model, keep_base=False)
    with pytest.raises(rwkv_miss.UserError, match=r"0.weight is trained as well as its adapter, and m"):
        rwkv_miss.save_adapter(model, tmp_path / "again.pth")


def test_the_first_values_of_whole_tensors_are_kept_or_freed(tmp_path):
    from src.config.adapter_options import AdapterOptions

    calls = (
        (True, lambda model: rwkv_miss.inject(model, rank=8, train_parts="emb")),
        (False, lambda model: rwkv_miss.inject(model, rank=8, train_parts="emb", keep_first=False)),
        (False, lambda model: AdapterOptions("miss", {"rank": 8}, None, "emb").inject(model)),
        (True, lambda model: rwkv_miss.load_adapter(model, tmp_path / "a.pth")),
        (False, lambda model: rwkv_miss.load_adapter(model, tmp_path / "a.pth", keep_first=False)),
    )
    for dtype in (torch.float32, torch.bfloat16):
        for kept, call in calls:
            model = rwkv().to(dtype)
            before, value = weakref.ref(model.emb.weight), model.emb.weight.detach().clone()
            place = model.emb.weight.data_ptr()
            call(model)
            rwkv_miss.save_adapter(model, tmp_path / "a.pth")
            gc.collect()
            with torch.no_grad():
                model.emb.weight.add_(1)
            assert (before() is not None) is kept
            if kept:
                with rwkv_miss.disabled(model):
                    assert torch.equal(model.emb.weight, value)
            else:
                assert (model.emb.weight.data_ptr() == place) is (dtype == torch.float32), "no copy either"
                with pytest.raises(rwkv_miss.UserError, match="trains emb.weight, too"):
                    rwkv_miss.disabled(model).__enter__()


def test_what_a_merge_in_memory_cannot_do_is_said(tmp_path):
    def adapted(**options):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        rwkv_miss.inject(model, "lora", targets=["0", "1"], rank=2, **options)
        return filled(model)

    model = adapted(dropout=0.5)
    live = model.eval()(x := torch.randn(3, 8))
    rwkv_miss.merge(model.train())
    for action, words in (
        (rwkv_miss.merge, r"merged already; call unmerge\(model\) or unload\(model\)"),
        (lambda model: rwkv_miss.load_adapter(model, "a.pth"), r"merged into the model; call rwkv_miss.unm"),
        (
            lambda model: model(x),
            r"no gradient would reach it; call rwkv_miss.unmerge\(model\) before training, or model.eval\(\)",
        ),
        (lambda model: rwkv_miss.disabled(model).__enter__(), r"merged into the model; call rwkv_miss.unm"),
        (lambda model: rwkv_miss.inject(model, targets=["0"]), r"already carries an adapter; merge it first"),
    ):
        with pytest.raises(rwkv_miss.UserError, match=words):
            action(model)
    with torch.no_grad():
        close("without dropout", model(x), live, 1e-6)
    rwkv_miss.unmerge(model)
    with pytest.raises(rwkv_miss.UserError, match=r"not merged; call merge\(model\) first"):
        rwkv_miss.unmerge(model)
    quantise_([model[1]], "int8")
    for action in (rwkv_miss.merge, rwkv_miss.unload):
        with pytest.raises(rwkv_miss.UserError, match=r"1.weight is quantised; save the adapter and merge"):
            action(model)
    assert model.injection.kept is None

    model = adapted().half()
    with torch.no_grad():
        model[1].weight[0, 0] = 65504
        model[1].lora_A.fill_(100)
        model[1].lora_B.fill_(100)
    before = model[0].weight.clone()
    rwkv_miss.save_adapter(model, tmp_path / "a.pth")
    for keep_base in (True, False):
        with pytest.raises(rwkv_miss.UserError, match="beyond fp16's largest"):
            rwkv_miss.merge(model, keep_base)
        if keep_base:
            assert torch.equal(model[0].weight, before) and model.injection.kept is None
    for action in (rwkv_miss.unload, rwkv_miss.unmerge):
        with pytest.raises(rwkv_miss.UserError, match=r"merge\(keep_base=False\) .* load the base again"):
            action(model)
    rwkv_miss.save_adapter(model, tmp_path / "again.pth")
    assert (tmp_path / "again.pth").read_bytes() == (tmp_path / "a.pth").read_bytes()
    model = adapted()
    rwkv_miss.merge(model, keep_base=False)
    with pytest.raises(rwkv_miss.UserError, match=r"keep_base=False\) did not keep 0.weight; load the base"):
        rwkv_miss.unmerge(model)
    assert type(rwkv_miss.unload(model)[0]) is nn.Linear


class Experts(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.stack = nn.Parameter(torch.randn(number, 8, 8))

    def forward(self, x):
        for weight in self.stack:
            x = x @ weight.T
        return x


class Copies(TorchDispatchMode):
    """Counter of copies of whole stacks."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.clone.default and args[0].dim() == 3
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["lora", "pissa"])
def test_the_weight_of_many_experts_is_copied_once(method, tmp_path):
    model = nn.Sequential(Experts(4))
    base, value = copy.deepcopy(model), model[0].stack.data
    before = value.clone()

    def copies(action, *args):
        with Copies() as counter:
            action(*args)
        return counter.count

    prepares = int(method == "pissa")
    assert copies(lambda: rwkv_miss.inject(model, method, targets=["stack"], rank=2)) == prepares
    assert torch.equal(value, before), "the base's memory"
    filled(model)
    rwkv_miss.save_adapter(model, tmp_path / "a.pth")
    live, unmerged = model(x := torch.randn(3, 8)), model[0].stack.data
    frozen = unmerged.clone()
    assert copies(rwkv_miss.merge, model.eval()) == 1 and torch.equal(unmerged, frozen)
    close("merged", model(x), live, 1e-5)
    rwkv_miss.unmerge(model)
    assert torch.equal(model[0].stack, frozen)
    assert copies(rwkv_miss.load_adapter, model, tmp_path / "a.pth") == prepares
    close("loaded", model(x), live, 1e-5)
    assert torch.equal(unmerged, frozen) and copies(rwkv_miss.unload, model) == prepares
    close("base", model[0].stack, base[0].stack, 1e-5)
