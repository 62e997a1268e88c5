"""Elementwise parts of a layer in plain torch: the specification of elementwise.py.

They run wherever the native functions do not.

Shapes: activations (B, T, C), one head after the other in the last axis; vectors of the model (C), (1, 1, C)
or (H, N), H N = C, in any dtype: they are cast to that of the activations. `reset` (B, T) bool is set where a
document starts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def token_shift(z: Tensor, last: Tensor, reset: Tensor | None) -> Tensor:
    """Compute z_{t-1} - z_t for z (B, T, C) after `last` (B, C); z_{t-1} is 0 where a document starts."""
    before = torch.cat([last.unsqueeze(1), z[:, :-1]], dim=1)
    return (before if reset is None else before.masked_fill(reset.unsqueeze(-1), 0)) - z


def shift_mix(z: Tensor, last: Tensor, reset: Tensor | None, mixes: list[Tensor]) -> list[Tensor]:
    """Compute z_t + (z_{t-1} - z_t) mix for each of the mixes."""
    d = token_shift(z, last, reset)
    return [z + d * mix.to(z.dtype).view(-1) for mix in mixes]


def shift_mix_low_rank(
    z: Tensor, last: Tensor, reset: Tensor | None, mixes: list[Tensor], q: Tensor, maps: Tensor
) -> list[Tensor]:
    """Compute z_t + (z_{t-1} - z_t) (mix_i + q_i maps_i): mixes for every token; q (n, B T, D), maps (n,
    D, C)."""
    d, m = token_shift(z, last, reset), torch.bmm(q, maps.to(q.dtype))
    return [z + d * (mix.to(z.dtype).view(-1) + m[i].view(z.shape)) for i, mix in enumerate(mixes)]


def gated(x: Tensor, gate: Tensor) -> Tensor:
    """Compute sigmoid(gate) x."""
    return torch.sigmoid(gate) * x


def value_residual(v: Tensor, v_first: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Compute v + (v_first - v) sigmoid(gate); returns it, and v_first for the next layer."""
    return v + (v_first - v) * torch.sigmoid(gate), v_first


def delta_inputs(k: Tensor, a: Tensor, k_k: Tensor, k_a: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute k (1 + (s - 1) k_a), -kappa and kappa s, with s = sigmoid(a).

    kappa is k k_k, normalised to length 1 in every head.
    """
    s, k_k, k_a = torch.sigmoid(a), k_k.to(k.dtype).view(-1), k_a.to(k.dtype).view(-1)
    kappa = F.normalize((k * k_k).unflatten(-1, (heads, -1)), dim=-1).flatten(-2)
    return k * (1 + (s - 1) * k_a), -kappa, kappa * s


def group_norm(y: Tensor, weight: Tensor, bias: Tensor, heads: int, eps: float) -> Tensor:
    """Normalise every head of every token by itself."""
    tokens = y.reshape(-1, y.shape[-1])
    return F.group_norm(tokens, heads, weight.to(y.dtype), bias.to(y.dtype), eps).view(y.shape)


def readout7(
    y: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    r_k: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> Tensor:
    """Compute (group_norm(y) + (r . k r_k) v) g, the dot product in every head; r_k (H, N)."""
    r, k, values = (x.unflatten(-1, r_k.shape) for x in (r, k, v))
    bonus = (r * k * r_k.to(y.dtype)).sum(-1, keepdim=True) * values
    return (group_norm(y, weight, bias, len(r_k), eps) + bonus.flatten(-2)) * g


def readout6(y: Tensor, g: Tensor, weight: Tensor, bias: Tensor, heads: int, eps: float) -> Tensor:
    """Compute group_norm(y) silu(g)."""
    return group_norm(y, weight, bias, heads, eps) * F.silu(g)


def relu_squared(x: Tensor) -> Tensor:
    return torch.relu(x) ** 2


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)


def add_layer_norm(
    x: Tensor, mixed: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute x + mixed, and its LayerNorm."""
    x = x + mixed
    return x, layer_norm(x, weight, bias, eps)
