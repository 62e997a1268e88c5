"""Adapters on models that are not plain stacks of nn.Linear: each works, equal to the live model in every
file, or is refused before training.
"""

import copy

import pytest
import torch
from torch import nn

import rwkv_miss
from rwkv_miss.adapter import METHODS, adapted_linears
from rwkv_miss.convert import convert
from src.model import RWKV

from .conftest import close, make_arch

LINEAR = [name for name, method in METHODS.items() if method.adapts_linears]


class Tied(nn.Module):
    """A small language model whose head is its embedding."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(20, 8)
        self.key = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids):
        return self.head(self.key(self.emb(ids)).tanh())


def train(model, inputs, steps=3):
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    return model.eval()


def files(model, base, folder):
    """The adapter's file, the base's and the merged one."""
    adapter, unmerged, merged = (folder / f"{name}.pth" for name in ("adapter", "base", "merged"))
    rwkv_miss.save_adapter(model, adapter)
    rwkv_miss.write_checkpoint(unmerged, base.state_dict().items())
    rwkv_miss.merge_file(unmerged, adapter, merged)
    return adapter, unmerged, merged


def same_everywhere(model, base, inputs, folder, tolerance=1e-5):
    """The file loaded, merged, and trained on, saved and loaded answers as the live models do."""
    adapter, _, merged = files(model, base, folder)
    loaded, plain, again = (copy.deepcopy(base).eval() for _ in range(3))
    rwkv_miss.load_adapter(loaded, adapter)
    plain.load_state_dict(torch.load(merged, weights_only=True), strict=True)
    with torch.no_grad():
        want, before = model(inputs), base.eval()(inputs)
        assert (want - before).abs().max() > 1e-3
        close("loaded", loaded(inputs), want, tolerance)
        close("merged", plain(inputs), want, tolerance)
    train(loaded, inputs)
    rwkv_miss.save_adapter(loaded, folder / "second.pth")
    rwkv_miss.load_adapter(again, folder / "second.pth")
    with torch.no_grad():
        assert not torch.equal(loaded(inputs), want)
        close("trained on and loaded", again(inputs), loaded(inputs), tolerance)
    return loaded


@pytest.mark.parametrize("by_parameter", [True, False], ids=["one parameter", "two of one memory"])
def test_a_tied_head_that_is_trained_has_both_names_in_the_merged_file(by_parameter, tmp_path):
    torch.manual_seed(0)
    model, ids = Tied(), torch.arange(20)[None]
    if not by_parameter:
        model.head.weight = nn.Parameter(model.emb.weight.detach())
    base = copy.deepcopy(model)
    rwkv_miss.inject(model, "miss", targets=["key"], rank=3)
    model.head.requires_grad_(True)
    train(model, ids)
    same_everywhere(model, base, ids, tmp_path)
    content, metadata = (
        torch.load(tmp_path / "adapter.pth", weights_only=True),
        rwkv_miss.read_metadata(tmp_path / "adapter.pth"),
    )
    assert len(content) == 2 and len(metadata["tied"]) == 1, "it is there once"
    # a base that has one of the names keeps its keys
    for absent in next(iter(metadata["tied"].items())):
        tensors = {name: t for name, t in base.state_dict().items() if name != absent}
        rwkv_miss.write_checkpoint(tmp_path / "short.pth", tensors.items())
        rwkv_miss.merge_file(tmp_path / "short.pth", tmp_path / "adapter.pth", tmp_path / "short_merged.pth")
        assert list(torch.load(tmp_path / "short_merged.pth", weights_only=True)) == list(tensors)


@pytest.mark.parametrize("to", ["peft", "lora", "rwkv-peft", "rwkv-lightning"])
def test_other_projects_files_have_no_form_for_a_tensor_of_two_names_or_a_bias_with_an_adapter(to, tmp_path):
    for name, words in (
        ("emb.weight", "emb.weight is trained as a whole, and head.weight is the same tensor"),
        ("key.bias", "key.bias is trained in addition to the linear's adapter"),
    ):
        model = Tied()
        rwkv_miss.inject(model, "miss", targets=["key"], rank=3)
        model.get_parameter(name).requires_grad_(True)
        rwkv_miss.save_adapter(model, tmp_path / "a.pth")
        with pytest.raises(
            rwkv_miss.UserError, match=f"{words}, which --to {to} has no form for; merge the adapter"
        ):
            convert(tmp_path / "a.pth", tmp_path / "out", to)
        assert not (tmp_path / "out").exists()


def test_a_safetensors_file_keeps_both_names(tmp_path):
    torch.manual_seed(0)
    model, ids = Tied(), torch.arange(20)[None]
    base = copy.deepcopy(model)
    rwkv_miss.inject(model, "miss", targets=["key"], rank=3)
    model.head.requires_grad_(True)
    rwkv_miss.save_adapter(train(model, ids), tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "a.safetensors", "safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b.pth", "native")
    assert rwkv_miss.read_metadata(tmp_path / "b.pth")["tied"] == {"head.weight": "emb.weight"}
    base.head.weight = nn.Parameter(base.head.weight.detach().clone())  # no longer tied
    rwkv_miss.load_adapter(base.eval(), tmp_path / "b.pth")
    assert torch.equal(base.head.weight, base.emb.weight) and torch.equal(base(ids), model(ids))


def test_a_name_of_a_tied_tensor_that_is_none_is_refused(tmp_path):
    model = Tied()
    rwkv_miss.inject(model, "miss", targets=["key"], rank=3)
    rwkv_miss.save_adapter(model, tmp_path / "whole.pth")
    rwkv_miss.write_checkpoint(
        tmp_path / "a.pth",
        rwkv_miss.read_checkpoint(tmp_path / "whole.pth").items(),
        {**rwkv_miss.read_metadata(tmp_path / "whole.pth"), "tied": {"head.weight": ["emb.weight"]}},
    )
    with pytest.raises(
        rwkv_miss.UserError,
        match="head.weight is tied to \"\\['emb.weight'\\]\", expected the name of a tensor",
    ):
        rwkv_miss.load_adapter(Tied(), tmp_path / "a.pth")


def test_a_trained_view_of_another_parameter_takes_that_along(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    model[2].weight = nn.Parameter(model[1].weight.detach()[:3])
    base = copy.deepcopy(model)
    with pytest.raises(rwkv_miss.UserError, match="1 has the same weight as 2.weight"):
        rwkv_miss.inject(model, "miss", targets=["1"], rank=2)
    rwkv_miss.inject(model, "miss", targets=["0"], rank=2)
    model[2].weight.requires_grad_(True)
    train(model, torch.randn(5, 6))
    rwkv_miss.save_adapter(model, tmp_path / "a.pth")
    assert torch.equal(torch.load(tmp_path / "a.pth", weights_only=True)["1.weight"], model[1].weight)
    assert not base[1].weight.equal(model[1].weight)


@pytest.mark.parametrize("whole", ["bias", "weight and bias"])
@pytest.mark.parametrize("method", LINEAR)
def test_a_trained_bias_or_weight_of_an_adapted_linear_is_saved_loaded_and_merged(method, whole, tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 8)), torch.randn(30, 12)
    base = copy.deepcopy(model)
    rwkv_miss.inject(model, method, targets=["0", "2"], rank=2)
    if whole == "bias":
        model[2].bias.requires_grad_(True)
    else:
        model[2].weight.requires_grad_(True)
        model[2].bias.requires_grad_(True)
    train(model, x)
    loaded = same_everywhere(model, base, x, tmp_path)
    assert adapted_linears(loaded).keys() == ({"0", "2"} if whole == "bias" else {"0"})


@pytest.mark.parametrize("options", [{"magnitude": True}, {"magnitude": True, "shards": "balanced"}])
def test_a_magnitude_of_a_trained_weight(options, tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 8)), torch.randn(30, 12)
    base = copy.deepcopy(model)
    rwkv_miss.inject(model, "miss", targets=["0", "2"], rank=2, **options)
    model[2].weight.requires_grad_(True)
    same_everywhere(train(model, x), base, x, tmp_path)


def test_statistics_of_batchnorm_are_saved_loaded_and_merged(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)), 3 * torch.randn(40, 6) + 2
    base = copy.deepcopy(model)
    rwkv_miss.inject(model, "miss", targets=["0"], rank=2)
    rwkv_miss.save_adapter(model, tmp_path / "fresh.pth")
    assert list(torch.load(tmp_path / "fresh.pth", weights_only=True)) == ["0.miss"], (
        "they have not moved yet"
    )
    same_everywhere(train(model, x), base, x, tmp_path)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def with_hook(linear):
    linear.register_forward_hook(lambda module, args, y: 2 * y)
    return linear


def with_forward(linear):
    linear.forward = lambda x: 2 * nn.Linear.forward(linear, x)
    return linear


def with_tensor(linear):
    linear.register_buffer("scale", torch.ones(1))
    return linear


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda: Doubled(4, 4), "Doubled has a forward of its own"),
        (lambda: with_forward(nn.Linear(4, 4)), "Linear has a forward of its own"),
        (lambda: with_hook(nn.Linear(4, 4)), "hooks are registered on it"),
        (lambda: with_tensor(nn.Linear(4, 4)), r"tensors of its own \(scale\)"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "a parametrization"),
        (lambda: nn.utils.weight_norm(nn.Linear(4, 4)), "weight_norm"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_what_is_more_than_a_linear_is_refused_and_left_as_it_was(make, words):
    model = nn.Sequential(make(), nn.Linear(4, 4))
    before = model[0]
    with pytest.raises(rwkv_miss.UserError, match=words):
        rwkv_miss.inject(model, "miss", targets=["0", "1"], rank=2)
    assert model[0] is before and all(p.requires_grad for p in model.parameters())
    rwkv_miss.inject(model, "miss", targets=["1"], rank=2)


def test_one_layer_under_two_names_is_refused():
    linear = nn.Linear(4, 4)
    model = nn.Sequential(linear, nn.Tanh(), linear)
    for target in ("0", "2"):
        with pytest.raises(rwkv_miss.UserError, match="0 and 2 are one layer under two names"):
            rwkv_miss.inject(model, "miss", targets=[target], rank=2)


def test_weights_side_by_side_in_one_memory_are_adapted():
    memory = torch.randn(8, 4)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight, model[1].weight = nn.Parameter(memory[:4]), nn.Parameter(memory[4:])
    assert rwkv_miss.inject(model, "miss", targets=["0", "1"], rank=2).linears == ["0", "1"]


@pytest.fixture
def plain_path():
    """Torch's own switch, as the message asks for it."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def test_linears_that_torch_reads_and_does_not_call_are_refused():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 16, batch_first=True), 2)
    for target in ("linear1", "linear2"):
        with pytest.raises(rwkv_miss.UserError, match="set_fastpath_enabled"):
            rwkv_miss.inject(model, targets=[target], rank=3)
    assert not adapted_linears(model)


def test_an_attention_of_torch_reads_the_changed_weights_also_on_the_fast_path(tmp_path):
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 16, batch_first=True, dropout=0.0), 2)
    base, x = copy.deepcopy(model), torch.randn(2, 5, 12)
    rwkv_miss.inject(model, targets=["in_proj_weight", "out_proj"], rank=3)
    with torch.no_grad():
        for adapted in adapted_linears(model).values():
            adapted.miss.normal_()
    same_everywhere(model.eval(), base, x, tmp_path)


def test_without_the_fast_path_an_adapter_of_an_encoder_layer_is_called(plain_path, tmp_path):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    base, x = copy.deepcopy(model), torch.randn(2, 5, 12)
    rwkv_miss.inject(model, targets=["linear1", "linear2"], rank=3)
    with torch.no_grad():
        for adapted in adapted_linears(model).values():
            adapted.miss.normal_()
    same_everywhere(model.eval(), base, x, tmp_path)


def test_an_adapter_never_takes_the_place_of_a_model(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    rwkv_miss.write_checkpoint(tmp_path / "base.pth", model.state_dict().items())
    before = (tmp_path / "base.pth").read_bytes()
    rwkv_miss.inject(model, targets=["0"], rank=2)
    with pytest.raises(
        rwkv_miss.UserError, match="base.pth is there already, a checkpoint, and would be lost"
    ):
        rwkv_miss.save_adapter(model, tmp_path / "base.pth")
    assert (tmp_path / "base.pth").read_bytes() == before
    for _ in range(2):
        rwkv_miss.save_adapter(model, tmp_path / "adapter.pth")  # an adapter replaces an adapter


@pytest.mark.parametrize("arch", ["resnet50", {"layers": 3}, nn.Identity])
def test_a_model_with_an_arch_of_another_kind_is_saved(arch, tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    model.arch = arch
    rwkv_miss.inject(model, targets=["0"], rank=2)
    rwkv_miss.save_adapter(model, tmp_path / "a.pth")
    assert rwkv_miss.read_metadata(tmp_path / "a.pth")["arch"] is None


def test_parts_of_rwkv_are_trained_on(tmp_path):
    torch.manual_seed(0)
    model = RWKV(make_arch(7))
    base = copy.deepcopy(model)
    rwkv_miss.inject(model, "miss", rank=4, train_parts="head,ln")
    rwkv_miss.save_adapter(model, tmp_path / "a.pth")
    rwkv_miss.load_adapter(base, tmp_path / "a.pth")
    assert [name for name, p in base.named_parameters() if p.requires_grad] == [
        name for name, p in model.named_parameters() if p.requires_grad
    ]


@pytest.mark.parametrize("shape", [(3, 12), (2, 3, 12)], ids=["2 axes", "3 axes"])
@pytest.mark.parametrize("method", LINEAR)
def test_the_output_of_an_adapted_linear_may_be_changed_in_place(method, shape):
    gradients = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(inplace=inplace), nn.Linear(8, 8))
        rwkv_miss.inject(model, method, targets=["0", "2"], rank=2)
        trained = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            for p in trained:
                p.add_(0.1 * torch.randn_like(p))
        y = model(torch.randn(shape))
        y = y.mul_(2) if inplace else y * 2
        gradients.append(torch.autograd.grad(y.square().sum(), trained))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
