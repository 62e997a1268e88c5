"""Residual sum and the LayerNorm that reads it, for a GPU, as ops: `rwkv::add_layer_norm` and its backward.

Both are one kernel of cuda/add_layer_norm.cuh. The backward keeps the sum, which the next layer needs in any
case. Its gradient is that of both addends: one tensor.
"""

from __future__ import annotations

import torch

from . import elementwise_ops
from .elementwise_ops import check_sizes, library_op, ready
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
