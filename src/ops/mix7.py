"""RWKV-7's time mix around its state: delta_inputs, wkv7 and readout7 as one native function.

It keeps its inputs, y and what the recurrence keeps. The three functions alone also keep the key, alpha and
beta, which this backward recomputes. One call also costs less than three. On a GPU the backwards of
the outer two work together: see elementwise_ops.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rwkv_miss.functional import with_shard_sums

from . import check
from .elementwise import serves
from .elementwise_ops import ready, summable
from .native import has_tensor_core_form, once_differentiable, saves

_ops = torch.ops.rwkv


def mix7_serves(
    activations: tuple[Tensor, ...],
    vectors: tuple[Tensor, ...],
    reset: Tensor | None,
    initial_state: Tensor | None,
    native: str,
) -> bool:
    """Tell whether mix7 computes this.

    Documents that start from a given state are cut out of their rows, which only the three functions can do.
    """
    _, _, r_k, *_ = vectors
    cut_out = initial_state is not None and reset is not None
    return serves(native, activations, vectors, r_k.shape[1]) and not cut_out


def mix7(
    activations: tuple[Tensor, ...],
    vectors: tuple[Tensor, ...],
    eps: float,
    s0: Tensor | None,
    reset: Tensor | None,
    initial_state: Tensor | None,
    kernel: str,
    native: str,
    rank: int = 0,
) -> tuple[Tensor, Tensor]:
    """Compute (readout (B, T, C), final state) of a time mix.

    activations: r, raw decay w, k, v, raw learning rate a and gate g, each (B, T, C). vectors: k_k, k_a, r_k,
    weight and bias of ln_x, with shapes as in elementwise_reference. s0, reset and initial_state are as in
    wkv7, which `kernel` runs: a native one. `native` is that of mix7_serves, `rank` as in elementwise.py.
    Raises ValueError.
    """
    _, _, r_k, *_ = vectors
    heads, head_size = r_k.shape
    check(7, dict(zip("rwkvag", _by_head(heads, *activations), strict=True)), s0, reset, initial_state)
    if s0 is None and initial_state is not None:
        s0 = initial_state.expand(len(activations[0]), *initial_state.shape)
    reset = None if reset is None else reset.contiguous().view(torch.uint8)
    by_head = _by_head(heads, activations[0])[0]
    chunked = kernel == "cuda" and has_tensor_core_form(by_head)
    save = saves(*activations, *vectors, s0)
    how = reset, heads, eps, chunked, save, native, summable(rank, native, head_size)
    y, state, *sums = _Mix7.apply(*ready(*activations, *vectors, s0), *how)
    return with_shard_sums(y, *sums) if sums else y, state


def _by_head(heads: int, *activations: Tensor) -> list[Tensor]:
    """Reshape (B, T, C) -> (B, T, H, N)."""
    return [x.view(*x.shape[:-1], heads, -1) for x in activations]


class _Mix7(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, r, w, k, v, a, g, k_k, k_a, r_k, weight, bias, s0, reset, heads, eps, chunked, save, native, rank
    ):
        key, alpha, beta = _ops.delta_inputs([k, a, k_k, k_a], heads, 0.0)
        inputs = _by_head(heads, r, w, key, v, alpha, beta)
        y, state, saved = _ops.wkv7(*inputs, s0, reset, chunked, save=save)
        y = y.flatten(-2)
        ctx.save_for_backward(r, w, k, v, a, g, k_k, k_a, r_k, weight, bias, s0, reset, y, saved)
        ctx.heads, ctx.eps, ctx.chunked, ctx.native = heads, eps, chunked, native
        ctx.set_materialize_grads(False)
        out, *sums = _ops.readout7([y, r, key, v, g, r_k, weight, bias], heads, eps, rank)
        return out, state, *sums

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dstate, *dsums):
        r, w, k, v, a, g, k_k, k_a, r_k, weight, bias, s0, reset, y, saved = ctx.saved_tensors
        heads, eps, trained = ctx.heads, ctx.eps, any(ctx.needs_input_grad[6:11])
        dout, dstate = ready(torch.zeros_like(y) if dout is None else dout, dstate)
        dsums = ready(*(x for x in dsums if x is not None))
        key, alpha, beta = _ops.delta_inputs([k, a, k_k, k_a], heads, 0.0)
        of_read = [y, r, key, v, g, r_k, weight, bias, dout, *dsums]
        if ctx.native == "cuda":
            dy, dg, sums, *of_readout = _ops.mix7_readout_backward(of_read, heads, eps, trained)
        else:
            dy, read_r, read_k, read_v, dg, *of_readout = _ops.readout7_backward(of_read, heads, eps, trained)
        inputs = _by_head(heads, r, w, key, v, alpha, beta)
        *found, ds0 = _ops.wkv7_backward(*inputs, s0, reset, saved, *_by_head(heads, dy), dstate, ctx.chunked)
        dr, dw, dkey, dv, dalpha, dbeta = (x.flatten(-2) for x in found)
        if ctx.native == "cuda":
            tensors = [k, a, r, g, k_k, k_a, r_k, dkey, dalpha, dbeta, dout, *dsums]
            dk, da, *of_keys = _ops.mix7_inputs_backward(dr, dv, sums, tensors, heads, trained)
        else:
            tensors = [k, a, k_k, k_a, dkey.add_(read_k), dalpha, dbeta]
            dk, da, *of_keys = _ops.delta_inputs_backward(tensors, heads, 0.0, trained)
            dr.add_(read_r)
            dv.add_(read_v)
        activations = dr, dw, dk, dv, da, dg
        vectors = [*of_keys, *of_readout] if trained else [None] * 5
        return *activations, *vectors, None if s0 is None else ds0, *[None] * 7
