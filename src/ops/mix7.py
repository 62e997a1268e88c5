"""RWKV-7's time mix around its state: delta_inputs, wkv7 and readout7 as one native function.

It keeps its inputs, y and what the recurrence keeps. The three functions alone also keep the key, alpha and
beta, which this backward recomputes. One call also costs less than three. On a GPU the outer two work
together: see elementwise_ops.py. On tensor cores the recurrence itself makes key, alpha and beta of k and a
where it reads them: `rwkv::mix7_chunked` and its backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rwkv_miss.functional import with_shard_sums

from . import check
from .elementwise import serves
from .elementwise_ops import library_op, of_heads, ready, summable
from .launch_errors import require_started
from .native import WkvOp, call, on_tensor_cores, once_differentiable, saves, scratch

_ops = torch.ops.rwkv
_wkv = WkvOp(7)


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
    residual: tuple[Tensor, ...],
    vectors: tuple[Tensor, ...],
    eps: float,
    s0: Tensor | None,
    reset: Tensor | None,
    initial_state: Tensor | None,
    kernel: str,
    native: str,
    rank: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute (readout (B, T, C), final state, v_first) of a time mix.

    activations: r, raw decay w, k, v, raw learning rate a and gate g, each (B, T, C). residual: v_first and
    its gate, for value_residual of v; or nothing, and then no v_first is returned. vectors: k_k, k_a, r_k,
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
    chunked = on_tensor_cores(kernel, _by_head(heads, activations[0])[0])
    save = saves(*activations, *residual, *vectors, s0)
    how = reset, heads, eps, chunked, save, native, summable(rank, native, head_size)
    residual = residual or (None, None)
    y, state, v_first, *sums = _Mix7.apply(*ready(*activations, *vectors, s0, *residual), *how)
    return with_shard_sums(y, *sums) if sums else y, state, v_first


def _by_head(heads: int, *activations: Tensor) -> list[Tensor]:
    """Reshape (B, T, C) -> (B, T, H, N)."""
    return [x.view(*x.shape[:-1], heads, -1) for x in activations]


def _chunked_shapes(inputs, vectors, s0, reset, save):
    r = inputs[0]
    return [*_wkv.empty_outputs(r, True, save), of_heads(r.flatten(-2), r.shape[2])]


def _chunked(inputs, vectors, s0, reset, save):
    made, r = _chunked_shapes(inputs, vectors, s0, reset, save), inputs[0]
    y, state, saved, bonus = made
    written = y, state, saved if save else None, bonus, scratch("wkv7_chunked_forward_scratch", r)
    require_started(
        "mix7_chunked", call("mix7_chunked_forward", r, *inputs, list(vectors), s0, reset, *written)
    )
    return made


def _chunked_backward_shapes(inputs, *_):
    return _wkv.empty_gradients(inputs[0])


def _chunked_backward(inputs, vectors, s0, reset, saved, dy, dstate):
    made, r = _chunked_backward_shapes(inputs), inputs[0]
    _wkv.require_saved(saved, r, True)
    given = *inputs, list(vectors), s0, reset, saved, dy, dstate
    require_started(
        "mix7_chunked backward",
        call("mix7_chunked_backward", r, *given, *made, scratch("wkv7_chunked_scratch", r)),
    )
    return made


# for r, w, k, v, a, each (B, T, H, N), and k_k, k_a, r_k: y, final state, saved, bonus; then gradients of
# r, w, key, v, alpha, beta and s0
_ARGUMENTS = "Tensor[] inputs, Tensor[] vectors, Tensor? s0, Tensor? reset"
library_op("mix7_chunked", f"{_ARGUMENTS}, bool save", _chunked, _chunked_shapes)
library_op(
    "mix7_chunked_backward",
    f"{_ARGUMENTS}, Tensor saved, Tensor dy, Tensor? dstate",
    _chunked_backward,
    _chunked_backward_shapes,
)


class _Mix7(torch.autograd.Function):
    @staticmethod
    def forward(ctx, r, w, k, v, a, g, k_k, k_a, r_k, weight, bias, s0, first, gate, *others):
        reset, heads, eps, chunked, save, native, rank = others
        residual = [] if first is None else [v, first, gate]
        if residual:
            (v,) = _ops.value_residual(residual)
        bonus = None
        if chunked:
            inputs = _by_head(heads, r, w, k, v, a)
            y, state, saved, bonus = _ops.mix7_chunked(inputs, [k_k, k_a, r_k], s0, reset, save)
        else:
            if native == "cuda":
                key, alpha, beta, bonus = _ops.mix7_inputs([k, a, r, k_k, k_a, r_k], heads)
            else:
                key, alpha, beta = _ops.delta_inputs([k, a, k_k, k_a], heads, 0.0)
            inputs = _by_head(heads, r, w, key, v, alpha, beta)
            y, state, saved = _ops.wkv7(*inputs, s0, reset, False, save=save)
        y = y.flatten(-2)
        kept = r, w, k, v, a, g, k_k, k_a, r_k, weight, bias, s0, reset, y, saved, bonus
        ctx.save_for_backward(*kept, *residual)
        ctx.heads, ctx.eps, ctx.chunked = heads, eps, chunked
        ctx.set_materialize_grads(False)
        if bonus is None:
            out, *sums = _ops.readout7([y, r, key, v, g, r_k, weight, bias], heads, eps, rank)
        else:
            out, *sums = _ops.mix7_readout([y, v, g, weight, bias], bonus, eps, rank)
        return out, state, None if first is None else first.detach(), *sums

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dstate, dlater, *dsums):
        r, w, k, v, a, g, k_k, k_a, r_k, weight, bias, *kept = ctx.saved_tensors
        s0, reset, y, saved, bonus, *residual = kept
        heads, eps, trained = ctx.heads, ctx.eps, any(ctx.needs_input_grad[6:11])
        dout, dstate, dlater = ready(torch.zeros_like(y) if dout is None else dout, dstate, dlater)
        above = [dout, *ready(*(x for x in dsums if x is not None))]
        if not ctx.chunked:
            key, alpha, beta = _ops.delta_inputs([k, a, k_k, k_a], heads, 0.0)
        if bonus is None:
            of_read = [y, r, key, v, g, r_k, weight, bias, *above]
            dy, read_r, read_k, read_v, dg, *of_readout = _ops.readout7_backward(of_read, heads, eps, trained)
        else:
            of_vectors, vectors = [r, k, a] if trained else [], [r_k, weight, bias, k_a]
            dy, dg, dbonus, *of_readout = _ops.mix7_readout_backward(
                [y, v, g], bonus, of_vectors, vectors, above, eps
            )
        (dy,) = _by_head(heads, dy)
        if ctx.chunked:
            inputs = _by_head(heads, r, w, k, v, a), [k_k, k_a, r_k], s0, reset
            *found, ds0 = _ops.mix7_chunked_backward(*inputs, saved, dy, dstate)
        else:
            inputs = _by_head(heads, r, w, key, v, alpha, beta)
            *found, ds0 = _ops.wkv7_backward(*inputs, s0, reset, saved, dy, dstate, False)
        dr, dw, dkey, dv, dalpha, dbeta = (x.flatten(-2) for x in found)
        if bonus is None:
            tensors = [k, a, k_k, k_a, dkey.add_(read_k), dalpha, dbeta]
            dk, da, *of_keys = _ops.delta_inputs_backward(tensors, heads, 0.0, trained)
            dr.add_(read_r)
            dv.add_(read_v)
            of_value = _ops.value_residual_backward(residual, dv, dlater) if residual else ()
        else:
            tensors = [k, a, r, g, k_k, k_a, r_k, dkey, dalpha, dbeta, *above]
            inputs = dr, dv, bonus, dbonus, tensors, trained, residual, dlater
            dk, da, *of_keys = _ops.mix7_inputs_backward(*inputs)
            count = 2 * trained
            of_keys, of_value = of_keys[:count], of_keys[count:]
        dv, dfirst, dgate = of_value or (dv, None, None)
        activations = dr, dw, dk, dv, da, dg
        vectors = [*of_keys, *of_readout] if trained else [None] * 5
        return *activations, *vectors, None if s0 is None else ds0, dfirst, dgate, *[None] * 7
