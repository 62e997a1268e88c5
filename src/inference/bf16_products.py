"""Products of bf16 weights by the CPU's bf16 instructions, where they are: cuda/bf16_products.h."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..ops import native


def instruction_is_there() -> bool:
    """Tell whether this CPU multiplies pairs of bf16. Others compute the same numbers, slowly."""
    return bool(native.library("cpu").bf16_fast())


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
