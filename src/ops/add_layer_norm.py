"""Residual sum and the LayerNorm that reads it, for a GPU, as ops: `rwkv::add_layer_norm` and its backward.

Both are one kernel of cuda/add_layer_norm.cuh. The backward keeps the sum, which the next layer needs in any
case. Its gradient is that of both addends: one tensor. `rwkv::norm_shift` and its backward have the token
shift that reads the norm, too, and the norm is no tensor.
"""

from __future__ import annotations

import torch

from . import elementwise_ops
from .elementwise_ops import (
    ShiftMix,
    by_mix,
    check_shift,
    check_sizes,
    library_op,
    rank_of,
    ready,
    shift_shapes,
)
from .native import once_differentiable

LARGEST_NORM = 8192  # channels: a block has 1024 threads with 8 each


def _forward_shapes(x, mixed, weight, bias, eps):
    return [torch.empty_like(x), torch.empty_like(x)]


def _forward(x, mixed, weight, bias, eps):
    made = _forward_shapes(x, mixed, weight, bias, eps)
    check_sizes("add_layer_norm", [x, mixed, weight, bias])
    elementwise_ops.call("add_layer_norm_forward", x, [x, mixed], [weight, bias], made, eps=eps)
    return made


def _backward_shapes(total, dnormed, dtotal, weight, bias, eps, trained):
    return [torch.empty_like(total), *([torch.empty_like(v) for v in (weight, bias)] if trained else [])]


def _backward(total, dnormed, dtotal, weight, bias, eps, trained):
    made = _backward_shapes(total, dnormed, dtotal, weight, bias, eps, trained)
    check_sizes("add_layer_norm", [total, weight, bias])
    before, gradients = [total, dnormed, dtotal], made[1:] if trained else None
    elementwise_ops.call(
        "add_layer_norm_backward", total, before, [weight, bias], made[:1], gradients, eps=eps
    )
    return made


_forward_op = library_op(
    "add_layer_norm",
    "Tensor x, Tensor mixed, Tensor weight, Tensor bias, float eps",
    _forward,
    _forward_shapes,
)
_backward_op = library_op(
    "add_layer_norm_backward",
    "Tensor total, Tensor dnormed, Tensor? dtotal, Tensor weight, Tensor bias, float eps, bool trained",
    _backward,
    _backward_shapes,
)


class AddLayerNorm(torch.autograd.Function):
    """Autograd function of add_layer_norm: (x, mixed, weight, bias, eps)."""

    @staticmethod
    def forward(ctx, x, mixed, weight, bias, eps):
        total, normed = _forward_op(x, mixed, weight, bias, eps)
        ctx.save_for_backward(total, weight, bias)
        ctx.eps = eps
        ctx.set_materialize_grads(False)  # the last sum is read by its norm only
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal, dnormed):
        if dnormed is None:
            return dtotal, dtotal, None, None, None
        total, weight, bias = ctx.saved_tensors
        trained = any(ctx.needs_input_grad[2:4])
        dnormed, dtotal = ready(dnormed, dtotal)
        dx, *of_vectors = _backward_op(total, dnormed, dtotal, weight, bias, ctx.eps, trained)
        return dx, dx, *(of_vectors or [None, None]), None


def _shift_forward_shapes(x, mixed, weight, bias, eps, last, reset, mixes, summed, rank, keep):
    kept = [torch.empty_like(x)] if keep else []
    return [
        torch.empty_like(x),
        torch.empty_like(last),
        *kept,
        *shift_shapes(x, last, reset, mixes, summed, rank),
    ]


def _shift_forward(x, mixed, weight, bias, eps, last, reset, mixes, summed, rank, keep):
    made = _shift_forward_shapes(x, mixed, weight, bias, eps, last, reset, mixes, summed, rank, keep)
    check_sizes("norm_shift", [x, mixed, weight, bias])
    check_shift(x, last, reset, mixes)
    count, z, outputs = len(mixes), made[2] if keep else None, made[2 + keep :]
    before, after = [x, mixed, last, reset], [*made[:2], z, by_mix(outputs, count, summed)]
    vectors = [weight, bias, *mixes]
    elementwise_ops.call("norm_shift_forward", x, before, vectors, after, eps=eps, count=count, rank=rank)
    return made


def _shift_backward_shapes(total, dtotal, dz_last, weight, bias, eps, reset, mixes, gradients, summed):
    return [torch.empty_like(total), total.new_empty(total.shape[0], total.shape[2])]


def _shift_backward(total, dtotal, dz_last, weight, bias, eps, reset, mixes, gradients, summed):
    made = _shift_backward_shapes(total, dtotal, dz_last, weight, bias, eps, reset, mixes, gradients, summed)
    check_sizes("norm_shift", [total, weight, bias, *mixes])
    count = len(mixes)
    before, after = [total, dtotal, dz_last, reset], [by_mix(gradients, count, summed), *made]
    numbers = {"eps": eps, "count": count, "rank": rank_of(gradients, count)}
    elementwise_ops.call("norm_shift_backward", total, before, [weight, bias, *mixes], after, **numbers)
    return made


_NORM = "Tensor weight, Tensor bias, float eps"
_norm_shift_op = library_op(
    "norm_shift",
    f"Tensor x, Tensor mixed, {_NORM}, Tensor last, Tensor? reset, Tensor[] mixes, int[] summed, int rank,"
    " bool keep",
    _shift_forward,
    _shift_forward_shapes,
)
_norm_shift_backward_op = library_op(
    "norm_shift_backward",
    f"Tensor total, Tensor? dtotal, Tensor? dz_last, {_NORM}, Tensor? reset, Tensor[] mixes,"
    " Tensor[] gradients, int[] summed",
    _shift_backward,
    _shift_backward_shapes,
)


class NormShift(torch.autograd.Function):
    """Autograd function of norm_shift: (x, mixed, weight, bias, last, reset, *mixes).

    After the sum and the last tokens of its norm z come the outputs of ShiftMix. Where a vector is trained z
    is kept, and the backwards of shift_mix and add_layer_norm run.
    """

    @staticmethod
    def forward(ctx, again, summed, rank, eps, x, mixed, weight, bias, last, reset, *mixes):
        trained = any([ctx.needs_input_grad[i] for i in (6, 7, *range(10, 10 + len(mixes)))])
        inputs = x, mixed, weight, bias, eps, last, reset, mixes
        total, z_last, *made = _norm_shift_op(*inputs, summed, rank, trained)
        kept = (made.pop(0), last) if trained else (None, None)
        ctx.save_for_backward(total, *kept, reset, weight, bias, *mixes)
        ctx.again, ctx.summed, ctx.eps = again, summed, eps
        ctx.set_materialize_grads(False)
        count = len(mixes)
        return total, z_last, *made[:count], *(made[i].detach() for i in again), *made[count:]

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal, dz_last, *gradients):
        total, z, last, reset, weight, bias, *mixes = ctx.saved_tensors
        dtotal, dz_last, *gradients = ready(dtotal, dz_last, *gradients)
        outputs = len(mixes) + len(ctx.again)
        rank = max([0, *(g.shape[-1] for g in gradients[outputs:] if g is not None)])
        sizes = [total.shape[-1]] * outputs + [rank] * len(ctx.summed)
        gradients = [
            total.new_zeros(*total.shape[:-1], size) if g is None else g
            for g, size in zip(gradients, sizes, strict=True)
        ]
        if z is None:
            of_outputs = [*mixes, *(mixes[i] for i in ctx.again)]
            dx, dlast = _norm_shift_backward_op(
                total, dtotal, dz_last, weight, bias, ctx.eps, reset, of_outputs, gradients, ctx.summed
            )
            return None, None, None, None, dx, dx, None, None, dlast, None, *[None] * len(mixes)
        dz, dlast, *dmixes = ShiftMix.gradients(gradients, z, last, reset, mixes, ctx.again, ctx.summed)
        if dz_last is not None:
            dz[:, -1] += dz_last
        dx, *of_norm = _backward_op(total, dz, dtotal, weight, bias, ctx.eps, True)
        return None, None, None, None, dx, dx, *of_norm, dlast, None, *dmixes
