"""Targets of an adapter beyond linears, in every file and in memory, and how they are chosen by name."""

import copy
import importlib.util
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import rwkv_miss
from rwkv_miss.adapter import METHODS, adapted_linears
from rwkv_miss.quantised import quantise_
from rwkv_miss.target_checks import find_targets
from rwkv_miss.targets import _CHANGED

from .conftest import close
from .test_adapters import filled
from .test_foreign_models import same_everywhere, train

LINEAR = [name for name, method in METHODS.items() if method.adapts_linears]
pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("transformers"), reason="the test extra is absent: pip install transformers"
)


class Experts(nn.Module):
    """A weight for each of three experts, (experts, out, in), which the module reads."""

    def __init__(self, is_transposed=False):
        super().__init__()
        self.is_transposed = is_transposed
        self.up = nn.Parameter(torch.randn(3, *((12, 8) if not is_transposed else (8, 12))) / 3)
        self.mix = nn.Parameter(torch.randn(8, 12) / 3)

    def forward(self, x):
        up = self.up if self.is_transposed else self.up.mT
        return torch.stack([(x @ part).tanh() @ self.mix.t() for part in up.unbind()]).sum(0)


class Mixed(nn.Module):
    """A target of every form: an embedding, a Conv1D, a stack, a matrix, an attention that reads."""

    def __init__(self, is_transposed=False):
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.emb = nn.Embedding(20, 8, padding_idx=0)
        self.conv = Conv1D(12, 8)
        self.down = nn.Linear(12, 8)
        self.experts = Experts(is_transposed)
        self.mixer = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, ids):
        x = self.emb(ids)
        x = x + self.down(self.conv(x).tanh()) + self.experts(x)
        return x + self.mixer(x, x, x)[0]


FORMS = ["emb", "conv", "down", "up", "mix", "in_proj_weight", "out_proj"]
LAYERS = ["emb", "conv", "down", *(f"experts.adapted.up.{i}" for i in range(3)), "experts.adapted.mix"]
LAYERS += ["mixer.adapted.in_proj_weight", "mixer.out_proj.adapted.weight"]


def mixed(method="lora", targets=FORMS, is_transposed=False, **options):
    torch.manual_seed(0)
    model = Mixed(is_transposed)
    nn.init.normal_(model.conv.weight)
    base = copy.deepcopy(model)
    rwkv_miss.inject(model, method, targets=list(targets), **{"rank": 4 if method == "bat" else 2, **options})
    return model, base


@pytest.mark.parametrize("method", LINEAR)
def test_every_method_adapts_every_form_and_goes_through_every_file(method, tmp_path):
    rank = {"bat": 4, "mora": 1}.get(method, 2)
    model, base = mixed(method, rank=rank, is_transposed=method in ("miss", "dora"))
    assert set(adapted_linears(model)) == set(model.injection.linears) == set(LAYERS)
    assert base.state_dict().keys() <= model.state_dict().keys()
    ids = torch.arange(20)[None]
    if method != "pissa":
        close("fresh", model(ids), base(ids), 1e-6)
    train(filled(model) if method == "adalora" else model, ids, steps=2)
    loaded = same_everywhere(model, base, ids, tmp_path, tolerance=1e-4)
    with torch.no_grad():
        live = loaded(ids)
        with rwkv_miss.disabled(loaded):
            close("disabled", loaded(ids), base(ids), 1e-4)
        rwkv_miss.merge(loaded)
        close("merged in memory", loaded(ids), live, 1e-4)
        other = rwkv_miss.unload(copy.deepcopy(loaded))
        close("merged and unloaded", other(ids), live, 1e-4)
        rwkv_miss.unmerge(loaded)
        assert torch.equal(loaded(ids), live)
        rwkv_miss.unload(loaded)
    if method != "pissa":  # whose frozen weights have been rounded
        assert all(torch.equal(t, base.state_dict()[name]) for name, t in loaded.state_dict().items())
    assert list(loaded.state_dict()) == list(base.state_dict()) == list(other.state_dict())
    assert [type(m) for m in loaded.modules()] == [type(m) for m in base.modules()]


@pytest.mark.parametrize("kind", ["GPT2", "Mixtral", "Qwen3Moe"])
def test_models_of_transformers(kind, tmp_path):
    import transformers

    if kind == "GPT2":
        sizes, targets = dict(n_embd=16, n_layer=2, n_head=2, n_positions=16), "all-linear"
        expected = {"c_attn": 2, "c_proj": 4, "c_fc": 2}
    else:
        sizes = dict(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            num_experts_per_tok=2,
        )
        sizes |= {"num_local_experts" if kind == "Mixtral" else "num_experts": 4}
        sizes |= dict(moe_intermediate_size=24) if kind == "Qwen3Moe" else {}
        targets = ["gate_up_proj", "down_proj", "q_proj"]
        expected = {"q_proj": 2, "gate_up_proj": 8, "down_proj": 8}
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(vocab_size=20, **sizes)
    )
    base, ids = copy.deepcopy(model), torch.arange(12)[None]
    wrapped, plain = Logits(model), Logits(base)
    rwkv_miss.inject(wrapped, "miss", targets=targets, rank=2)
    counts = {leaf: sum(f".{leaf}" in name for name in adapted_linears(wrapped)) for leaf in expected}
    assert counts == expected and len(adapted_linears(wrapped)) == sum(expected.values())
    for p in wrapped.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    same_everywhere(wrapped.eval(), plain, ids, tmp_path)
    rwkv_miss.merge(wrapped)
    merged = rwkv_miss.read_checkpoint(tmp_path / "merged.pth")
    state = wrapped.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in merged.items())


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def get_output_embeddings(self):
        return self.model.get_output_embeddings()

    def forward(self, ids):
        return self.model(ids).logits


def names(targets, **others):
    return [target.path for target in find_targets(Deep(), targets, **others).values()]


class Deep(nn.Module):
    """Blocks of two linears between an embedding and a head."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(5, 4)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(4, 4), "mlp": nn.ModuleDict({"up": nn.Linear(4, 4)})})
            for _ in range(12)
        )
        self.lm_head = nn.Linear(4, 5)


def test_targets_are_names_a_regular_expression_or_all_linears():
    everything = [f"layers.{i}.{leaf}" for i in range(12) for leaf in ("q_proj", "mlp.up")]
    assert names("all-linear") == everything
    assert names(["q_proj", "lm_head"]) == [*everything[::2], "lm_head"]
    assert names(r"layers\.[01]\..*") == everything[:4] and names(r"layers\.1\.mlp\.up") == [
        "layers.1.mlp.up"
    ]
    assert names("all-linear", exclude=["up"]) == everything[::2]
    assert [t.path for t in find_targets(Mixed(), ".*", exclude=["emb"]).values()] == [
        "conv",
        "down",
        "mixer.out_proj",
    ], "parameters are not meant by a regular expression"
    assert names("all-linear", exclude=r".*q_proj|layers\.1\d.*") == everything[1:20:2]
    assert names("all-linear", layers=1) == everything[2:4]
    assert names(["up", "lm_head"], layers=[0, 11]) == ["layers.0.mlp.up", "layers.11.mlp.up"]
    assert names(["emb"]) == ["emb"] and names(["layers.1.q_proj"]) == ["layers.1.q_proj"]
    for arguments, words in (
        (
            {"targets": "q_proj"},
            r"target 'q_proj' matches no linear layer; .*, q_proj, up; for all layers whose",
        ),
        ({"targets": "(q_proj"}, r"targets '\(q_proj' is no regular expression"),
        (
            {"targets": ["k_proj"]},
            "target 'k_proj' matches no linear layer; .*: lm_head, q_proj, up",
        ),
        ({"targets": "all-linear", "exclude": ["k_proj"]}, "exclude 'k_proj' matches no linear layer"),
        ({"targets": ["up"], "exclude": ["up"]}, "no linear layer to adapt: targets is empty"),
        ({"targets": ["up"], "layers": [1, 12]}, r"there is no layer 12 to adapt; there are 0"),
        ({"targets": ["lm_head"], "layers": 0}, "there is no layer 0 to adapt; there are none"),
    ):
        with pytest.raises(rwkv_miss.UserError, match=words):
            names(**arguments)
    with pytest.raises(rwkv_miss.UserError, match=r"method state adapts no linear layers; drop the exclude"):
        rwkv_miss.inject(Deep(), "state", exclude=["up"])
    rwkv_miss.inject(model := Deep(), targets="all-linear", rank=2, rank_map={"layers.1": 3}, layers=[1, 2])
    assert [len(layer.miss) for layer in adapted_linears(model).values()] == [3, 3, 2, 2]
    assert model.injection.targets == ["all-linear"]


def test_a_lora_may_have_more_ranks_than_a_linear_has_outputs(tmp_path):
    for method in ("lora", "lora_fa", "dora"):
        model, base = mixed(method, targets=["down", "conv", "up"], rank=30)
        ids = torch.arange(20)[None]
        same_everywhere(train(model, ids), base, ids, tmp_path)


def test_a_weight_that_is_trained_with_its_adapter_is_in_the_file_as_a_whole(tmp_path):
    model, base = mixed("miss")
    for name in ("conv.weight", "experts.up"):
        dict(model.named_parameters())[name].requires_grad_(True)
    train(model, ids := torch.arange(20)[None])
    rwkv_miss.save_adapter(model, tmp_path / "a.pth")
    merged = rwkv_miss.read_metadata(tmp_path / "a.pth")["merged_linears"]
    assert merged == ["conv", *(f"experts.adapted.up.{i}" for i in range(3))]
    loaded = same_everywhere(model, base, ids, tmp_path)
    live = loaded(ids)
    rwkv_miss.merge(loaded)
    close("merged in memory", loaded(ids), live, 1e-5)


def test_a_read_weight_is_computed_once_a_forward_and_comes_back_after_an_error():
    model, _ = mixed("lora", targets=["up"])
    calls = []
    layer = model.experts.adapted["up"]["0"]
    layer.register_forward_hook(lambda *_: calls.append(1))
    model(torch.arange(4)[None])
    assert calls == [1]
    with pytest.raises(RuntimeError):
        model.experts(torch.ones(1, 3))
    assert not _CHANGED.of
    del layer.lora_B
    with pytest.raises(AttributeError, match="lora_B"):
        model.experts.up  # noqa: B018


def test_a_module_that_reads_a_weight_may_call_itself():
    class Twice(Experts):
        def forward(self, x, again=True):
            return super().forward(self(x, again=False) if again else x)

    model, x = Twice(), torch.randn(1, 8)
    want = model(x)
    rwkv_miss.inject(model, "lora", targets=["up", "mix"], rank=2)
    close("a fresh adapter", model(x), want, 1e-6)
    assert not _CHANGED.of


def test_a_thread_reads_no_weight_that_another_one_has_computed():
    both_begun, base_read, tuned_read = threading.Barrier(2, timeout=60), threading.Event(), threading.Event()

    class InTurn(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(8, 8))

        def forward(self, x, is_base):
            both_begun.wait()
            assert is_base or base_read.wait(60)
            y = x @ self.up.mT
            (base_read if is_base else tuned_read).set()
            assert tuned_read.wait(60)
            return y

    model, x = InTurn(), torch.randn(3, 8)
    want = x @ model.up.detach().mT
    rwkv_miss.inject(model, "lora", targets=["up"], rank=2)
    filled(model)
    with ThreadPoolExecutor(1) as pool:
        tuned = pool.submit(model, x, is_base=False)
        with rwkv_miss.disabled(model):
            close("base", model(x, is_base=True), want, 1e-6)
        assert not torch.allclose(tuned.result(), want, rtol=1e-3)


def test_weights_and_rows_are_changed_in_fp32_also_under_autocast():
    model, _ = mixed("lora", targets=["emb", "up"])
    filled(model)
    ids = torch.arange(20)
    rows, weight = model.emb(ids), model.experts.up
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.emb(ids), rows) and torch.equal(model.experts.up, weight)


def test_an_adapted_model_is_compiled_copied_and_pickled():
    model, _ = mixed()
    ids = torch.arange(20)[None]
    want = filled(model)(ids)
    for other in (
        torch.compile(model, backend="eager"),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
    ):
        assert torch.equal(other(ids), want)


def test_a_file_says_how_a_weight_is_stored(tmp_path):
    model, base = mixed("lora", targets=["conv", "up", "down"])
    with pytest.raises(rwkv_miss.UserError, match="conv.weight is stored as no linear's weight, and can't"):
        quantise_([model.conv], "int8")
    rwkv_miss.save_adapter(model, tmp_path / "a.pth")
    metadata = rwkv_miss.read_metadata(tmp_path / "a.pth")
    assert metadata["format_version"] == 2 and metadata["views"] == {
        "conv": {"key": "conv.weight", "transposed": True, "index": None, "lookup": False},
        **{
            f"experts.adapted.up.{i}": {"key": "experts.up", "transposed": False, "index": i, "lookup": False}
            for i in range(3)
        },
    }
    other = Mixed(is_transposed=True)
    with pytest.raises(rwkv_miss.UserError, match=r"weight of experts.adapted.up.0 is View\(.* there, and V"):
        rwkv_miss.load_adapter(other, tmp_path / "a.pth")
    assert not adapted_linears(other)
    few = dict(base.state_dict(), **{"experts.up": base.experts.up[:2]})
    rwkv_miss.write_checkpoint(tmp_path / "few.pth", few.items())
    with pytest.raises(rwkv_miss.UserError, match=r"experts.up of the base is \(2, 12, 8\).*more than 2"):
        rwkv_miss.merge_file(tmp_path / "few.pth", tmp_path / "a.pth", tmp_path / "m.pth")
    tensors = rwkv_miss.read_checkpoint(tmp_path / "a.pth")
    damaged = {**metadata, "views": {"conv": {**metadata["views"]["conv"], "transposed": 1}}}
    rwkv_miss.write_checkpoint(tmp_path / "d.pth", tensors.items(), damaged)
    with pytest.raises(rwkv_miss.UserError, match="is damaged: the view of conv is"):
        rwkv_miss.load_adapter(copy.deepcopy(base), tmp_path / "d.pth")
    rwkv_miss.write_checkpoint(tmp_path / "b.pth", base.state_dict().items())
    last = "experts.adapted.up.2"
    for change, words in (
        ({"index": -1}, f"the view of {last} is .*, expected .* an index of 0 or more"),
        ({"index": 1}, f"experts.adapted.up.1 and {last} are the same matrix of experts.up"),
        ({"key": "down.weight", "index": None}, f"down and {last} are the same matrix of down.weight"),
    ):
        views = {**metadata["views"], last: {**metadata["views"][last], **change}}
        rwkv_miss.write_checkpoint(tmp_path / "d.pth", tensors.items(), {**metadata, "views": views})
        with pytest.raises(rwkv_miss.UserError, match=f"is damaged: {words}"):
            rwkv_miss.merge_file(tmp_path / "b.pth", tmp_path / "d.pth", tmp_path / "m.pth")
