"""The adapter methods as the paper sets them up, and one adapted linear of each."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import rwkv_miss
from rwkv_miss.adapter import METHODS, AdapterLinear

LINEAR = sorted(name for name, method in METHODS.items() if method.adapts_linears)

# label -> method and options of what is compared beside the methods with their defaults
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {"miss, contiguous": ("miss", {"layout": "contiguous"})}


def equal_rank(method: str, rank: int, width: int, out: int) -> int:
    """The rank at which a method has as many parameters as LoRA of `rank` on a linear (width, out), to the nearest whole number."""
    if method in ("miss",):
        return round(rank * (width + out) / out)
    return rank


def systems(rank: int, width: int = 1, out: int = 1) -> dict[str, tuple[str, dict[str, Any]]]:
    """Label -> (method, options) of every method and variant, with about the parameters of LoRA of this rank on linears (width, out).

    Without widths: on a model whose linears are square on average, as RWKV's are.
    """
    named = {name: (name, {}) for name in LINEAR} | VARIANTS
    return {label: (method, {"rank": equal_rank(method, rank, width, out), **options}) for label, (method, options) in named.items()}


def adapted_linear(width: int, out: int, method: str, options: dict[str, Any]) -> AdapterLinear:
    """A random linear of (width, out), fp32, with an adapter whose trained tensors are not zero."""
    model = nn.Sequential(nn.Linear(width, out, bias=False))
    rwkv_miss.inject(model, method, targets=["0"], **options)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.01)
    return model[0]
