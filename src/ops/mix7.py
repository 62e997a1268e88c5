"""RWKV-7's state with what enters and what reads it: delta_inputs, wkv7 and readout7 as one function.

The native form keeps its inputs, y and what the recurrence keeps; the three functions by themselves also keep
the key, -kappa and kappa s, which are made again here for the backward. One call also costs less than three
with their checks and views.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import check, wkv7
from .elementwise import delta_inputs, readout7, ready, serves, vector

_ops = torch.ops.rwkv


def mix7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    g: Tensor,
    k_k: Tensor,
    k_a: Tensor,
    r_k: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    s0: Tensor | None,
    reset: Tensor | None,
    start: Tensor | None,
    kernel: str,
    native: bool,
) -> tuple[Tensor, Tensor]:
    """r, raw decay w, k, v, raw learning rate a and gate g, (B, T, C) -> (readout (B, T, C), final state).

    Vectors as in plain.delta_inputs and plain.readout7; s0, reset, start and kernel as in wkv7. Raises
    ValueError.
    """
    heads, head_size = r_k.shape
    activations, vectors = [r, w, k, v, a, g], [k_k, k_a, r_k, weight, bias]
    if serves(native, activations, vectors, head_size) and (start is None or reset is None):
        check(7, dict(zip("rwkvag", _by_head(heads, *activations), strict=True)), s0, reset, start)
        if s0 is None and start is not None:
            s0 = start.expand(len(r), *start.shape)
        reset = None if reset is None else reset.contiguous().view(torch.uint8)
        return _Mix7.apply(*ready(*activations), *map(vector, vectors), *ready(s0), reset, heads, eps)
    k, remove, replace = delta_inputs(k, a, k_k, k_a, heads, native)
    y, state = wkv7(*_by_head(heads, r, w, k, v, remove, replace), s0, reset, kernel, start)
    return readout7(y.flatten(-2), r, k, v, g, r_k, weight, bias, eps, native), state


def _by_head(heads: int, *activations: Tensor) -> list[Tensor]:
    """(B, T, C) -> (B, T, H, N)."""
    return [x.view(*x.shape[:-1], heads, -1) for x in activations]


class _Mix7(torch.autograd.Function):
    @staticmethod
    def forward(ctx, r, w, k, v, a, g, k_k, k_a, r_k, weight, bias, s0, reset, heads, eps):
        key, remove, replace = _ops.delta_inputs([k, a, k_k, k_a], heads, 0.0)
        y, state, saved = _ops.wkv7(*_by_head(heads, r, w, key, v, remove, replace), s0, reset, False)
        y = y.flatten(-2)
        ctx.save_for_backward(r, w, k, v, a, g, k_k, k_a, r_k, weight, bias, s0, reset, y, saved)
        ctx.heads, ctx.eps = heads, eps
        ctx.set_materialize_grads(False)
        return _ops.readout7([y, r, key, v, g, r_k, weight, bias], heads, eps)[0], state

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dstate):
        r, w, k, v, a, g, k_k, k_a, r_k, weight, bias, s0, reset, y, saved = ctx.saved_tensors
        heads, eps = ctx.heads, ctx.eps
        dout, dstate = ready(torch.zeros_like(y) if dout is None else dout, dstate)
        key, remove, replace = _ops.delta_inputs([k, a, k_k, k_a], heads, 0.0)
        dy, read_r, read_k, read_v, dg = _ops.readout7_backward(
            [y, r, key, v, g, r_k, weight, bias, dout], heads, eps
        )
        inputs = _by_head(heads, r, w, key, v, remove, replace)
        *found, ds0 = _ops.wkv7_backward(*inputs, s0, reset, saved, *_by_head(heads, dy), dstate, False)
        dr, dw, dkey, dv, dremove, dreplace = (x.flatten(-2) for x in found)
        dk, da = _ops.delta_inputs_backward(
            [k, a, k_k, k_a, dkey.add_(read_k), dremove, dreplace], heads, 0.0
        )
        return (
            dr.add_(read_r),
            dw,
            dk,
            dv.add_(read_v),
            da,
            dg,
            *[None] * 5,
            None if s0 is None else ds0,
            None,
            None,
            None,
        )
