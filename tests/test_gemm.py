"""The matrix products and the frozen linear: values and gradients against float64, and what is kept."""

import functools
import types

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from rwkv_miss import functional, gemm
from rwkv_miss.functional import linear
from rwkv_miss.methods import operators
from src.common.device import choose_accelerator

SHAPES = [(1, 1, 1), (2, 5, 3), (17, 48, 30), (129, 67, 15), (0, 8, 4), (3, 0, 4)]
# errors as shares of the sum of all magnitudes; bf16 keeps 8 bits, and rounds up to three times
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 8e-3}


def close(got, want, dtype, size=None):
    """`size`: what the terms of the sums add up to without their signs; want's own size if not given."""
    assert got.dtype == dtype and got.shape == want.shape
    size = want.abs() if size is None else size
    assert not got.numel() or (got.double() - want).abs().max() <= ROUNDING[dtype] * size.max()


@pytest.fixture(params=["onednn", "torch"])
def engine(request, monkeypatch):
    """Both ways that a product can be taken."""
    if request.param == "torch":
        monkeypatch.setattr(gemm, "_has_onednn", lambda: False)
    elif not gemm._has_onednn():
        pytest.skip("this torch has no oneDNN operator: the products are torch's own")
    monkeypatch.setattr(gemm, "SMALL", 1)


@pytest.mark.parametrize("rows, width, out", SHAPES)
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("transposed", [False, True])
def test_products(engine, rows, width, out, dtype, transposed):
    torch.manual_seed(0)
    x, bias, s, D = (torch.randn(shape).to(dtype) for shape in ((rows, width), (out,), (rows, 4), (4, out)))
    weight = torch.randn(width, out).to(dtype).t() if transposed else torch.randn(out, width).to(dtype)
    exact = [x.double() @ weight.double().t(), bias.double(), s.double() @ D.double()]
    size = [
        x.double().abs() @ weight.double().abs().t(),
        bias.double().abs(),
        s.double().abs() @ D.double().abs(),
    ]
    close(gemm.product(x, weight), exact[0], dtype, size[0])
    close(gemm.product(x, weight, bias), sum(exact[:2]), dtype, sum(size[:2]))
    close(gemm.product_plus(x, weight, bias, s, D), sum(exact), dtype, sum(size))
    exactly = gemm.product_exact(x, weight)
    assert exactly.dtype == torch.float32
    close(exactly.to(dtype), exact[0], dtype, size[0])
    total = torch.randn(rows, out, dtype=exactly.dtype)
    want = total.double() + exact[0]
    assert gemm.add_product_(total, x, weight) is total
    close(total.to(dtype), want, dtype, size[0] + 3)
    out = torch.full((rows + 1, out), torch.nan, dtype=dtype)
    close(gemm.product_into(out[:-1], x, weight), exact[0], dtype, size[0])
    assert out[-1].isnan().all()


@pytest.mark.parametrize("rows, width, out", [(3, 9, 8209), (3, 8209, 9)])
def test_products_in_parts(engine, rows, width, out):
    """Products of a vocabulary: written in blocks of columns, and summed over blocks of them."""
    torch.manual_seed(0)
    x, weight = torch.randn(rows, width), torch.randn(width, out).t()
    exact, size = x.double() @ weight.double().t(), x.double().abs() @ weight.double().abs().t()
    close(gemm.product(x, weight), exact, torch.float32, size)
    close(gemm.product_into(torch.empty(rows, out), x, weight.contiguous()), exact, torch.float32, size)


def test_a_weight_that_is_a_slice_is_left_to_torch(monkeypatch):
    """oneDNN takes minutes for it."""
    monkeypatch.setattr(gemm, "_onednn", None)
    monkeypatch.setattr(gemm, "SMALL", 1)
    x, weight = torch.randn(5, 8), torch.randn(7, 20)[:, 4:12]
    close(gemm.product(x, weight), x.double() @ weight.double().t(), torch.float32)


def test_onednn_is_taken_for_large_products_in_fp32_and_not_where_there_are_no_numbers(monkeypatch):
    taken = []
    monkeypatch.setattr(gemm, "_has_onednn", lambda: True)
    monkeypatch.setattr(
        gemm, "_onednn", lambda x, weight, bias: taken.append((x.dtype, len(x))) or F.linear(x, weight, bias)
    )
    monkeypatch.setattr(gemm, "SMALL", 2 * 3 * 4)
    for x in (
        torch.ones(2, 3),
        torch.ones(2, 3).double(),
        torch.ones(2, 3).bfloat16(),
        torch.ones(2, 3, device="meta"),
        torch.ones(1, 3),
    ):
        gemm.product(x, torch.ones(4, 3, dtype=x.dtype, device=x.device))
    assert taken == [(torch.float32, 2)]


@pytest.mark.parametrize("since_2_8", [True, False])
def test_a_gpu_is_asked_for_the_sums_of_half_precision_as_they_are(monkeypatch, since_2_8):
    asked = []
    monkeypatch.setattr(torch, "mm", lambda *factors, **options: asked.append((factors, options)))
    monkeypatch.setattr(gemm, "product", lambda x, weight: torch.ones(3, 5, dtype=x.dtype))
    monkeypatch.setattr(gemm, "_has_fp32_results", lambda: since_2_8)
    x = types.SimpleNamespace(dtype=torch.bfloat16, device=torch.device("cuda"), requires_grad=False)
    y = gemm.product_exact(x, types.SimpleNamespace(t=lambda: "transposed", requires_grad=False))
    assert asked == [((x, "transposed"), {"out_dtype": torch.float32})] * since_2_8
    assert since_2_8 or y.dtype == torch.float32


@pytest.mark.parametrize(
    "torch_version, sums_on", [("2.8.0", False), ("2.9.1+cu128", False), ("2.10.0", True)]
)
def test_a_total_in_fp32_is_added_to_by_a_torch_that_can(monkeypatch, torch_version, sums_on):
    """torch 2.8 and 2.9 have addmm(out_dtype=), and want `self` in the dtype of the factors."""
    asked = []
    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr(torch, "addmm", lambda *factors, **options: asked.append(factors))
    monkeypatch.setattr(gemm, "product", lambda x, weight: torch.ones(3, 5, dtype=x.dtype))
    monkeypatch.setattr(gemm, "_has_fp32_results", lambda: True)
    monkeypatch.setattr(torch, "mm", lambda x, w, out_dtype: torch.ones(3, 5, dtype=out_dtype))
    gemm._adds_to_fp32.cache_clear()
    x = types.SimpleNamespace(dtype=torch.bfloat16, device=torch.device("cuda"))
    total = torch.zeros(3, 5)
    gemm.add_product_(total, x, types.SimpleNamespace(t=lambda: "transposed"))
    gemm._adds_to_fp32.cache_clear()
    assert len(asked) == sums_on and (sums_on or total.eq(1).all())


def test_runs_on_a_gpu_sum_in_fp32(monkeypatch):
    """torch adds the parts of a sum in half precision, unless it is told not to."""
    settings = torch.backends.cuda.matmul
    names = ["allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"]
    before = [getattr(settings, name) for name in names]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    try:
        assert choose_accelerator("cpu") == "cpu"
        assert [getattr(settings, name) for name in names] == before
        assert choose_accelerator("auto") == "gpu"
        assert not any(getattr(settings, name) for name in names)
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(settings, name, value)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_the_frozen_linear_keeps_nothing_and_a_trained_one_its_input(engine, dtype, transposed):
    """A linear keeps the weight itself, not a view of it, whose memory ZeRO-3 could not take away."""
    torch.manual_seed(0)
    x, weight, bias = (
        torch.randn(shape).to(dtype).requires_grad_()
        for shape in ((2, 5, 12), (12, 7) if transposed else (7, 12), (7,))
    )
    dy = torch.randn(2, 5, 7).to(dtype)
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    want = torch.autograd.grad(
        F.linear(exact[0], exact[1].t() if transposed else exact[1], exact[2]), exact, dy.double()
    )
    for trained in (False, True):
        weight.requires_grad_(trained)
        bias.requires_grad_(trained)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            y = linear(x, weight, bias, transposed)
        assert {t.data_ptr() for t in kept} == (
            {weight.data_ptr(), x.data_ptr()} if trained else {weight.data_ptr()}
        )
        assert all(t.shape == weight.shape for t in kept if t.data_ptr() == weight.data_ptr())
        leaves = [t for t in (x, weight, bias) if t.requires_grad]
        for mine, theirs in zip(torch.autograd.grad(y, leaves, dy), want):
            close(mine, theirs, dtype)
    assert not linear(x.detach(), weight.detach(), bias.detach(), transposed).requires_grad


# operator -> (its function, the shapes of the tensors that follow an x of (3, 8), and what follows these)
OPERATORS = {
    "linear": (functional.linear, [(6, 8), (6,)], []),
    "miss_linear": (functional.miss_linear, [(6, 8), (6,), (4, 6)], []),
    "lora_linear": (operators.lora_linear, [(6, 8), (6,), (2, 8), (6, 2)], [0.5]),
    "times_columns": (operators.times_columns, [(8,), (8,)], []),
    "expand_linear": (operators.expand_linear, [(6, 8), (6,), (2, 8)], []),
    "vera_linear": (operators.vera_linear, [(6, 8), (6,), (2, 8), (6, 2), (2,), (6,)], []),
    "bat_linear": (operators.bat_linear, [(6, 8), (6,), (3, 2, 2)], [False]),
}


def test_every_operator_is_here():
    functions = {f for module in (functional, operators) for f in vars(module).values() if is_function(f)}
    tried = set()
    for function, shapes, rest in OPERATORS.values():
        leaves = [torch.randn(shape).requires_grad_() for shape in ((3, 8), *shapes)]
        tried.add(type(function(*leaves, *rest).grad_fn))
    assert {f._backward_cls for f in functions} == tried and len(tried) == len(OPERATORS)


def is_function(value):
    return isinstance(value, type) and issubclass(value, torch.autograd.Function)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_compiler_traces_every_operator_into_one_graph(name):
    function, shapes, rest = OPERATORS[name]
    torch.manual_seed(0)
    leaves = [torch.randn(shape).requires_grad_() for shape in ((3, 8), *shapes)]
    traced = torch.compile(lambda *tensors: function(*tensors, *rest), fullgraph=True, backend="aot_eager")
    y, dy = function(*leaves, *rest), torch.randn(3, shapes[0][0])
    assert torch.equal(traced(*leaves), y)
    want = torch.autograd.grad(y, leaves, dy, allow_unused=True)
    got = torch.autograd.grad(traced(*leaves), leaves, dy, allow_unused=True)
    for one, other in zip(got, want, strict=True):
        assert other is None and not (one is not None and one.any()) or torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inside", [True, False])
def test_autocast_computes_in_its_dtype_and_the_gradients_keep_theirs(name, half, inside):
    """As torch's own linear: y in half precision, gradients in fp32 as the parameters, wherever it runs."""
    function, shapes, rest = OPERATORS[name]
    torch.manual_seed(0)
    leaves = [torch.randn(shape).requires_grad_() for shape in ((3, 8), *shapes)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    want = function(*exact, *rest)
    dy = torch.randn(want.shape, dtype=torch.float64)
    want.backward(dy)
    with torch.autocast("cpu", half):
        y = function(*leaves, *rest)
        if inside:
            y.backward(dy.to(half))
    if not inside:
        y.backward(dy.to(half))
    assert y.dtype == half
    of_all = zip([y, *(t.grad for t in leaves)], [want, *(t.grad for t in exact)], strict=True)
    pairs = [(got, exact) for got, exact in of_all if exact is not None]
    assert len(pairs) == sum(t.grad is not None for t in leaves) + 1 >= 3
    assert all(got.dtype == torch.float32 for got, _ in pairs[1:])
    for got, exact in pairs:
        # products of products: each is rounded up to three times
        assert (got - exact).abs().max() <= 3 * torch.finfo(half).eps * exact.abs().max()


@pytest.mark.parametrize("name", OPERATORS)
def test_autocast_does_not_reach_the_backward_of_what_was_computed_outside(name):
    function, shapes, rest = OPERATORS[name]
    torch.manual_seed(0)
    leaves = [torch.randn(shape).requires_grad_() for shape in ((3, 8), *shapes)]
    y = function(*leaves, *rest)
    dy = torch.randn(y.shape)
    want = torch.autograd.grad(y, leaves, dy, retain_graph=True, allow_unused=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(y, leaves, dy, allow_unused=True)
    assert [g is None for g in got] == [g is None for g in want]
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True) if w is not None)


@pytest.mark.parametrize("name", OPERATORS)
def test_autocast_leaves_float64_alone(name):
    function, shapes, rest = OPERATORS[name]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in ((3, 8), *shapes)]
    want = function(*tensors, *rest)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(function(*tensors, *rest), want)


def miss_with_sums(x, *others):
    """MiSS with the shard sums that the function before it has computed."""
    return functional.miss_linear(functional.with_shard_sums(1 * x, functional.shard_sum(x, 4)), *others)


# (the operator, the places of frozen tensors, what follows the tensors)
TWICE = {
    **{name: (function, (), rest) for name, (function, _, rest) in OPERATORS.items()},
    "vera_linear": (operators.vera_linear, (3, 4), []),
    "miss_linear with sums": (miss_with_sums, (), []),
    "lora_linear with dropout": (operators.lora_linear, (), [0.5, 0.5, torch.tensor(7)]),
    "lora_linear with a frozen A": (operators.lora_linear, (3,), [0.5, 0.5, torch.tensor(7)]),
}


@pytest.mark.parametrize("name", TWICE)
def test_the_gradients_have_derivatives(name):
    function, frozen, rest = TWICE[name]
    torch.manual_seed(0)
    shapes = (3, 8), *OPERATORS[name.split()[0]][1]
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    for place in frozen:
        leaves[place].requires_grad_(False)
    mixed = [t.detach().float().requires_grad_() for t in leaves[:3]] + leaves[3:]  # parameters are cast
    vectors = [torch.randn_like(t) for t in leaves]

    def run(*leaves):
        return function(*leaves, *rest)

    def products(run, leaves):
        at = [(t, v.to(t.dtype)) for t, v in zip(leaves, vectors, strict=True) if t.requires_grad]
        trained = [t for t, _ in at]
        first = torch.autograd.grad(run(*leaves).sin().sum(), trained, create_graph=True)
        return torch.autograd.grad(first, trained, [v for _, v in at])

    for trained in (True, False):  # an operator with a frozen weight may not keep x
        leaves[1].requires_grad_(trained)
        mixed[1].requires_grad_(trained)
        assert torch.autograd.gradgradcheck(run, leaves)
        checkpointed = functools.partial(checkpoint, run, use_reentrant=False)
        for other in (products(run, mixed), products(checkpointed, leaves)):
            for got, want in zip(other, products(run, leaves), strict=True):
                assert (got - want).abs().max() <= 1e-5 * want.abs().max()
