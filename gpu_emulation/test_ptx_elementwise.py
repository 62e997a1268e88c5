"""The other kernels for GPUs, executed as PTX (ptx/), against float64: elementwise functions, quantised
weights, a whole model.
"""

import math

import pytest
import torch
from torch.nn import functional

from benchmarks import gpu_numerics
from rwkv_miss.functional import shard_sum
from src.ops import elementwise
from src.ops.kernel_errors import worst
from tests.conftest import close
from tests.elementwise_cases import DTYPES, EPS, FUNCTIONS, SIZES, results

from .ptx.runs import check_run, runs


@pytest.mark.parametrize("architecture, group, quick", runs("elementwise", "quantised", "model"))
def test_rows(nvcc, architecture, group, quick, drawn_rows):
    check_run(architecture, group, quick, drawn_rows)


def test_what_a_card_is_checked_with(gpu):
    """benchmarks.gpu_numerics, with the interpreter in the place of a GPU."""
    found = gpu_numerics.elementwise_errors("bfloat16", "cpu")
    # forward and backward; where vectors are trained, a norm and its token shift have a backward each
    assert set(found) == set(FUNCTIONS) and len(gpu.calls) == (2 * len(FUNCTIONS) + 1) * len(SIZES)
    assert all(1e-4 < value <= allowed for value, allowed in found.values())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_half_precision_rounds_outputs_only(name, gpu):
    """To the last bit what fp32 gives, rounded. The low-rank mixes go through products of their own, and a
    norm is rounded before its token shift.
    """
    if name in ("shift_mix_low_rank", "shift_mix of a norm"):
        return
    # value_residual's other gradient is a sum of rounded numbers
    used = slice(1) if name == "value_residual" else slice(None)
    want = results(name, SIZES[2], "cuda", torch.float32, True, used=used)
    for dtype in DTYPES[1:]:
        got = results(name, SIZES[2], "cuda", dtype, True, [torch.float32], used=used)
        kept_output = name == "relu_squared"  # the backward of relu_squared reads the rounded output
        for mine, exact in zip(got[:1] if kept_output else got, want):
            assert torch.equal(mine, exact.to(mine.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_v_first_is_summed_as_by_autograd(dtype, gpu):
    """To the last bit: a layer's own part is rounded, and then added to that of the later layers."""
    generator = torch.Generator().manual_seed(2)
    v, first, gate, dv, dfirst = (torch.randn(2, 37, 160, generator=generator).to(dtype) for _ in range(5))
    leaves = [x.requires_grad_() for x in (v, first, gate)]
    out = elementwise.value_residual(*leaves, "cuda")
    together = torch.autograd.grad(out, leaves, [dv, dfirst])
    apart = torch.autograd.grad(elementwise.value_residual(*leaves, "cuda")[0], leaves, dv)
    assert torch.equal(together[1], dfirst + apart[1]) and torch.equal(out[1], first)
    assert torch.equal(together[0], apart[0]) and torch.equal(together[2], apart[2])
    assert torch.autograd.grad(elementwise.value_residual(*leaves, "cuda")[1], first, dfirst)[0] is not None
    assert gpu.calls.count("value_residual_backward") == 2


@pytest.mark.parametrize("rank, carried", [(8, True), (256, True), (4, False), (24, False), (512, False)])
def test_an_output_carries_shard_sums_of_a_power_of_two(rank, carried, gpu):
    """Nine groups of 256 channels and one of 8, so that some warps have two; the linear makes other sums."""
    x = torch.randn(1, 3, 2312, generator=torch.Generator().manual_seed(rank))
    y = elementwise.relu_squared(x, "cuda", rank)
    assert torch.equal(y, x.relu() ** 2) and hasattr(y, "shard_sums") == carried
    if carried:
        close("sums", y.shard_sums, shard_sum(y.double(), rank), 1e-6)


@pytest.mark.parametrize("width", [8, 2056, 8192])
@pytest.mark.parametrize("of_sum", [True, False])
def test_add_layer_norm_of_any_width(width, of_sum, gpu):
    """One lane to 32 warps; with and without a gradient of the sum."""
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
    assert gpu.calls == ["add_layer_norm_forward", "add_layer_norm_backward"]


@pytest.mark.parametrize("width, dtype", [(8, torch.float32), (264, torch.bfloat16), (2320, torch.float16)])
@pytest.mark.parametrize("trained", [False, True])
def test_a_norm_with_its_token_shift_has_the_bits_of_both(width, dtype, trained, gpu):
    """With sums of shards, an output that is read twice, documents, and gradients of the sum and of the last
    tokens. Of 2320 channels two warps take a second group.
    """
    generator = torch.Generator().manual_seed(width)
    shapes = [(2, 5, width)] * 2 + [(2, width)] + [(width,)] * 4
    numbers = [torch.randn(shape, generator=generator) for shape in shapes]
    reset = torch.rand(2, 5, generator=generator) < 0.3

    def run(together):
        x, mixed, last = [t.to(dtype).requires_grad_() for t in numbers[:3]]
        weight, bias, *mixes = [t.to(torch.float32).requires_grad_(trained) for t in numbers[3:]]
        shift = elementwise.TokenShift(last, reset, mixes, [0], [0, 8])
        if together:
            total, z_last, out = elementwise.norm_shift(x, mixed, weight, bias, EPS, shift, "cuda")
        else:
            total, z = elementwise.add_layer_norm(x, mixed, weight, bias, EPS, "cuda")
            z_last, out = z[:, -1].clone(), elementwise.shift_mix(z, *shift[:3], "cuda", *shift[3:])
        made = [total, z_last, *out, out[1].shard_sums]
        noise = torch.Generator().manual_seed(5)
        gradients = [torch.randn(y.shape, generator=noise).to(dtype) for y in made]
        vectors = [weight, bias, *mixes] if trained else []
        return [*made, *torch.autograd.grad(made, [x, mixed, last, *vectors], gradients)]

    for i, (mine, other) in enumerate(zip(run(True), run(False), strict=True)):
        assert torch.equal(mine, other), f"tensor {i}"
    names = {"norm_shift_forward", *(() if trained else ["norm_shift_backward"])}
    assert {name for name in gpu.calls if name.startswith("norm")} == names


def test_outputs_of_a_norms_token_shift_may_be_left_unused(gpu):
    x, last = torch.arange(48.0).sin().view(1, 3, 16).requires_grad_(), torch.zeros(1, 16)
    vector = torch.ones(16)
    shift = elementwise.TokenShift(last, None, [vector, vector], [], [8, 0])

    def gradient(native):
        return torch.autograd.grad(
            elementwise.norm_shift(x, x, vector, vector, EPS, shift, native)[2][1].exp().sum(), x
        )[0]

    close("dx", gradient("cuda"), gradient(""), 1e-5)


def test_a_wider_layer_norm_is_torchs(gpu):
    x, vector = torch.randn(1, 2, 8200), torch.ones(8200)
    total, normed = elementwise.add_layer_norm(x, x, vector, vector, EPS, "cuda")
    assert not gpu.calls and torch.equal(total, 2 * x)
    assert torch.equal(normed, functional.layer_norm(2 * x, [8200], vector, vector, EPS))


@pytest.mark.parametrize("count", [9, 32])
def test_any_number_of_mixes(count, gpu):
    x = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(1))
    mixes = list(torch.randn(count, 16))
    want = elementwise.shift_mix(x, x[:, 0], None, mixes, "")
    for mine, exact in zip(elementwise.shift_mix(x, x[:, 0], None, mixes, "cuda"), want, strict=True):
        close("mix", mine, exact, 2e-6)


def test_too_many_mixes_are_refused(gpu):
    x = torch.ones(1, 1, 8)
    with pytest.raises(RuntimeError, match="shift_mix_forward: a CUDA kernel did not start, error 1:"):
        elementwise.shift_mix(x, x[0], None, [x[0, 0]] * 33, "cuda")


def test_a_nan_fails_a_self_test():
    assert math.isnan(worst([1e-7, math.nan, 1e-6])) and worst([1e-7, 1e-6]) == 1e-6


def test_views_that_begin_between_two_loads(gpu):
    x = torch.arange(17.0)[1:].view(1, 2, 8)
    assert x.data_ptr() % 16
    assert torch.equal(elementwise.relu_squared(x, "cuda"), x * x)
