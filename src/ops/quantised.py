"""Native kernels of rwkv_miss::dequantise, which expands a quantised weight to a matrix.

They are cuda/quantised.cu and cuda/quantised_cpu.cpp.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from rwkv_miss.quantised import KINDS, SCALE_BYTES, expand, nf4_pairs, unfilled

from . import native, self_test
from .launch_errors import require_started


def dequantise(quantised: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Expand a quantised weight (out, bytes) to (out, width).

    It is native if the kernels of the device are built and have the dtype, else in plain torch.
    """
    device = quantised.device.type
    # a GPU loads a scale in one access
    as_made = quantised.is_contiguous() and quantised.data_ptr() % SCALE_BYTES == 0
    if dtype not in native.ACTIVATION_DTYPES[device] or not as_made or not self_test.status(device).passed:
        return expand(quantised, width, dtype)
    weight = unfilled(quantised, width, dtype)
    code = launch(native.library(device), quantised, weight, native.context(quantised))
    require_started("dequantise", code)
    return weight


def launch(library: ctypes.CDLL, quantised: Tensor, weight: Tensor, context: tuple) -> int:
    """Have a library write a quantised weight's values into `weight` (out, width); 0, or CUDA's error."""
    pairs = torch.view_as_real(nf4_pairs(quantised.device, torch.float32))
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (quantised, pairs, weight)]
    sizes = [ctypes.c_int64(n) for n in weight.shape]
    return getattr(library, f"dequantise_{KINDS[quantised.dtype]}")(
        *pointers, *sizes, native.DTYPE_CODES[weight.dtype], *context
    )


torch.library.impl("rwkv_miss::dequantise", ("cpu", "cuda"), dequantise)
