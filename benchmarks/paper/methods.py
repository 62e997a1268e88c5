"""The adapter methods with the options of the paper's experiments, and one adapted linear of each."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

import rwkv_miss
from rwkv_miss.adapter import METHODS, AdapterLinear

LINEAR = sorted(name for name, method in METHODS.items() if method.adapts_linears)


def variants(out: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Map labels to (method, options) of the variants that are compared in addition to the default methods.
    `out`: the width of the outputs.
    """
    return {
        "miss, contiguous": ("miss", {"layout": "contiguous"}),  # equations 2-3
        "miss, expand": ("miss", {"expand": True}),  # equation 1
        "miss, balanced": ("miss", {"shards": "balanced"}),
        "miss, sqrt": ("miss", {"scale": "sqrt"}),
        "miss, mini": ("miss", {"mini_r": out // 2}),
        "miss, magnitude": ("miss", {"magnitude": True}),
        "bat, row": ("bat", {"order": "row"}),
    }


def equal(method: str, options: dict[str, Any], rank: int, width: int, out: int) -> dict[str, Any]:
    """Return the options at which a method has as many parameters as LoRA of `rank` on a linear (width, out),
    as near as it can.

    Balanced MiSS has one row more than its rank. VeRA can't have as many parameters: its rank is the smaller
    width, as in the paper's App. B. PRoLoRA and MoS have ranks of about four times LoRA's, built from as many
    numbers.
    """
    numbers = rank * (width + out)
    if method == "vera":
        return {**options, "rank": min(width, out)}
    if method == "bat":
        wanted, common = numbers / (width if options.get("order") == "row" else out), math.gcd(width, out)
        return {
            **options,
            "rank": min((r for r in range(1, common + 1) if common % r == 0), key=lambda r: abs(r - wanted)),
        }
    if method in ("miss", "lora_fa"):
        columns = width if options.get("expand") else options.get("mini_r") or out
        return {**options, "rank": max(1, round(numbers / columns) - (options.get("shards") == "balanced"))}
    if method == "prolora":
        unshared = rank // 4
        return {**options, "rank": unshared + 4 * (rank - unshared), "unshared": unshared, "shares": 4}
    if method == "adalora":  # equal at the start; a third of its numbers is pruned later
        return {**options, "rank": max(1, 2 * rank // 3), "init_rank": rank}
    if method == "mos":
        return {**options, "rank": min(4 * rank, width, out), "budget": rank}
    return {**options, "rank": rank}


def named(out: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Map labels to (method, options) of every method and variant, without ranks."""
    return {name: (name, {}) for name in LINEAR} | variants(out)


def systems(rank: int, width: int = 256, out: int = 256) -> dict[str, tuple[str, dict[str, Any]]]:
    """Map named()'s labels to options with about the parameters of LoRA of this rank on linears (width, out).

    The default widths are for models whose linears are square on average, as RWKV's are.
    """
    return {
        label: (method, equal(method, options, rank, width, out))
        for label, (method, options) in named(out).items()
    }


def adapted_linear(width: int, out: int, method: str, options: dict[str, Any]) -> AdapterLinear:
    """Make a random linear of (width, out), fp32, with an adapter whose trained tensors differ from their
    initial values.
    """
    model = nn.Sequential(nn.Linear(width, out, bias=False))
    rwkv_miss.inject(model, method, targets=["0"], **options)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.01)
    return model[0]
