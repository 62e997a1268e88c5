"""Int8 panels, the form in which the CPU's VNNI instructions multiply matrices.

The format and the kernel are cuda/int8_panels.h: a scale in bf16 for each row and 64 columns, 8.25 bits a
weight, and activations in int8 with a scale for each 32.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..ops import native

DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def instruction_is_there() -> bool:
    """Tell whether this CPU multiplies bytes. Others compute the same numbers, slowly."""
    return bool(native.library("cpu").panels_fast())


def packed_bytes(rows: int, columns: int) -> int:
    """Count the bytes of a packed matrix."""
    size = native.library("cpu").panels_bytes
    size.restype = ctypes.c_int64
    return size(ctypes.c_int64(rows), ctypes.c_int64(columns))


def pack(weight: Tensor, out: Tensor, threads: int) -> None:
    """Pack weight (rows, columns) fp32 or bf16 into out (packed_bytes,) uint8."""
    rows, columns = weight.shape
    native.library("cpu").panels_pack(
        ctypes.c_int64(DTYPES[weight.dtype]),
        ctypes.c_void_p(weight.data_ptr()),
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_int64(threads),
    )
