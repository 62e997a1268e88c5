"""Tensors of the model for the CPU decoder's native code: their order, their types, int8 rows."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_miss.files.checkpoint import Arch

MODEL = "emb.weight blocks.0.ln0.weight blocks.0.ln0.bias ln_out.weight ln_out.bias head.weight".split()
NORMS = ("ln1.weight", "ln1.bias", "ln2.weight", "ln2.bias", "att.ln_x.weight", "att.ln_x.bias")
# members of Layer6 and Layer7 of cuda/decode_cpu.h
LAYER = {
    6: (
        *NORMS,
        *(f"att.time_maa_{name}" for name in "xwkvrg"),
        *("att.time_decay", "att.time_faaaa", "ffn.time_maa_k", "ffn.time_maa_r"),
        *(f"att.time_{name}_w{i}" for name in ("maa", "decay") for i in (1, 2)),
        *(f"att.{name}.weight" for name in ("receptance", "key", "value", "gate", "output")),
        *(f"ffn.{name}.weight" for name in ("key", "receptance", "value")),
    ),
    7: (
        *NORMS,
        *(f"att.x_{name}" for name in "rwkvag"),
        *(f"att.{name}" for name in ("k_k", "k_a", "r_k", "w0", "a0", "v0")),
        "ffn.x_k",
        *(f"att.{name}{i}" for name in "wavg" for i in (1, 2)),
        *(f"att.{name}.weight" for name in ("receptance", "key", "value", "output")),
        "ffn.key.weight",
        "ffn.value.weight",
    ),
}
# Type of cuda/decode_products.h: of weights as they are, and of those that are packed or multiplied in bf16
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
PANELS, BF16_PAIRS, BF16_SINGLE = 3, 4, 5
LANES = 16  # vectors are padded to a multiple of this, a whole number of any CPU's SIMD lanes


class Matrix(ctypes.Structure):
    """Matrix of cuda/decode_products.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "type")),
    ]


class Int8Rows(NamedTuple):
    """Quantised rows: weight (out, in) = values (out, in) int8 * scale (out,) fp32."""

    values: Tensor
    scale: Tensor


def int8_rows(weight: Tensor) -> Int8Rows:
    """Quantise to symmetric int8 with one scale for each row: the row's largest magnitude / 127.

    rwkv_miss/quantised.py has a scale for each 64 weights.
    """
    weight = weight.float()
    scale = weight.abs().amax(1) / 127
    return Int8Rows((weight / scale.clamp(min=1e-30).unsqueeze(1)).round_().to(torch.int8), scale)


def names_in_order(arch: Arch) -> list[str]:
    """Name the model's tensors in the order in which decode_open() takes them."""
    return [*MODEL, *(f"blocks.{i}.{name}" for i in range(arch.n_layer) for name in LAYER[arch.version])]


def is_multiplied(name: str, tensor: Tensor) -> bool:
    """Tell whether it is one of the large matrices: not the embedding, whose rows are looked up."""
    return name.endswith(".weight") and name != "emb.weight" and tensor.dim() == 2
