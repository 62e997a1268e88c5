"""Every registered method keeps the same promises; MiSS and LoRA also agree with HF peft and with float64
formulas.
"""

import copy
import dataclasses
import functools
import math
import pickle
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import rwkv_miss
from rwkv_miss import functional
from rwkv_miss.adapter import METHODS, AdapterLinear, adapted_linears, has_factors, register
from rwkv_miss.adapter_file import adapter_tensors, by_owner, layer_tensors
from rwkv_miss.functional import add_expanded_, expanded, shard_index, shard_sum
from rwkv_miss.methods.lora import LoraLinear
from rwkv_miss.quantised import quantise_
from src.model import RWKV

from .conftest import close, make_arch, random_tensors

# every method that adapts linears, also with those options that make another layer of it; the method state
# has tests of its own
CASES = [
    ("miss", {}),
    ("miss", {"layout": "contiguous"}),
    ("miss", {"shards": "balanced"}),
    ("miss", {"layout": "contiguous", "shards": "balanced"}),
    ("miss", {"scale": "sqrt"}),
    ("miss", {"mini_r": 2, "shards": "balanced", "scale": "sqrt"}),
    ("miss", {"magnitude": True}),
    ("miss", {"magnitude": True, "shards": "balanced", "scale": "sqrt", "layout": "contiguous"}),
    ("miss", {"magnitude": True, "shards": "balanced", "mini_r": 2}),
    ("miss", {"expand": True}),
    ("lora", {}),
    ("lora", {"alpha": 5.0}),
    ("lora", {"rslora": True}),
    ("lora_fa", {}),
    ("dora", {}),
    ("adalora", {}),
    ("adalora", {"rslora": True}),
    ("pissa", {}),
    ("pissa", {"niter": 0, "alpha": 5.0}),
    ("mora", {}),
    ("vera", {}),
    ("vera", {"d_initial": 0.5}),
    ("bat", {}),
    ("bat", {"order": "row"}),
    ("prolora", {"unshared": 0}),
    ("prolora", {"alpha": 3.0, "shares": 3}),
    ("mos", {}),
    ("mos", {"shards": 3, "budget": 1}),
]
LINEAR = [name for name, method in METHODS.items() if method.adapts_linears]
CASES += [(name, {}) for name in LINEAR if name not in {method for method, _ in CASES}]
# a fresh adapter changes no bit of the output; these round on the way
ROUNDS = {"pissa"}
# trained numbers of a linear (out d, in k), rank r, where they are not About.numbers of the method; tensors
# that layers share are counted in tests of their own
COUNTS = {
    "miss": lambda d, k, r, shards="plain", mini_r=0, magnitude=False, expand=False, **options: (
        (r + (shards == "balanced")) * (k if expand else mini_r or d) + magnitude * d
    ),
    "adalora": lambda d, k, r, init_rank=12, **options: init_rank * (d + k + 1),
    "prolora": lambda d, k, r, unshared=1, shares=4, **options: (
        unshared * (d + k) + (r - unshared) * (-(-d // shares) - (-k // shares))
    ),
    "mos": lambda d, k, r, **options: 0,
    "bat": lambda d, k, r, order="col": r * (d if order == "col" else k),
}
WIDTHS = [(48, 40, 8), (48, 40, 7), (40, 48, 40), (50, 30, 16), (64, 64, 1), (10, 12, 9)]  # in, out, rank

each_case = pytest.mark.parametrize(
    "method,options",
    CASES,
    ids=[
        f"{m}-{'-'.join(str(v) if isinstance(v, str) else k for k, v in o.items())}".strip("-")
        for m, o in CASES
    ],
)


def trained_numbers(method, d, k, r, **options):
    """Count by COUNTS, or by the formula in docs/methods.md: "r (d + k)^2" is r * (d + k) ** 2."""
    if method in COUNTS:
        return COUNTS[method](d, k, r, **options)
    formula = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", METHODS[method].about.numbers).replace("^", "**")
    return eval(formula, {"floor": math.floor, "sqrt": math.sqrt, "min": min}, {"d": d, "k": k, "r": r})


def fitting(method, options, rank, width=16, out=16):
    """A rank like `rank` that a method takes on a linear of these widths; those of the models here are
    multiples of 16.
    """
    if issubclass(METHODS[method], LoraLinear) or options.get("expand"):
        return min(rank, width, out)
    if method == "mora":
        return min(rank, min(width, out) ** 2 // (width + out))
    if method == "bat":
        return math.gcd(2 ** round(math.log2(rank)), width, out)
    return rank


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_what_it_is(name):
    """The method's rows in docs/methods.md are made of this."""
    method = METHODS[name]
    assert "about" in vars(method) and method.about.title and method.about.change and method.about.start
    for field in dataclasses.fields(method.Options):
        assert field.name in ("rank", "rank_map") or field.metadata["meaning"], field.name


def filled(model, seed=1):
    """Give every adapter tensor a non-trivial value."""
    generator = torch.Generator().manual_seed(seed)
    new = {
        name: 0.1 * torch.randn(t.shape, generator=generator) if t.is_floating_point() else t
        for name, t in adapter_tensors(model).items()
    }
    owned = by_owner(new)
    for name, layer in adapted_linears(model).items():
        layer.load(layer_tensors(type(layer), name, (layer.out_features, layer.in_features), owned))
    return model


def rwkv(version=7, **sizes):
    model = RWKV(make_arch(version, **sizes))
    model.load_state_dict(random_tensors(model.arch))
    return model


def unchanged(method, options, got, want):
    if method not in ROUNDS and not options.get("magnitude"):
        assert torch.equal(got, want)
    else:
        close("logits", got, want, 1e-5)  # a model of four layers in fp32


@each_case
@pytest.mark.parametrize("version", [6, 7])
def test_a_fresh_adapter_changes_nothing_and_only_it_is_trained(method, options, version):
    model = rwkv(version)
    ids = torch.arange(11)[None]
    before, keys = model(ids)[0], set(model.state_dict())
    shapes = {
        name: linear.weight.shape
        for name, linear in rwkv_miss.target_checks.find_targets(model, None).items()
    }
    report = rwkv_miss.inject(model, method, rank=8, **options)
    unchanged(method, options, model(ids)[0], before)
    assert keys < set(model.state_dict()), "an adapter adds keys and moves none"
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {id(p) for p in trained.values()} == {
        id(t) for t in adapter_tensors(model).values() if t.requires_grad
    }
    assert not trained.keys() & keys
    assert all(p.dtype == torch.float32 for p in trained.values())
    assert list(shapes) == report.linears and len(shapes) == {6: 16, 7: 12}[version]
    shared = sum(
        t.numel()
        for name, t in adapter_tensors(model).items()
        if name.startswith("shared.") and t.requires_grad
    )
    assert report.trainable - shared == sum(
        trained_numbers(method, *shape, 8, **options) for shape in shapes.values()
    )


@each_case
@pytest.mark.parametrize("version", [6, 7])
def test_a_disabled_adapter_leaves_the_base(method, options, version):
    model = rwkv(version)
    ids = torch.arange(11)[None]
    base = model(ids)[0]
    rwkv_miss.inject(model, method, rank=8, **options)
    tuned = filled(model)(ids)[0]
    assert not torch.allclose(tuned, base, rtol=1e-3)
    with pytest.raises(ZeroDivisionError), rwkv_miss.disabled(model):
        with rwkv_miss.disabled(model):
            unchanged(method, options, model(ids)[0], base)
        unchanged(method, options, model(ids)[0], base)
        raise ZeroDivisionError
    assert torch.equal(model(ids)[0], tuned)
    assert not any("forward" in layer.__dict__ for layer in adapted_linears(model).values())


def in_another_thread(function):
    """Return the result of a function, called in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def adapted_pair(method="pissa"):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    rwkv_miss.inject(model, method, targets=["0", "1"], rank=2)
    return filled(model)


def test_a_disabled_adapter_is_off_in_its_own_thread_only():
    model, x = adapted_pair(), torch.randn(3, 8)
    tuned = model(x)
    entered, left = threading.Event(), threading.Event()

    def longer_block():
        with rwkv_miss.disabled(model):
            entered.set()
            assert left.wait(60)
            return model(x)

    with ThreadPoolExecutor(1) as pool:
        with rwkv_miss.disabled(model):
            base = model(x)
            assert not torch.allclose(base, tuned, rtol=1e-3)
            assert torch.equal(in_another_thread(lambda: model(x)), tuned)
            copied = in_another_thread(lambda: pickle.loads(pickle.dumps(copy.deepcopy(model))))
            others = pool.submit(longer_block)
            assert entered.wait(60)
        assert torch.equal(model(x), tuned) and torch.equal(copied(x), tuned)
        left.set()
        assert torch.equal(others.result(), base)
    assert torch.equal(model(x), tuned)
    assert not any("forward" in layer.__dict__ for layer in adapted_linears(model).values())


def test_whole_tensors_come_back_after_blocks_that_overlap():
    model = rwkv()
    rwkv_miss.inject(model, "miss", rank=8, train_parts="ln")
    trained = model.ln_out.weight
    first, second = rwkv_miss.disabled(model), rwkv_miss.disabled(model)
    first.__enter__()
    in_another_thread(second.__enter__)
    first.__exit__(None, None, None)
    assert model.ln_out.weight is not trained
    second.__exit__(None, None, None)
    assert model.ln_out.weight is trained


def test_a_backward_in_other_threads_computes_disabled_layers_again():
    """Deep in a backward torch goes on in a thread of its own, as it does for a GPU."""
    model, seen = adapted_pair(), set()
    model[0].register_forward_hook(lambda *_: seen.add(threading.get_ident()))
    x = torch.randn(3, 8, requires_grad=True)
    nested = model
    for _ in range(65):
        nested = functools.partial(checkpoint, nested, use_reentrant=True, preserve_rng_state=False)
    with rwkv_miss.disabled(model):
        want = torch.autograd.grad(model(x).sum(), x)[0]
        nested(x).sum().backward()
    assert len(seen) > 1 and torch.equal(x.grad, want)


def test_a_replica_does_what_its_layer_did_where_it_was_made():
    """DataParallel makes replicas in its caller's thread, and runs each in one of its own."""
    model, x = adapted_pair("lora"), torch.randn(3, 8)

    def replica():
        made = model[0]._replicate_for_data_parallel()
        for name, p in model[0].named_parameters():
            setattr(made, name, torch.zeros_like(p) if name in ("weight", "bias") else p.detach())
        return made

    with rwkv_miss.disabled(model):
        off, on = replica(), in_another_thread(replica)
        assert not in_another_thread(lambda: off(x)).any() and in_another_thread(lambda: on(x)).any()
    rwkv_miss.merge(model.eval())
    assert not replica()(x).any()


def test_a_compiled_model_is_one_graph_in_a_disabled_block_too():
    model, x = adapted_pair("miss"), torch.randn(3, 8)
    tuned = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for _ in range(2):
        close("enabled", compiled(x), tuned, 1e-6)
        with rwkv_miss.disabled(model):
            base = model(x)
            close("disabled", compiled(x), base, 1e-6)
            close("elsewhere", in_another_thread(lambda: compiled(x)), tuned, 1e-6)
    close("enabled again", compiled(x), tuned, 1e-6)


@each_case
@pytest.mark.parametrize("width,out,rank", WIDTHS)
def test_two_factors_are_the_change_of_the_weight(method, options, width, out, rank):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, out)).double()
    rwkv_miss.inject(model, method, targets=["0"], rank=fitting(method, options, rank, width, out), **options)
    filled(model.double())
    factors = model[0].low_rank()
    if "magnitude" in model[0].own_tensors() or not has_factors(METHODS[method]):
        assert factors is None
        return
    A, B = factors
    assert A.shape == (len(A), width) and B.shape == (out, len(A))
    close("B A", B @ A, model[0].delta(), 1e-12)


def test_what_cannot_be_disabled_is_said():
    model = rwkv()
    with pytest.raises(rwkv_miss.UserError, match="has none"), rwkv_miss.disabled(model):
        pass
    rwkv_miss.inject(model, "miss", rank=8)
    model.ln_out.requires_grad_(True)
    with pytest.raises(rwkv_miss.UserError, match="trains ln_out.bias, too"), rwkv_miss.disabled(model):
        pass


@each_case
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width,out,rank", WIDTHS)
def test_forward_and_gradients_are_those_of_the_merged_weight_in_float64(
    method, options, bias, width, out, rank
):
    rank = fitting(method, options, rank, width, out)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, out, bias=bias)).double()
    rwkv_miss.inject(model, method, targets=["0"], rank=rank, **options)
    filled(model.double())
    layer = model[0]
    x = torch.randn(2, 5, width, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 5, out, dtype=torch.float64)
    trained = {name: t for name, t in layer.own_tensors().items() if t.requires_grad}
    parameters = list(trained.values())
    got = torch.autograd.grad(layer(x), [x, *parameters], dy)
    # the base class's forward is the definition: x (W + delta)^T + bias
    y = AdapterLinear.forward(layer, x)
    want = torch.autograd.grad(y, [x, *parameters], dy)
    close("y", layer(x), y, 1e-12)
    for name, mine, theirs in zip(["dx", *trained], got, want, strict=True):
        close(name, mine, theirs, 1e-12)


@pytest.mark.parametrize("options", [{}, {"layout": "contiguous"}, {"shards": "balanced", "scale": "sqrt"}])
@pytest.mark.parametrize("width,out,rank", WIDTHS)
def test_a_gpus_gradient_of_the_input_is_the_same(monkeypatch, options, width, out, rank):
    """There the product adds to what the shards give, instead of the other way round."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, out)).double()
    rwkv_miss.inject(model, "miss", targets=["0"], rank=rank, **options)
    filled(model.double())
    x = torch.randn(3, width, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(3, out, dtype=torch.float64)
    (want,) = torch.autograd.grad(model(x), x, dy)
    monkeypatch.setattr("rwkv_miss.functional.sums_go_on", lambda device: True)
    monkeypatch.setattr("rwkv_miss.functional.add_expanded_", None)
    close("dx", torch.autograd.grad(model(x), x, dy)[0], want, 1e-12)


@each_case
def test_trained_bias_and_weight_get_their_gradients(method, options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10)).double()
    rwkv_miss.inject(model, method, targets=["0"], rank=fitting(method, options, 5, 12, 10), **options)
    filled(model.double())
    layer = model[0].requires_grad_(True)
    x = torch.randn(4, 12, dtype=torch.float64)
    got = torch.autograd.grad(layer(x).square().sum(), [layer.weight, layer.bias])
    want = torch.autograd.grad(AdapterLinear.forward(layer, x).square().sum(), [layer.weight, layer.bias])
    for name, mine, theirs in zip(("weight", "bias"), got, want, strict=True):
        close(name, mine, theirs, 1e-12)


@each_case
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_base_is_that_of_its_codes(method, options, kind):
    """But for the norms of a magnitude, which are those of the base file's weight, as in the merged file."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 20))
    rwkv_miss.inject(model, method, targets=["0"], rank=fitting(method, options, 5, 70, 20), **options)
    quantise_([filled(model)[0]], kind)
    x, dy = torch.randn(7, 70, requires_grad=True), torch.randn(7, 20)
    trained = {name: t for name, t in model[0].own_tensors().items() if t.requires_grad}
    y, want = model(x), AdapterLinear.forward(model[0], x)
    got = torch.autograd.grad(y, [x, *trained.values()], dy)
    for name, mine, theirs in zip(
        ["y", "dx", *trained],
        (y, *got),
        (want, *torch.autograd.grad(want, [x, *trained.values()], dy)),
        strict=True,
    ):
        close(name, mine, theirs, 5e-2 if options.get("magnitude") or method == "dora" else 2e-6)


@pytest.mark.parametrize("width,rank", [(48, 8), (50, 16), (7, 7), (5, 1)])
@pytest.mark.parametrize("contiguous", [False, True])
def test_shard_sum_is_the_product_with_the_shard_index(width, rank, contiguous):
    x = torch.randn(3, width, dtype=torch.float64)
    index = shard_index(width, rank, contiguous)
    want = torch.zeros(3, rank, dtype=torch.float64).index_add(1, index, x)
    close("S", shard_sum(x, rank, contiguous), want, 1e-14)
    if not contiguous:
        assert index.tolist() == [i % rank for i in range(width)]


def test_shard_sums_that_x_carries_are_used_and_have_their_gradient():
    shapes = (2, 3, 20), (6, 20), (8, 6), (2, 3, 6)
    x, W, D, dy = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    leaves = [x.requires_grad_(), D.requires_grad_()]
    y = functional.miss_linear(x, W, None, D)
    want = [y, *torch.autograd.grad(y, leaves, dy)]
    sums = shard_sum(x, 8)
    y = functional.miss_linear(functional.with_shard_sums(x.clone(), sums), W, None, D)
    got = [y, *torch.autograd.grad(y, leaves, dy, retain_graph=True)]
    for mine, exact in zip(got, want, strict=True):
        close("carried sums", mine, exact, 1e-14)
    (ds,) = torch.autograd.grad(y, [sums], dy)
    close("gradient of the sums", ds, dy @ D.t(), 1e-14)
    functional.with_shard_sums(x, torch.zeros(2, 3, 4))  # sums of another rank
    assert torch.equal(functional.miss_linear(x, W, None, D), want[0])


@pytest.mark.parametrize("width,rank", [(48, 8), (50, 16), (48, 40), (7, 7), (5, 1)])
@pytest.mark.parametrize("contiguous", [False, True])
def test_balanced_shards_have_alternating_signs_and_a_row_for_the_mean(width, rank, contiguous):
    """The projection P written out: shards of ones and minus ones in turn, then a row of 1 / sqrt(in)."""
    P = torch.zeros(rank + 1, width, dtype=torch.float64)
    for column in range(width):
        size = -(-width // rank)
        shard, place = (column // size, column % size) if contiguous else (column % rank, column // rank)
        P[shard, column] = (-1) ** place
    P[rank] = width**-0.5
    x, ds = torch.randn(3, width, dtype=torch.float64), torch.randn(4, rank + 1, dtype=torch.float64)
    close("S", shard_sum(x, rank, contiguous, True), x @ P.t(), 1e-13)
    dx = torch.ones(4, width, dtype=torch.float64)
    add_expanded_(dx, ds, contiguous, True)
    close("dx", dx, 1 + ds @ P, 1e-13)
    close("written", expanded(ds, width, contiguous, True), ds @ P, 1e-13)


def test_the_contiguous_layout_is_another_model():
    model = nn.Sequential(nn.Linear(50, 30, bias=False))
    rwkv_miss.inject(model, "miss", targets=["0"], rank=16, layout="contiguous")
    delta = filled(model)[0].delta()
    assert torch.equal(delta[:, 0], delta[:, 3]) and not torch.equal(delta[:, 0], delta[:, 16])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_methods_keep_for_the_backward(dtype):
    """MiSS the shard sums, LoRA its input and the products with A, LoRA-FA these alone; dropout adds one
    number, its seed. Beside them their factors as they were multiplied, where these are no parameters.
    """
    half = dtype != torch.float32
    D, A, scaled_B = half * 8 * 40, half * 8 * 48, 40 * 8
    torch.manual_seed(0)
    for method, options, expected in (
        ("miss", {}, 15 * 8 + D),
        ("miss", {"shards": "balanced"}, 15 * 9 + half * 9 * 40),
        ("lora", {}, 15 * 48 + 15 * 8 + A + scaled_B),
        ("lora", {"dropout": 0.1}, 15 * 48 + 15 * 8 + 1 + A + scaled_B),
        ("lora_fa", {}, 15 * 8 + A + scaled_B),
        ("lora_fa", {"dropout": 0.1}, 15 * 8 + 1 + A + scaled_B),
    ):
        model = nn.Sequential(nn.Linear(48, 40, bias=False)).to(dtype)
        rwkv_miss.inject(model, method, targets=["0"], rank=8, **options)
        parameters = {t.data_ptr() for t in [*model.parameters(), *model.buffers()]}
        saved = []
        x = torch.randn(3, 5, 48, dtype=dtype, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t) or t, lambda t: t
        ):
            y = model(x)
        kept = [t for t in saved if t.data_ptr() not in parameters]
        assert sum(t.numel() for t in kept) == expected, [tuple(t.shape) for t in kept]
        assert all(t.dtype == dtype for t in kept if t.dim())
        y.float().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("width,out,rank", WIDTHS)
def test_miss_equals_hf_peft_in_fp32(width, out, rank):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(width, out))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.MissConfig(r=rank, target_modules=["0"]))
    rwkv_miss.inject(base, "miss", targets=["0"], rank=rank)
    filled(base)
    block = theirs.base_model.model[0].miss_block["default"]
    block.data.copy_(base[0].miss)
    x = torch.randn(7, width, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    ours, other = base(x), theirs(y)
    ours.square().sum().backward()
    other.square().sum().backward()
    # both are the same products in fp32; only the order of the sums may differ
    for name, mine, want in (
        ("y", ours, other),
        ("dD", base[0].miss.grad, block.grad),
        ("dx", x.grad, y.grad),
    ):
        close(name, mine, want, 2e-6)
    merged = theirs.merge_and_unload()[0].weight
    close("merged", base[0].weight + base[0].delta(), merged, 1e-6)


@pytest.mark.parametrize("width,out,rank", [(48, 40, 4), (50, 30, 7)])
def test_lora_equals_hf_peft_in_fp32(width, out, rank):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(width, out))
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=["0"])
    )
    rwkv_miss.inject(base, "lora", targets=["0"], rank=rank, alpha=3.0 * rank)
    filled(base)
    lora = theirs.base_model.model[0]
    lora.lora_A["default"].weight.data.copy_(base[0].lora_A)
    lora.lora_B["default"].weight.data.copy_(base[0].lora_B)
    x = torch.randn(7, width, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    base(x).square().sum().backward()
    theirs(y).square().sum().backward()
    close("y", base(x), theirs(y), 2e-6)
    close("dA", base[0].lora_A.grad, lora.lora_A["default"].weight.grad, 2e-6)
    close("dB", base[0].lora_B.grad, lora.lora_B["default"].weight.grad, 2e-6)
    close("dx", x.grad, y.grad, 2e-6)


FACTORS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
# kind of golden -> method, its options for a golden of this rank, our tensors' names -> peft's
GOLDENS = {
    "miss": ("miss", lambda g, rank: {}, {"miss": "miss_block"}),
    "mini": ("miss", lambda g, rank: {"mini_r": g["params"]["miss_block"].shape[1]}, {"miss": "miss_block"}),
    "bat": ("bat", lambda g, rank: {}, {"bat": "miss_block"}),
    "vera": (
        "vera",
        lambda g, rank: {},
        {name: name for name in ("vera_lambda_d", "vera_lambda_b", "vera_A", "vera_B")},
    ),
    "lora": ("lora", lambda g, rank: {"alpha": rank * g["scaling"]}, FACTORS),
    # peft's factor is alpha / (init_rank + 1e-5)
    "adalora": (
        "adalora",
        lambda g, rank: {"init_rank": rank, "alpha": rank * g["scaling"] / (rank + 1e-5)},
        {"lora_A": "lora_A", "lora_B": "lora_B", "lora_E": "lora_E"},
    ),
    "dora": (
        "dora",
        lambda g, rank: {"alpha": rank * g["scaling"]},
        FACTORS | {"magnitude": "lora_magnitude_vector.weight"},
    ),
    "pissa": ("pissa", lambda g, rank: {"niter": 0}, FACTORS),
    "rslora": ("lora", lambda g, rank: {"alpha": rank**0.5 * g["scaling"], "rslora": True}, FACTORS),
}


@pytest.mark.parametrize("dtype,ratio", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_golden_layers_of_hf_peft(data_dir, dtype, ratio):
    """Float64 vectors of single adapted linears (peft 0.21.2), rank dividing the width or not."""
    seen = set()
    for name, g in torch.load(data_dir / "golden/peft.golden.pt", weights_only=True).items():
        if name.split()[0] not in GOLDENS:
            continue
        method, options, names = GOLDENS[name.split()[0]]
        out, width = g["W"].shape
        model = nn.Sequential(nn.Linear(width, out, bias="bias" in g)).to(dtype)
        weight, initial = g["W"], {}
        if method == "pissa":  # whose residual peft computes in fp32
            initial = {"initial_A": g["init"]["lora_A.weight"], "initial_B": g["init"]["lora_B.weight"]}
            close("base", g["base_weight"] + initial["initial_B"] @ initial["initial_A"], weight, 1e-7)
            weight = g["base_weight"] + initial["initial_B"] @ initial["initial_A"]
        model[0].weight.data.copy_(weight)
        if "bias" in g:
            model[0].bias.data.copy_(g["bias"])
        rank = int(re.search(r"\br=(\d+)", name)[1])
        rwkv_miss.inject(model, method, targets=["0"], rank=rank, **options(g, rank))
        layer = model.to(dtype)[0]
        tensors = g["params"] | g["frozen"]
        layer.load(
            {
                **layer.own_tensors(),
                **initial,
                **{ours: tensors[theirs].squeeze(-1) for ours, theirs in names.items()},
            }
        )
        close(f"{name} frozen weight", layer.weight, g["base_weight"], ratio)
        x = g["x"].to(dtype).requires_grad_()
        y = model(x)
        y.backward(g["dy"].to(dtype))
        close(f"{name} y", y, g["y"], ratio)
        close(f"{name} dx", x.grad, g["dx"], ratio)
        close(f"{name} merged", layer.base_weight() + layer.delta(), g["merged"], ratio)
        for ours, theirs in names.items():
            if theirs in g["grads"]:
                close(f"{name} d{ours}", getattr(layer, ours).grad, g["grads"][theirs].squeeze(-1), ratio)
        seen.add(name.split()[0])
    assert seen == GOLDENS.keys()


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("method", ["miss", "lora"])
def test_golden_adapters_on_the_whole_model(data_dir, version, method):
    name = f"golden/rwkv{version}-tiny"
    adapters = torch.load(data_dir / f"{name}.adapters.pt", weights_only=True)
    golden, ids = adapters[method], adapters["tokens"].long()
    model = RWKV.load(data_dir / f"{name}.pth", torch.float32)
    rank = golden["r"]
    rwkv_miss.inject(
        model, method, rank=rank, **({"alpha": golden["scaling"] * rank} if method == "lora" else {})
    )
    pairs = {"miss": {"miss": "D"}, "lora": {"lora_A": "A", "lora_B": "B"}}[method]
    for linear, layer in adapted_linears(model).items():
        layer.assign({ours: golden[theirs][f"{linear}.weight"] for ours, theirs in pairs.items()})
    logits, _ = model(ids)
    close("logits", logits, golden["logits64"], 2e-5)
    close("merged logits", logits, golden["merged_logits"], 2e-5)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert abs(float(loss) - float(golden["loss"])) < 1e-5 * float(golden["loss"])
    loss.backward()
    for ours, theirs in pairs.items():
        grads = golden[f"d{theirs}"]
        largest = max(g.abs().max() for g in grads.values())
        for linear, layer in adapted_linears(model).items():
            want = grads[f"{linear}.weight"]
            error = (getattr(layer, ours).grad - want).abs().max() / max(want.abs().max(), 1e-3 * largest)
            assert error < 4e-4, f"{linear}.{ours}: {error:.1e}"


@pytest.mark.parametrize(
    "name,version,layers,width,ffn,expected",
    [
        ("RWKV6-7B", 6, 32, 4096, 14336, 88_080_384),
        ("RWKV6-3B", 6, 32, 2560, 8960, 55_050_240),
        ("RWKV7-2.9B", 7, 32, 2560, 10240, 47_185_920),
    ],
)
def test_the_papers_parameter_counts(name, version, layers, width, ffn, expected):
    for method, rank in (("miss", 64), ("lora", 32)):
        with torch.device("meta"):
            model = RWKV(make_arch(version, layers, width, 64, 65536))
        assert model.arch.dim_ffn == ffn
        report = rwkv_miss.inject(model, method, rank=rank)
        assert report.trainable == expected, (name, method)
    assert f"{len(report.linears)} linears, {expected:,} trainable of" in report.line()


@each_case
def test_save_and_load_give_the_same_model(method, options, tmp_path):
    model = rwkv(7)
    rank, other = fitting(method, options, 5), fitting(method, options, 6)
    rwkv_miss.inject(model, method, rank=rank, **options)
    filled(model)
    rwkv_miss.save_adapter(model, tmp_path / "a.pth", step=3, tokenizer="bytes")
    fresh = rwkv(7)
    metadata = rwkv_miss.load_adapter(fresh, tmp_path / "a.pth")
    ids = torch.arange(9)[None]
    unchanged(method, options, fresh(ids)[0], model(ids)[0])
    assert (metadata["method"], metadata["step"], metadata["tokenizer"]) == (method, 3, "bytes")
    assert metadata["options"]["rank"] == rank and len(metadata["linears"]) == 12
    again = rwkv(7)
    rwkv_miss.inject(again, method, rank=other, **options)
    with pytest.raises(rwkv_miss.UserError, match=f"options .*{rank}.*{other}"):
        rwkv_miss.load_adapter(again, tmp_path / "a.pth")


@each_case
def test_the_merged_file_is_the_live_adapter(method, options, tmp_path):
    fit = functools.partial(fitting, method, options)
    model = rwkv(6)
    rwkv_miss.write_checkpoint(tmp_path / "base.pth", model.state_dict().items())
    rwkv_miss.inject(
        model, method, rank=fit(7), rank_map={"ffn": fit(3), "blocks.1.ffn.value": fit(5)}, **options
    )
    rwkv_miss.save_adapter(filled(model), tmp_path / "a.pth")
    rwkv_miss.merge_file(tmp_path / "base.pth", tmp_path / "a.pth", tmp_path / "merged.pth")
    ids = torch.arange(13)[None]
    close("logits", RWKV.load(tmp_path / "merged.pth")(ids)[0], model(ids)[0], 2e-5)


@each_case
def test_a_new_adapter_loads_over_one_in_use(method, options, tmp_path):
    model = rwkv(7)
    rwkv_miss.inject(model, method, rank=fitting(method, options, 5), **options)
    rwkv_miss.save_adapter(filled(model, 2), tmp_path / "a.pth")
    ids = torch.arange(9)[None]
    want = model(ids)[0]
    filled(model, 3)
    rwkv_miss.load_adapter(model, tmp_path / "a.pth")
    unchanged(method, options, model(ids)[0], want)


@pytest.mark.parametrize("method", LINEAR)
def test_a_file_that_does_not_fit_changes_nothing(method, tmp_path):
    model = rwkv(7)
    rwkv_miss.inject(model, method, rank=fitting(method, {}, 5))
    tensors = adapter_tensors(filled(model))
    key = next(name for name in reversed(tensors) if not name.startswith("shared."))
    rwkv_miss.save_adapter(model, tmp_path / "a.pth")
    metadata = rwkv_miss.read_metadata(tmp_path / "a.pth")
    other = {name: t.detach() + t.is_floating_point() for name, t in tensors.items()} | {
        key: tensors[key].detach()[:-1]
    }
    rwkv_miss.write_checkpoint(tmp_path / "bad.pth", other.items(), metadata)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(rwkv_miss.UserError, match="in the adapter, .* in the model"):
        rwkv_miss.load_adapter(model, tmp_path / "bad.pth")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@each_case
def test_a_state_dict_is_the_whole_model(method, options):
    """Also what follows from the frozen weight, which it brings along."""
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(nn.Sequential(nn.Linear(20, 16)))
        rwkv_miss.inject(models[seed], method, targets=["0"], rank=fitting(method, options, 4), **options)
        filled(models[seed], seed)
    x = torch.randn(3, 20)
    assert not torch.allclose(models[0](x), models[1](x), rtol=1e-2)
    models[1].load_state_dict(models[0].state_dict())
    assert torch.equal(models[0](x), models[1](x))


def test_a_whole_tensor_may_be_called_shared(tmp_path):
    """As the embedding of T5 is; tensors that layers share are called shared.NAME in the file."""
    model = nn.ModuleDict({"shared": nn.Embedding(5, 10), "last": nn.Linear(10, 6)})
    rwkv_miss.write_checkpoint(tmp_path / "base.pth", model.state_dict().items())
    rwkv_miss.inject(model, "vera", targets=["last"], rank=3)
    trained = model["shared"].requires_grad_(True).weight
    with torch.no_grad():
        trained += 1
    rwkv_miss.save_adapter(model, tmp_path / "a.pth")
    rwkv_miss.merge_file(tmp_path / "base.pth", tmp_path / "a.pth", tmp_path / "merged.pth")
    assert torch.equal(rwkv_miss.read_checkpoint(tmp_path / "merged.pth")["shared.weight"], trained)


def test_a_rank_map_gives_linears_their_own_ranks():
    model = rwkv(7)
    rwkv_miss.inject(
        model, "lora", rank=6, alpha=12.0, rank_map={"ffn": 3, "blocks.1.ffn.value": 5, "blocks.0": 2}
    )
    ranks = {name: len(layer.lora_A) for name, layer in adapted_linears(model).items()}
    assert ranks["blocks.0.att.key"] == 2 and ranks["blocks.0.ffn.key"] == 2, (
        "the longer part, blocks.0, counts"
    )
    assert ranks["blocks.1.att.key"] == 6 and ranks["blocks.1.ffn.key"] == 3
    assert ranks["blocks.1.ffn.value"] == 5
    assert {layer.scale for layer in adapted_linears(model).values()} == {2.0}, "another rank keeps alpha / r"
    for method in ("mos", "prolora"):  # sizes that go with the rank fall with it
        model = rwkv(7)
        rwkv_miss.inject(model, method, rank=16, rank_map={"ffn": 2})
        assert len(adapted_linears(model)["blocks.0.ffn.key"].factors()[0]) == 2
    for wrong, said in (
        ({"fnn": 3}, "rank_map 'fnn'.*blocks.0.att"),
        ({"ffn": 0}, "ranks"),
        (5, "ranks"),
        ({"ffn": 2.5}, "ranks"),
    ):
        with pytest.raises(rwkv_miss.UserError, match=said):
            rwkv_miss.inject(rwkv(7), "lora", rank=6, rank_map=wrong)


def test_an_adapter_is_no_model_and_a_model_no_adapter(tmp_path):
    model = rwkv(7)
    rwkv_miss.write_checkpoint(tmp_path / "base.pth", model.state_dict().items())
    rwkv_miss.inject(model, rank=5)
    rwkv_miss.save_adapter(model, tmp_path / "a.pth")
    with pytest.raises(rwkv_miss.UserError, match="is an adapter; give its base"):
        RWKV.load(tmp_path / "a.pth")
    with pytest.raises(rwkv_miss.UserError, match="is not an adapter"):
        rwkv_miss.load_adapter(rwkv(7), tmp_path / "base.pth")


def test_mistakes_are_explained():
    def message(*args, **options):
        with pytest.raises(rwkv_miss.UserError) as error:
            rwkv_miss.inject(rwkv(7), *args, **options)
        return str(error.value)

    assert "recptance" in message(targets=["recptance"])
    assert "head, key, output, receptance, value" in message(targets=["recptance"])
    assert "blocks.0.att.receptance" in message(rank=49) and "48" in message(rank=49)
    assert "rank" in message(rnak=3)
    assert ", ".join(sorted(METHODS)) in message("misss")
    assert "choose one of: stride, contiguous" in message(layout="diagonal")
    assert "plain, balanced" in message(shards="even")
    model = rwkv(7)
    rwkv_miss.inject(model, rank=8)
    with pytest.raises(rwkv_miss.UserError, match="already"):
        rwkv_miss.inject(model, rank=8)


@pytest.mark.parametrize("method", LINEAR)
def test_numbers_that_no_method_can_do_with(method):
    def message(**options):
        with pytest.raises(rwkv_miss.UserError) as error:
            rwkv_miss.inject(rwkv(7), method, **options)
        return str(error.value)

    for rank in (0, -1):
        assert message(rank=rank) == f"rank {rank} must be at least 1"
    assert "given twice" in message(rank=8, r=4)
    if hasattr(METHODS[method].Options, "alpha"):
        assert "alpha -1.0 must not be negative" in message(rank=8, alpha=-1.0)
        assert "alpha must be a number, got nan" in message(rank=8, alpha=math.nan)


def test_targets_match_leaves_suffixes_and_whole_names():
    model = rwkv(7)
    assert len(rwkv_miss.target_checks.find_targets(model, ["key"])) == 4
    assert len(rwkv_miss.target_checks.find_targets(model, ["att.key"])) == 2
    assert list(rwkv_miss.target_checks.find_targets(model, ["blocks.1.ffn.value", "head"])) == [
        "blocks.1.ffn.value",
        "head",
    ]


def test_the_base_class_carries_shared_tensors_penalties_and_steps(tmp_path, monkeypatch):
    """A method with a frozen matrix for all layers, a penalty and a schedule, as VeRA and AdaLoRA need."""
    monkeypatch.setitem(METHODS, "toy", None)

    @register("toy")
    class Toy(AdapterLinear):
        shared = ("common",)

        @classmethod
        def make_shared(cls, shapes, options, device):
            return {
                "common": torch.randn(options.rank, max(width for _, width in shapes.values()), device=device)
            }

        def setup(self, options):
            self.rows = nn.Parameter(torch.zeros(self.out_features, options.rank))
            self.steps = []

        def delta(self):
            return self.rows @ self.common[:, : self.in_features]

        @classmethod
        def penalty(cls, layers, gather):
            return sum(layer.rows.square().sum() for layer in layers)

        @classmethod
        def before_step(cls, layers, step, total, gradient_of, gather):
            layers[1].steps.append((step, total, gradient_of(layers[0].rows)))

        @classmethod
        def after_step(cls, layers, step, total, gather):
            layers[1].steps.append((step, total))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 6, bias=False), nn.Linear(6, 4, bias=False))
    base = copy.deepcopy(model)
    rwkv_miss.inject(model, "toy", targets=["0", "1"], rank=3)
    assert model[0].common is model[1].common and tuple(model[0].common.shape) == (3, 10)
    assert set(adapter_tensors(model)) == {"0.rows", "1.rows", "shared.common"}
    model[0].rows.data.normal_()
    assert rwkv_miss.penalty(model).item() == pytest.approx(float(model[0].rows.square().sum()), rel=1e-6)
    rwkv_miss.before_step(model, 2, 9)
    rwkv_miss.after_step(model, 2, 9)
    around = rwkv_miss.around_steps.AroundSteps(model)
    with monkeypatch.context() as patch:
        # a training looks for the linears once
        patch.setattr(nn.Module, "named_modules", None)
        assert torch.equal(around.penalty(), model[0].rows.square().sum())
        around.before(3, 9)
        around.after(3, 9)
    assert model[1].steps == [(2, 9, None), (2, 9), (3, 9, None), (3, 9)]
    rwkv_miss.save_adapter(model, tmp_path / "toy.pth")
    again = copy.deepcopy(base)
    rwkv_miss.load_adapter(again, tmp_path / "toy.pth")
    x = torch.randn(2, 10)
    assert torch.equal(again(x), model(x))
    rwkv_miss.write_checkpoint(tmp_path / "base.pth", base.state_dict().items())
    rwkv_miss.merge_file(tmp_path / "base.pth", tmp_path / "toy.pth", tmp_path / "merged.pth")
    base.load_state_dict(torch.load(tmp_path / "merged.pth", weights_only=True))
    close("merged", base(x), model(x), 1e-6)
