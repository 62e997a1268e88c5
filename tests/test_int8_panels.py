"""Products in int8 panels against float64 with the same rounded numbers, and the form itself by its bytes."""

import ctypes

import pytest
import torch
from torch import Tensor

from src.inference import int8_panels
from src.ops import native

SHAPES = [(1, 1), (16, 64), (33, 50), (101, 72), (80, 200), (15, 129)]


def rounded(x: torch.Tensor, block: int) -> torch.Tensor:
    """x (rows, n) as int8 numbers times a scale for each row and block, in float64."""
    short = -x.shape[1] % block
    parts = torch.nn.functional.pad(x, (0, short)).unflatten(1, (-1, block))
    scale = parts.abs().amax(-1, keepdim=True) / 127
    whole = torch.where(scale > 0, (parts * (1 / scale)).round(), 0).double() * scale.double()
    return whole.flatten(1)[:, : x.shape[1]]


def packed(weight: torch.Tensor, threads: int = 1) -> torch.Tensor:
    out = torch.full((int8_panels.packed_bytes(*weight.shape),), 77, dtype=torch.uint8)
    int8_panels.pack(weight, out, threads)
    return out


def unpacked(panels: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The matrix in float64, from its bytes as cuda/int8_panels.h describes them: blocks of 64 columns of 16
    rows, [column / 4][row][4] of w + 128, then the scales in bf16.
    """
    blocks = panels.view(-1, -(-columns // 64), 16 * 66)
    values = blocks[..., : 16 * 64].unflatten(-1, (16, 16, 4))  # panel, block, group, row, column
    scales = blocks[..., 16 * 64 :].contiguous().view(torch.bfloat16).double()
    whole = (values.double() - 128).permute(0, 3, 1, 2, 4).flatten(3)
    whole = (whole * scales.transpose(1, 2).unsqueeze(-1)).flatten(2).flatten(0, 1)
    assert not whole[rows:].any() and not whole[:, columns:].any(), "what fills no panel is not zero"
    return whole[:rows, :columns]


def multiply(packed: Tensor, rows: int, x: Tensor, first: int = 0, last: int | None = None) -> Tensor:
    """Multiply x (B, columns) fp32 by the rows [first, last) of the matrix: y (B, rows), zero elsewhere.

    It is the decoder's product, alone, for tests. `first` is a multiple of 16, and so is `last` unless it is
    the number of rows.
    """
    B, columns = x.shape
    y = torch.zeros(B, rows)
    native.library("cpu").panels_multiply(
        ctypes.c_void_p(packed.data_ptr()),
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_int64(B),
        ctypes.c_void_p(y.data_ptr()),
        ctypes.c_int64(first),
        ctypes.c_int64(rows if last is None else last),
    )
    return y


def random(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Numbers of very different sizes, some rows of zeros, and an outlier."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x *= torch.randn(rows, columns, generator=generator).exp()
    x[::7, :40] = 0
    x[0, 0] = 300
    return x


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_rounded_numbers(shape, dtype):
    """A weight is off by at most half a step of its row's and block's scale, 1/127 of the largest."""
    weight, x = random(*shape, 1).to(dtype), random(19, shape[1], 2)
    panels = packed(weight, 2)
    w8, x8 = unpacked(panels, *shape), rounded(x, 32)
    got, want, size = multiply(panels, shape[0], x), x8 @ w8.T, x8.abs() @ w8.T.abs()
    # fp32 sums of up to 7 parts: 2^-24 for each of their operations
    assert ((got - want).abs() <= 2e-6 * size).all()
    blocks = torch.nn.functional.pad(weight.float(), (0, -shape[1] % 64)).unflatten(1, (-1, 64))
    # a scale in bf16 may be 2^-8 larger
    step = (blocks.abs().amax(-1) / 127 * (1 + 2**-8)).repeat_interleave(64, 1)[:, : shape[1]]
    assert ((w8 - weight).abs() <= 0.5 * step).all()


def test_a_row_is_the_same_bits_with_any_others_and_in_any_share():
    weight, x = random(101, 200, 4), random(37, 200, 5)
    panels = packed(weight)
    one_by_one = torch.cat([multiply(panels, 101, row[None]) for row in x])
    for count in (2, 3, 4, 5, 7, 8, 11, 16, 17, 37):
        together = multiply(panels, 101, x[:count].contiguous())
        assert torch.equal(together, one_by_one[:count]), f"{count} rows"
    shares = [multiply(panels, 101, x, *part) for part in ((0, 32), (32, 48), (48, 101))]
    assert torch.equal(sum(shares), one_by_one)
    assert torch.equal(packed(weight, 3), panels)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(bad):
    """So that the decoder's check finds it; other rows of activations do not change."""
    weight, x = random(20, 100, 6), random(3, 100, 7)
    want = multiply(packed(weight), 20, x)
    x[1, 77] = bad
    got = multiply(packed(weight), 20, x)
    assert not got[1].isfinite().any() and torch.equal(got[[0, 2]], want[[0, 2]])
    weight[5, 99] = bad
    assert not multiply(packed(weight), 20, x[:1])[:, 5].isfinite().any()


def test_tiny_numbers_become_zero_and_large_ones_stay_finite():
    weight = torch.full((16, 64), 1e-38)
    weight[1], x = 3e38, torch.full((1, 64), 1e-36)
    assert multiply(packed(weight), 16, x).tolist() == [[0.0] * 16]
    x[:] = 1.0
    weight[1] = 1e36
    assert multiply(packed(weight), 16, x)[0, 1].item() == pytest.approx(64e36, rel=0.01)
