"""The library on models as other programs hold them: compiled, wrapped, sharded, in HF Trainer."""

import copy
import importlib.util
import types

import pytest
import torch
from torch import nn

import rwkv_miss
from rwkv_miss.adapter import METHODS, AdapterLinear, adapted_linears
from rwkv_miss.quantised import quantise_
from src.model.rwkv import RWKV

from .conftest import close, make_arch, random_tensors

needs_transformers = pytest.mark.skipif(
    not importlib.util.find_spec("transformers"), reason="the test extra is absent: pip install transformers"
)


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


SHARING = ["vera", "mos"]


def same_tensors(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


@pytest.mark.parametrize("method", SHARING)
@pytest.mark.parametrize("assign", [False, True])
def test_a_shared_tensor_stands_once_in_the_state_dict_and_stays_shared(method, assign):
    _, model = adapted(method, ["0", "2"])
    state = model.state_dict()
    shared = {key for layer in adapted_linears(model).values() for key in layer.shared}
    assert len({t.data_ptr() for t in state.values()}) == len(state)
    assert "2.vera_B" not in state and "2.mos_B" not in state
    _, other = adapted(method, ["0", "2"])
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    earlier = {  # with every layer's name, as it was before
        **state,
        **{f"2.{key}": getattr(model[2], key) for key in shared},
    }
    for checkpoint in (state, earlier):
        other.load_state_dict({name: t.clone() for name, t in checkpoint.items()}, strict=True, assign=assign)
        assert same_tensors(other.state_dict(), state)
        for key in shared:
            a, b = getattr(other[0], key), getattr(other[2], key)
            assert (a is b) == (getattr(model[0], key) is getattr(model[2], key))
    first = next(name for name in state if name.rpartition(".")[2] in shared)
    with pytest.raises(RuntimeError, match=f"Missing key.*{first}"):
        other.load_state_dict({name: t for name, t in state.items() if name != first}, strict=True)


@pytest.mark.parametrize("method", SHARING)
def test_a_shared_tensor_is_in_the_state_dict_where_its_first_layer_is_merged(method, tmp_path):
    _, model = adapted(method, ["0", "2"])
    model[0].weight.requires_grad_(True)
    rwkv_miss.save_adapter(model, tmp_path / "a.pth")
    loaded = small()
    rwkv_miss.load_adapter(loaded, tmp_path / "a.pth")
    key = adapted_linears(loaded)["2"].shared[0]
    assert f"2.{key}" in loaded.state_dict()


@needs_transformers
@pytest.mark.parametrize("method", SHARING)
def test_hf_trainer_writes_a_checkpoint_and_resumes_from_it(method, tmp_path):
    import transformers

    def trainer(steps):
        torch.manual_seed(0)
        sizes = dict(vocab_size=20, hidden_size=16, intermediate_size=20, num_hidden_layers=2)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2))
        rwkv_miss.inject(model, method, targets=["q_proj", "v_proj"], rank=4)
        rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 20, (8, 6))]
        settings = transformers.TrainingArguments(
            str(tmp_path),
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=2,
            learning_rate=0.1,
            lr_scheduler_type="constant",
            report_to=[],
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        return transformers.Trainer(model, settings, train_dataset=rows)

    (whole := trainer(4)).train()
    (resumed := trainer(4)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    state, want = resumed.model.state_dict(), whole.model.state_dict()
    assert state.keys() == want.keys() and same_tensors(state, want)


@pytest.mark.parametrize("method", ["miss", "mora", "dora"])
def test_a_compiler_with_dynamic_shapes_takes_the_operators(method):
    _, model = adapted(method)
    torch._dynamo.reset()
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend="aot_eager")
    trained = [p for p in model.parameters() if p.requires_grad]
    for length in (5, 9):
        x = torch.randn(length, 3, 12)
        got, want = (torch.autograd.grad(m(x).square().sum(), trained) for m in (compiled, model))
        for p, a, b in zip(trained, got, want, strict=True):
            close(f"gradient {tuple(p.shape)}", a, b, 1e-5)


class TorchaosWeight(torch.Tensor):
    """Two tensors as one, which multiplies as its dequantised self: as torchao's are made."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        if op is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(op)


def bitsandbytes_linear(kind, plain=None, **settings):
    linear = getattr(pytest.importorskip("bitsandbytes").nn, kind)(256, 64, **settings)
    linear.load_state_dict((plain or nn.Linear(256, 64)).state_dict())
    return linear


def torchao_linear(plain):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(plain, torchao.Int8WeightOnlyConfig())
    return plain


def unknown_linear():
    linear = nn.Linear(12, 8)
    codes = TorchaosWeight(torch.ones(8, 12, dtype=torch.int8), torch.ones(8, 1))
    linear.weight = nn.Parameter(codes, requires_grad=False)
    return linear


@pytest.mark.parametrize(
    "make,words",
    [
        (
            lambda: bitsandbytes_linear("Linear8bitLt"),
            r"bitsandbytes \(Int8Params\), and is not quantised yet",
        ),
        (lambda: bitsandbytes_linear("Linear4bit"), r"bitsandbytes \(Params4bit\), and is not quantised yet"),
        (unknown_linear, r"tests \(TorchaosWeight\), and can't be expanded"),
    ],
    ids=["bitsandbytes 8 bits", "bitsandbytes 4 bits", "an unknown package"],
)
def test_a_weight_that_is_not_to_be_expanded_is_refused_with_what_to_do(make, words):
    model = nn.Sequential(make(), nn.Linear(8, 8))
    with pytest.raises(
        rwkv_miss.UserError, match=f"0.weight is quantised by {words}.* rwkv_miss.quantised.quantise_"
    ):
        rwkv_miss.inject(model, targets=["0"], rank=2)
    rwkv_miss.inject(model, targets=["1"], rank=2)


QUANTISED_BY = {
    "bitsandbytes nf4": lambda plain: bitsandbytes_linear(
        "Linear4bit", plain, quant_type="nf4", compute_dtype=torch.float32
    ),
    "bitsandbytes nf4, scales as they are": lambda plain: bitsandbytes_linear(
        "Linear4bit", plain, quant_type="nf4", compute_dtype=torch.float32, compress_statistics=False
    ),
    "bitsandbytes int8": lambda plain: bitsandbytes_linear("Linear8bitLt", plain, has_fp16_weights=False),
    "torchao int8": torchao_linear,
}


@pytest.mark.parametrize("asked", [False, True], ids=["fresh", "after an answer"])
@pytest.mark.parametrize("method", ["miss", "dora", "vera"])
@pytest.mark.parametrize("package", QUANTISED_BY)
def test_an_adapter_on_a_weight_of_another_package_trains_as_on_its_values(package, method, asked, tmp_path):
    def quantised():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(256, 64), nn.Tanh(), nn.Linear(64, 8))
        model[0] = QUANTISED_BY[package](model[0])
        return model.to("cpu")  # bitsandbytes quantises here

    model, x = quantised(), torch.randn(5, 256)
    if asked:
        with torch.no_grad():
            model.eval()(x)
    rwkv_miss.inject(model, method, targets=["0"], rank=4)
    plain = nn.Sequential(nn.Linear(256, 64), nn.Tanh(), nn.Linear(64, 8))
    plain.load_state_dict(model.state_dict() | {"0.weight": model[0].base_weight()}, strict=False)
    rwkv_miss.inject(plain, method, targets=["0"], rank=4)
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if "weight" not in n}, strict=False)
    close("a fresh adapter", model.train()(x), quantised()(x), 0.01 if asked else 1e-5)
    for one in (model, plain):
        one.train()
        optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.3)
        for _ in range(3):
            optimizer.zero_grad()
            one(x).square().sum().backward()
            optimizer.step()
    with torch.no_grad():
        close("outputs", model(x), plain(x), 1e-5)
        assert (model(x) - quantised()(x)).abs().max() > 0.01
    rwkv_miss.save_adapter(model, tmp_path / "a.pth")
    if not asked:  # else bitsandbytes has rounded the scales
        loaded, copied = quantised(), copy.deepcopy(model)
        rwkv_miss.load_adapter(loaded, tmp_path / "a.pth")
        copied.load_state_dict(model.state_dict())
        assert torch.equal(loaded(x), model(x)) and torch.equal(copied(x), model(x))
        assert (quantised().state_dict().keys() - model.state_dict().keys()) == set()
        state = model.state_dict()
        for name in [name for name in state if "absmax" in name or "SCB" in name]:  # a scale of another base
            with pytest.raises(RuntimeError, match=f"Unexpected key.*{name}"):
                copied.load_state_dict({**state, name: state[name] + 1})
    with pytest.raises(rwkv_miss.UserError, match="0.weight is quantised; save the adapter and merge the"):
        rwkv_miss.merge(model)
    answer = quantised()(x)
    close("the base again", rwkv_miss.unload(model)(x), answer, 0.01 if asked else 1e-5)
    assert type(model[0]) is type(quantised()[0])
    with pytest.raises(rwkv_miss.UserError, match="PiSSA changes the frozen weight, which is quantised"):
        rwkv_miss.inject(quantised(), "pissa", targets=["0"], rank=4)


def test_a_linear_of_bitsandbytes_without_an_adapter_answers_as_before():
    """A first answer may pack it for the CPU; a state_dict() then leaves its scales in another order."""

    def linear():
        made = QUANTISED_BY["bitsandbytes nf4, scales as they are"](nn.Linear(256, 64))
        return nn.Sequential(made, nn.Linear(64, 256))

    model, x = nn.Sequential(linear(), linear()).to("cpu").eval(), torch.randn(5, 256)
    with torch.no_grad():
        before = model(x)
        rwkv_miss.inject(model, targets=["0.0"], rank=4)
        close("a fresh adapter", model(x), before, 0.01)
        close("in training", model.train()(x), before, 0.01)


def test_the_quantisation_that_is_named_instead_trains():
    model = small()
    rwkv_miss.inject(model, targets=["0", "2"], rank=2)
    quantise_(adapted_linears(model).values(), "int8")
    model(torch.randn(3, 12)).square().sum().backward()
    assert model[0].miss.grad.abs().max() > 0


@needs_transformers
@pytest.mark.parametrize("kind,target", [("Mamba", "dt_proj"), ("Mamba", "out_proj"), ("Mamba2", "out_proj")])
def test_linears_that_transformers_reads_and_does_not_call_have_their_adapter_in_the_weight(kind, target):
    import transformers

    sizes = dict(vocab_size=20, hidden_size=16, num_hidden_layers=1, state_size=4)
    if kind == "Mamba2":
        sizes |= dict(num_heads=4, head_dim=8, n_groups=1)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes))
    rwkv_miss.inject(model, "lora", targets=[target], rank=2)
    [(name, layer)] = adapted_linears(model).items()
    nn.init.normal_(layer.lora_B)
    ids, linear = torch.arange(7)[None], getattr(model.backbone.layers[0].mixer, target)
    assert name.endswith(f"mixer.{target}.adapted.weight")
    assert torch.equal(linear.weight, layer.stored + layer.delta())
    model(ids).logits.sum().backward()
    assert layer.lora_A.grad.abs().max() > 0


def test_a_model_without_values_takes_no_adapter(tmp_path):
    _, model = adapted()
    rwkv_miss.save_adapter(model, tmp_path / "a.pth")
    empty = small().to("meta")
    with pytest.raises(rwkv_miss.UserError, match="0.weight is on the meta device.*load_state_dict"):
        rwkv_miss.load_adapter(empty, tmp_path / "a.pth")
    assert not adapted_linears(empty)
    empty.load_state_dict(small().state_dict(), assign=True)
    rwkv_miss.load_adapter(empty, tmp_path / "a.pth")
    assert torch.equal(empty[0].miss, model[0].miss)


@pytest.mark.parametrize("field", ["method", "linears", "base_fingerprint", "tied"])
def test_a_field_of_the_file_is_not_overwritten(field, tmp_path):
    _, model = adapted()
    with pytest.raises(rwkv_miss.UserError, match=rf"save_adapter\(..., {field}=...\) would overwrite"):
        rwkv_miss.save_adapter(model, tmp_path / "a.pth", **{field: "mine"})
    rwkv_miss.save_adapter(model, tmp_path / "a.pth", step=3, versions={"mine": "1"})
    metadata = rwkv_miss.read_metadata(tmp_path / "a.pth")
    assert (metadata["step"], metadata["versions"]) == (3, {"mine": "1"})


def test_pefts_word_for_targets_is_translated():
    with pytest.raises(
        rwkv_miss.UserError, match=r"target_modules is peft's word; .*inject\(..., targets=\[...\]\)"
    ):
        rwkv_miss.inject(small(), "lora", target_modules=["0"], r=2)


def test_a_merge_into_another_model_names_what_it_has_seen(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    base, model = adapted()
    rwkv_miss.save_adapter(model, tmp_path / "a.pth")
    safetensors.save_file(base.state_dict(), tmp_path / "base.safetensors")
    report = rwkv_miss.merge_file(tmp_path / "base.safetensors", tmp_path / "a.pth", tmp_path / "merged.pth")
    [note] = report.notes()
    assert "RWKV" not in note and "a plain .pth with the base's names, such as 0." in note


def test_lora_plus_needs_no_train_py():
    _, model = adapted("lora", lora_plus=16)
    model[0].bias.requires_grad_(True)
    groups = rwkv_miss.parameter_groups(DistributedDataParallel(model), lr=0.01, weight_decay=0.1)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    want = {"lora_A": (0.01, 0.1), "lora_B": (0.16, 0.1), "bias": (0.01, 0.0)}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert found == {id(p): want[name.rpartition(".")[2]] for name, p in trained.items()}
    torch.optim.AdamW(groups).step()
    halves = rwkv_miss.parameter_groups(model, lambda name: 0.5 if name.startswith("2.") else 1.0)
    assert sorted(group["lr"] for group in halves) == [0.5, 1.0, 8.0, 16.0]


def test_what_zero_3_has_shared_out_is_neither_saved_nor_loaded(tmp_path):
    _, model = adapted()
    rwkv_miss.save_adapter(model, tmp_path / "a.pth")
    whole = model[2].miss.data
    model[2].miss.ds_id, model[2].miss.data = 3, torch.empty(0)  # as DeepSpeed leaves a parameter
    for call in (rwkv_miss.save_adapter, rwkv_miss.load_adapter):
        with pytest.raises(rwkv_miss.UserError, match="2.miss is shared out by ZeRO-3.*GatheredParameters"):
            call(DeepSpeedEngine(model), tmp_path / "a.pth")
    model[2].miss.data = whole
    rwkv_miss.save_adapter(DeepSpeedEngine(model), tmp_path / "a.pth")


def llama():
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=20, hidden_size=16, intermediate_size=20, num_hidden_layers=2)
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, attn_implementation="eager")
    return transformers.LlamaForCausalLM(config), ["q_proj", "v_proj", "down_proj"], ids_of(20)


def rwkv(version):
    arch = make_arch(version)
    model = RWKV(arch, "reference")
    model.load_state_dict(random_tensors(arch))
    return model, None, ids_of(67)


def ids_of(vocabulary):
    return torch.randint(vocabulary, (3, 5))


FOLLOWED = {
    "plain": lambda: (small(), ["0", "2"], torch.randn(3, 5, 12, dtype=torch.float64)),
    "llama": llama,
    "rwkv6": lambda: rwkv(6),
    "rwkv7": lambda: rwkv(7),
}
FOLLOWED_CASES = [
    *(("plain", method, {}) for method in METHODS if METHODS[method].adapts_linears),
    ("plain", "bat", {"order": "row"}),
    ("plain", "lora", {"alpha": 2.0}),
    *(
        ("plain", "miss", options)
        for options in (
            {"layout": "contiguous", "rank": 5},
            {"shards": "balanced", "scale": "sqrt", "mini_r": 4},
            {"magnitude": True},
            {"expand": True},
        )
    ),
    ("llama", "miss", {}),
    ("rwkv6", "miss", {}),
    ("rwkv7", "miss", {}),
    ("rwkv7", "state", {}),
]


@pytest.mark.parametrize("kind,method,options", FOLLOWED_CASES)
def test_torch_func_and_second_derivatives_are_those_of_the_weight_with_its_change(kind, method, options):
    torch.manual_seed(0)
    model, targets, x = FOLLOWED[kind]()
    options = {} if method == "state" else {"rank": 2} | options
    rwkv_miss.inject(model.double(), method, targets=targets, **options)
    params = {n: p for n, p in model.double().named_parameters() if p.requires_grad}
    with torch.no_grad():
        for p in params.values():
            p.add_(0.1 * torch.randn_like(p))
    vectors = {name: torch.randn_like(p) for name, p in params.items()}

    def loss(params, x):
        y = torch.func.functional_call(model, params, (x if x.dim() > 1 else x[None],))
        return (y if kind == "plain" else y[0]).tanh().pow(3).mean()

    def tensors(gradients):
        return torch.cat([g.flatten() for g in gradients])

    def second_derivative():
        first = torch.autograd.grad(loss(params, x), params.values(), create_graph=True)
        return tensors(first), tensors(torch.autograd.grad(first, params.values(), vectors.values()))

    gradient, product = second_derivative()
    first = tensors(torch.autograd.grad(loss(params, x), params.values()))
    still = {name: p.detach() for name, p in params.items()}
    by_rows = torch.func.vmap(torch.func.grad(loss), (None, 0))(still, x)
    rows = [torch.autograd.grad(loss(params, row), params.values()) for row in x]
    of_rows = torch.func.grad(lambda p: loss(p, x))
    pairs = {
        "create_graph": (gradient, first),
        "grad": (tensors(of_rows(still).values()), first),
        "vmap of grad": (tensors(by_rows.values()), tensors(map(torch.stack, zip(*rows, strict=True)))),
        "jvp of grad": (tensors(torch.func.jvp(of_rows, (still,), (vectors,))[1].values()), product),
        "vjp of grad": (tensors(torch.func.vjp(of_rows, still)[1](vectors)[0].values()), product),
    }
    for layer in adapted_linears(model).values():
        layer.forward = types.MethodType(AdapterLinear.forward, layer)
    exact, exact_product = second_derivative()
    pairs |= {"gradient": (first, exact), "product with the Hessian": (product, exact_product)}
    for name, (got, want) in pairs.items():
        close(name, got, want, 1e-6 if kind == "llama" else 1e-10)  # Llama's norm computes in fp32


@pytest.mark.parametrize("version", [6, 7])
def test_a_native_kernel_is_followed_by_torch_func_and_refuses_a_second_derivative(version):
    model, _, ids = rwkv(version)
    model.set_kernel("cpu")
    rwkv_miss.inject(model, rank=4)
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def loss(params):
        return torch.func.functional_call(model, params, (ids,))[0].square().mean()

    want = torch.autograd.grad(loss(params), params.values())
    for got, one in zip(torch.func.grad(loss)(params).values(), want, strict=True):
        close("gradient", got, one, 1e-4)
    with pytest.raises(RuntimeError, match=r"native kernels have none; call model.set_kernel\('torch'\)"):
        torch.autograd.grad(loss(params), params.values(), create_graph=True)
