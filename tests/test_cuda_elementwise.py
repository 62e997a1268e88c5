"""The CUDA elementwise functions, run on the CPU through cuda/emulate.h, against the plain forms in
float64.
"""

import ctypes
import math

import pytest
import torch
from torch.nn import functional

from benchmarks import gpu_numerics
from src.model import RWKV
from src.ops import elementwise, elementwise_ops, wkv7
from src.ops.kernel_errors import worst
from src.ops.mix7 import mix7, mix7_serves

from .conftest import close, make_arch, random_tensors
from .elementwise_cases import DTYPES, EPS, FUNCTIONS, SIZES, TOLERANCE, inputs, results

every_function = pytest.mark.parametrize("name", FUNCTIONS)


@pytest.fixture
def gpu(libraries, monkeypatch):
    """The emulated library in the place of every device's; the names of its functions as they are called."""
    monkeypatch.setattr(elementwise_ops, "library", lambda device: libraries[7])
    monkeypatch.setitem(elementwise.ACTIVATION_DTYPES, "cpu", DTYPES)
    seen, call = [], elementwise_ops.call
    monkeypatch.setattr(
        elementwise_ops, "call", lambda name, *args, **kw: (seen.append(name), call(name, *args, **kw))[1]
    )
    return seen


@every_function
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_outputs_and_gradients(name, dtype, trained, gpu):
    """Trained vectors are fp32 in a base of any dtype, frozen ones have its dtype."""
    if trained and not FUNCTIONS[name][2]:
        return
    for sizes in SIZES:
        want = results(name, sizes, "", torch.float64, trained)
        got = results(name, sizes, "cuda", dtype, trained, [torch.float32 if trained else dtype])
        for i, (mine, exact) in enumerate(zip(got, want, strict=True)):
            what = f"{name} {sizes} {dtype}: tensor {i}"
            # the gradient of `last` is exactly 0 where a document starts in every row
            close(what, mine, exact, TOLERANCE[dtype]) if exact.any() else torch.testing.assert_close(
                mine.double(), exact, atol=0, rtol=0
            )
    assert len(gpu) == 2 * len(SIZES)


def test_what_a_card_is_checked_with(gpu):
    """benchmarks.gpu_numerics, with the emulation in the place of a GPU."""
    found = gpu_numerics.elementwise_errors("bfloat16", "cpu")
    assert set(found) == set(FUNCTIONS) and len(gpu) == 2 * len(FUNCTIONS) * len(SIZES)
    assert all(1e-4 < value <= allowed for value, allowed in found.values())


@every_function
def test_the_order_of_threads_does_not_matter(name, gpu, libraries):
    for sizes in SIZES[2:]:
        first = results(name, sizes, "cuda", torch.float32, True)
        libraries[7].emulate_order(1)
        try:
            second = results(name, sizes, "cuda", torch.float32, True)
        finally:
            libraries[7].emulate_order(0)
        assert all(map(torch.equal, first, second)), sizes


@every_function
def test_half_precision_rounds_outputs_only(name, gpu):
    """To the last bit what fp32 gives, rounded. The low-rank mixes go through products of their own."""
    if name == "shift_mix_low_rank":
        return
    want = results(name, SIZES[2], "cuda", torch.float32, True)
    for dtype in DTYPES[1:]:
        got = results(name, SIZES[2], "cuda", dtype, True, [torch.float32])
        kept_output = name == "relu_squared"  # its backward reads the rounded output
        for mine, exact in zip(got[:1] if kept_output else got, want):
            assert torch.equal(mine, exact.to(mine.dtype))


def test_vectors_have_any_dtype_and_their_gradients_the_same(gpu):
    mixed = [torch.float32, torch.bfloat16, torch.float16]
    tensors, keywords = inputs("shift_mix", SIZES[2])
    want = results("shift_mix", SIZES[2], "", torch.float64, True)
    leaves = [t.to(dtype).requires_grad_() for t, dtype in zip(tensors, [mixed[1]] * 2 + mixed * 2)]
    out = FUNCTIONS["shift_mix"][0]("cuda", *leaves, **keywords)
    generator = torch.Generator().manual_seed(3)
    gradients = [torch.randn(y.shape, generator=generator).bfloat16() for y in out]
    for mine, leaf, exact in zip(torch.autograd.grad(out, leaves, gradients), leaves, want[6:], strict=True):
        assert mine.dtype == leaf.dtype and mine.shape == leaf.shape
        close("gradient", mine, exact, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("width", [8, 2056, 8192])
@pytest.mark.parametrize("of_sum", [True, False])
def test_add_layer_norm_of_any_width(width, of_sum, gpu, monkeypatch):
    """One lane to 32 warps; with and without a gradient of the sum. What is not written is NaN."""
    monkeypatch.setattr(
        elementwise_ops.torch, "empty_like", lambda x, **kw: torch.full(x.shape, math.nan, dtype=x.dtype)
    )
    generator = torch.Generator().manual_seed(width)
    shapes = [(35, width)] * 2 + [(width,)] * 2 + [(35, width)] * 2
    # a mean far from 0: the squares are those of what is left without it
    numbers = [torch.randn(shape, generator=generator) + 30 * (i == 0) for i, shape in enumerate(shapes)]

    def run(native, dtype):
        *leaves, dtotal, dnormed = [x.to(dtype, copy=True).requires_grad_() for x in numbers]
        total, normed = elementwise.add_layer_norm(*leaves, EPS, native)
        out, gradients = ([total, normed], [dtotal, dnormed]) if of_sum else ([normed], [dnormed])
        return [*out, *torch.autograd.grad(out, leaves, gradients)]

    for i, (mine, exact) in enumerate(zip(run("cuda", torch.float32), run("", torch.float64), strict=True)):
        close(f"tensor {i}", mine, exact, 1e-5)
    assert gpu == ["add_layer_norm_forward", "add_layer_norm_backward"]


def test_a_wider_layer_norm_is_torchs(gpu):
    x, vector = torch.randn(1, 2, 8200), torch.ones(8200)
    total, normed = elementwise.add_layer_norm(x, x, vector, vector, EPS, "cuda")
    assert not gpu and torch.equal(total, 2 * x)
    assert torch.equal(normed, functional.layer_norm(2 * x, [8200], vector, vector, EPS))


@pytest.mark.parametrize("count", [9, 32])
def test_any_number_of_mixes(count, gpu):
    x = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(1))
    mixes = list(torch.randn(count, 16))
    want = elementwise.shift_mix(x, x[:, 0], None, mixes, "")
    for mine, exact in zip(elementwise.shift_mix(x, x[:, 0], None, mixes, "cuda"), want, strict=True):
        close("mix", mine, exact, 2e-6)


def test_what_does_not_fit_is_refused(libraries, gpu):
    for B, T, C, H, dtype in [(1, 1, 12, 1, 0), (1, 1, 264, 1, 0), (1, 0, 64, 1, 0), (1, 1, 64, 1, 3)]:
        sizes = [*map(ctypes.c_int64, (B, T, C, H)), ctypes.c_float(0), dtype, 0, None]
        pointers = [None] * 4
        assert libraries[7].readout6_forward(*pointers, ctypes.c_int64(0), *sizes) == 1
    sizes = [ctypes.c_int64(n) for n in (1, 1, 8200, 1)]
    refused = [ctypes.c_int64(0), *sizes, ctypes.c_float(0), 0, 0, None]
    assert libraries[7].add_layer_norm_forward(*[None] * 5, *refused) == 1
    with pytest.raises(RuntimeError, match="shift_mix_forward: a CUDA kernel did not start, error 1:"):
        x = torch.ones(1, 1, 8)
        elementwise.shift_mix(x, x[0], None, [x[0, 0]] * 33, "cuda")


def test_a_nan_fails_a_self_test():
    assert math.isnan(worst([1e-7, math.nan, 1e-6])) and worst([1e-7, 1e-6]) == 1e-6


def test_views_that_begin_between_two_loads(gpu):
    x = torch.arange(17.0)[1:].view(1, 2, 8)
    assert x.data_ptr() % 16
    assert torch.equal(elementwise.relu_squared(x, "cuda"), x * x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_mix7_has_the_gradients_of_float64(dtype, trained, gpu):
    """Around the recurrence of the CPU: what the readout gives to r, k and v is added by the last kernel."""
    generator = torch.Generator().manual_seed(7)

    def run(on, dtype, kernel, numbers, heads):
        leaves = [x.to(dtype).requires_grad_() for x in numbers[:6]]
        vectors = [x.to(dtype if on else torch.float64).requires_grad_(trained) for x in numbers[6:11]]
        if on:
            assert mix7_serves(leaves, vectors, None, None, on)
            y, state = mix7(leaves, vectors, EPS, None, None, None, kernel, on)
        else:
            r, w, k, v, a, g = leaves
            key, alpha, beta = elementwise.delta_inputs(k, a, *vectors[:2], heads, "")
            inputs = [x.unflatten(-1, (heads, -1)) for x in (r, w, key, v, alpha, beta)]
            y, state = wkv7(*inputs, None, None, kernel, None)
            y = elementwise.readout7(y.flatten(-2), r, key, v, g, *vectors[2:], EPS, "")
        dy, dstate = numbers[11].to(y.dtype), numbers[12].to(state.dtype)
        return torch.autograd.grad([y, state], [*leaves, *(vectors if trained else ())], [dy, dstate])

    for B, T, C, heads in [(2, 17, 160, 2), (1, 5, 24, 3), (1, 34, 264, 11)]:
        N = C // heads
        shapes = [(B, T, C)] * 6 + [(1, 1, C), (1, 1, C), (heads, N), (C,), (C,), (B, T, C)]
        numbers = [torch.randn(s, generator=generator).bfloat16() for s in (*shapes, (B, heads, N, N))]
        gpu.clear()
        got = run("cuda", dtype, "cpu", numbers, heads)
        assert {"mix7_readout_backward", "mix7_inputs_backward"} <= {*gpu} and len(gpu) == 5
        want = run("", torch.float64, "torch", numbers, heads)
        for i, (mine, exact) in enumerate(zip(got, want, strict=True)):
            tolerance = 5e-6 if dtype == torch.float32 else 3e-2
            close(f"mix7 {B, T, C, heads} {dtype}: gradient {i}", mine, exact, tolerance)


@pytest.mark.parametrize("version", [6, 7])
def test_a_model_that_trains_whole_has_the_gradients_of_float64(version, gpu):
    """Every tensor trains, with documents and a state to go on from, on the WKV of the CPU."""

    def run(kernel, dtype):
        arch = make_arch(version, n_layer=2)
        model = RWKV(arch, kernel).to(dtype)
        model.load_state_dict(random_tensors(arch))
        if kernel == "cpu":
            model.set_kernel("cuda")
            for block in model.blocks:
                block.att.kernel = "cpu"
        ids = torch.randint(67, (2, 37), generator=torch.Generator().manual_seed(5))
        reset = torch.zeros(2, 37, dtype=torch.bool)
        reset[0, 11] = reset[1, 1] = True
        _, state = model(ids[:, :9])
        logits, _ = model(ids, state, reset)
        logits.logsumexp(-1).sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    want, got = run("torch", torch.float64), run("cpu", torch.float32)
    assert want.keys() == got.keys() and {name.rpartition("_")[2] for name in gpu} == {"forward", "backward"}
    for name, exact in want.items():
        close(f"v{version} {name}", got[name], exact, 2e-5)
