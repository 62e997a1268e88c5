"""Products by the CPU's bf16 instructions, or by what stands for them where it has none, against float64."""

import ctypes

import pytest
import torch
from torch import Tensor

from src.ops import native

SHAPES = [(1, 1), (33, 50), (101, 72), (64, 328), (5, 1000)]


def multiply(weight: Tensor, x: Tensor, parts: int, first: int = 0, last: int | None = None) -> Tensor:
    """Multiply x (B, columns) fp32 by the rows [first, last) of weight (rows, columns) bf16, transposed: y
    (B, rows), zero elsewhere.

    x is rounded to bf16, or with 2 parts split into two. It is the decoder's product, alone, for tests.
    """
    B, (rows, columns) = len(x), weight.shape
    y = torch.zeros(B, rows)
    native.library("cpu").bf16_multiply(
        ctypes.c_void_p(weight.data_ptr()),
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_int64(parts),
        ctypes.c_int64(B),
        ctypes.c_void_p(y.data_ptr()),
        ctypes.c_int64(first),
        ctypes.c_int64(rows if last is None else last),
    )
    return y


def random(shape: tuple[int, int], seed: int) -> torch.Tensor:
    """Numbers of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_have_the_error_of_the_activations(shape):
    """Errors: 2^-8 of each number with x in bf16, 2^-16 with x in two parts, and the sums' 2^-24 a step."""
    weight, x = random(shape, 1).bfloat16(), random((19, shape[1]), 2)
    exact, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    sums = shape[1] / 8 * 2**-24
    for parts, each in ((1, 2**-8), (2, 2**-16)):
        assert ((multiply(weight, x, parts) - exact).abs() <= (each + sums) * size).all(), f"{parts} parts"
    rounded = x.bfloat16().double() @ weight.double().T
    assert ((multiply(weight, x, 1) - rounded).abs() <= sums * size).all(), "one part is x in bf16"


def test_a_row_is_the_same_bits_with_any_others_and_in_any_share():
    weight, x = random((101, 200), 4).bfloat16(), random((21, 200), 5)
    for parts in (1, 2):
        one_by_one = torch.cat([multiply(weight, row[None], parts) for row in x])
        for count in (2, 3, 4, 5, 6, 7, 8, 16, 21):
            assert torch.equal(multiply(weight, x[:count], parts), one_by_one[:count]), f"{count} rows"
        shares = [multiply(weight, x, parts, *share) for share in ((0, 16), (16, 37), (37, 101))]
        assert torch.equal(sum(shares), one_by_one)


def test_what_is_too_small_for_all_of_its_bits_is_zero():
    """As the instruction has it: inputs and sums below 2^-126."""
    weight, x = torch.full((16, 32), 2.0**-130).bfloat16(), torch.full((1, 32), 2.0**100)
    assert multiply(weight, x, 2).tolist() == [[0.0] * 16]
    weight, x = torch.full((16, 32), 2.0**-64).bfloat16(), torch.full((1, 32), 2.0**-64)
    assert multiply(weight, x, 1).tolist() == [[0.0] * 16]
    assert multiply(weight, 8 * x, 1).tolist() == [[32 * 2.0**-125] * 16]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad):
    weight, x = random((20, 100), 6).bfloat16(), random((3, 100), 7)
    want = multiply(weight, x, 2)
    x[1, 97] = bad
    got = multiply(weight, x, 2)
    assert not got[1].isfinite().any() and torch.equal(got[[0, 2]], want[[0, 2]])
