"""Autograd operators of the methods other than MiSS and LoRA, with the conventions of functional.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..functional import (
    add_expanded_,
    add_repeated_,
    call,
    flat_tokens,
    gradient_of_factor,
    like_tokens,
    operator_backward,
    product_bias,
    product_matrix,
    shard_sum,
    weight_gradients,
    with_kept,
)
from ..gemm import differentiated, product, product_exact, product_onto, product_plus
from ..quantised import shape_of


def _output_shards(y: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Cut y (N, out) into `rank` shards of neighbouring columns.

    Returns the shards that are one longer, (N, shards, size + 1), and the others, (N, shards, size).
    """
    size, longer = y.shape[1] // rank, y.shape[1] % rank  # not divmod, which can't be traced
    first, rest = y.split((longer * (size + 1), (rank - longer) * size), 1)
    return first.unflatten(1, (longer, size + 1)), rest.unflatten(1, (rank - longer, size))


def output_shard_index(out: int, rank: int, device: torch.device | str | None = None) -> Tensor:
    """Return the shard of each of `out` output rows, int64 (out,)."""
    size, longer = divmod(out, rank)
    sizes = torch.full((rank,), size, device=device) + (torch.arange(rank, device=device) < longer)
    return torch.arange(rank, device=device).repeat_interleave(sizes, output_size=out)


def _repeated(h: Tensor, out: int) -> Tensor:
    """Give each of `out` outputs the number of its shard, h (N, r) -> (N, out)."""
    if differentiated():
        return h[:, output_shard_index(out, h.shape[1], h.device)]
    y = h.new_zeros(len(h), out)
    shards = _output_shards(y, h.shape[1])
    for shard, part in zip(shards, h.split([s.shape[1] for s in shards], 1), strict=True):
        add_repeated_(shard, part)
    return y


class _ExpandLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, D):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, D)
        tokens = flat_tokens(x)
        h = product(tokens, D.to(x.dtype))
        y = _repeated(h, shape_of(weight)[0])
        y = product_onto(y, tokens, product_matrix(weight, x.shape[-1], x.dtype), product_bias(bias, x.dtype))
        return with_kept(like_tokens(y, x))

    @staticmethod
    @operator_backward
    def backward(ctx, dy):
        x, weight, D = ctx.saved_tensors
        dy, dx, dD = flat_tokens(dy), None, None
        dh = torch.cat([shard.sum(2) for shard in _output_shards(dy, len(D))], 1)
        if ctx.needs_input_grad[0]:
            matrix = product_matrix(weight, x.shape[-1], dy.dtype)
            dx = product_plus(dy, matrix.t(), None, dh, D.to(dy.dtype)).view(x.shape)
        if ctx.needs_input_grad[3]:
            dD = gradient_of_factor(dh, flat_tokens(x), D.dtype)
        return dx, *weight_gradients(ctx, dy, x, weight), dD


def expand_linear(x: Tensor, weight: Tensor, bias: Tensor | None, D: Tensor) -> Tensor:
    """Compute y = x W^T + bias + expand(x D^T), D (r, in): each of r numbers is added to a shard of outputs.

    A shard has neighbouring outputs. Kept for the backward: x.
    """
    return call(_ExpandLinear, x, weight, bias, D)


class _VeraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, A, B, d, b):
        tokens = flat_tokens(x)
        h = product(tokens, A.to(x.dtype).contiguous())
        ctx.x_shape = x.shape
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h, weight, A, B, d, b, x if weight.requires_grad else None)
        matrix, bias = product_matrix(weight, x.shape[-1], x.dtype), product_bias(bias, x.dtype)
        y = product_plus(tokens, matrix, bias, h, (b.unsqueeze(1) * B * d).to(x.dtype).t())
        return with_kept(like_tokens(y, x), h)

    @staticmethod
    @operator_backward
    def backward(ctx, dy):
        h, weight, A, B, d, b, x = ctx.saved_tensors
        dy, dx = flat_tokens(dy), None
        if ctx.needs_input_grad[0]:
            dh = product(dy, (b.unsqueeze(1) * B * d).to(dy.dtype).t())
            matrix = product_matrix(weight, ctx.x_shape[-1], dy.dtype)
            dx = product_plus(dy, matrix.t(), None, dh, A.to(dy.dtype).contiguous()).view(ctx.x_shape)
        # contribution of each entry of B to the gradients of the two vectors
        multiply = product if dy.dtype == B.dtype else product_exact
        by_entry = multiply(dy.t(), h.t()).to(B.dtype).mul_(B)
        return dx, *weight_gradients(ctx, dy, x, weight), None, None, b @ by_entry, by_entry @ d

    @staticmethod
    def through(ctx, dh):
        A = ctx.saved_tensors[2]
        return product(dh, A.to(dh.dtype).contiguous().t()).view(ctx.x_shape), *(None,) * 6


def vera_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, d: Tensor, b: Tensor
) -> Tensor:
    """Compute y = x W^T + bias + b * ((d * (x A^T)) B^T).

    A (r, in) and B (out, r) have no gradients; d (r), b (out). Kept for the backward: x A^T.
    """
    return call(_VeraLinear, x, weight, bias, A, B, d, b)


def _blocks(x: Tensor, D: Tensor) -> Tensor:
    """View x (N, in) as blocks of columns, one for each matrix of D (in / r, r, r): (in / r, N, r)."""
    return x.unflatten(1, D.shape[:2]).transpose(0, 1)


def _bat_inputs(tokens: Tensor, D: Tensor) -> Tensor:
    """Multiply every block of r inputs by its matrix of D, (in / r, r, r); returns (N, in)."""
    return torch.bmm(_blocks(tokens, D), D.transpose(1, 2)).transpose(0, 1).reshape(tokens.shape)


def _bat_weight(weight: Tensor, D: Tensor, change_only: bool = False) -> Tensor:
    """Compute W + dW (out, in) for D of (out / r, r, r); `change_only`: dW."""
    rank = D.shape[1]
    blocks = weight.contiguous().view(len(D), -1, rank)  # block: the rows of r outputs, cut into pieces of r
    changed = torch.bmm(blocks, D) if change_only else torch.baddbmm(blocks, blocks, D)
    changed.view(len(D), rank, -1, rank).add_(D.unsqueeze(2))
    return changed.view(weight.shape)


class _BatLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, D, by_row):
        ctx.by_row = by_row
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, D)
        tokens, matrix, D = flat_tokens(x), product_matrix(weight, x.shape[-1], x.dtype), D.to(x.dtype)
        bias = product_bias(bias, x.dtype)
        # in half precision a small product added to x or W would be lost in rounding
        half = x.dtype.itemsize < 4
        if by_row:  # because of the I in (W + I) D each block of outputs gets the sum of all blocks of inputs
            moved = _bat_inputs(tokens, D)
            y = product(moved if half else tokens + moved, matrix, None if half else bias)
            add_expanded_(y, shard_sum(moved, D.shape[1]))
            if half:
                y = product_onto(y, tokens, matrix, bias)
        elif half:
            y = product_onto(product(tokens, _bat_weight(matrix, D, change_only=True)), tokens, matrix, bias)
        else:
            y = product(tokens, _bat_weight(matrix, D), bias)
        return with_kept(like_tokens(y, x))

    @staticmethod
    @operator_backward
    def backward(ctx, dy):
        x, weight, kept = ctx.saved_tensors
        dy, tokens, dx, dweight, dD = flat_tokens(dy), flat_tokens(x), None, None, None
        matrix, D, rank = product_matrix(weight, x.shape[-1], dy.dtype), kept.to(dy.dtype), kept.shape[1]
        if ctx.by_row:
            dx = product(dy, matrix.t())
            moved = dx.clone()  # gradient of the input blocks multiplied by D
            add_expanded_(moved, shard_sum(dy, rank))
            dD = torch.bmm(_blocks(moved, D).transpose(1, 2), _blocks(tokens, D))
            dx += _bat_inputs(moved, D.transpose(1, 2))
            if ctx.needs_input_grad[1]:
                dweight = product(dy.t(), (tokens + _bat_inputs(tokens, D)).t())
        else:
            if ctx.needs_input_grad[0]:
                dx = product(dy, _bat_weight(matrix, D).t())
            whole = product(dy.t(), tokens.t())
            dD = torch.bmm(
                matrix.contiguous().view(len(D), -1, rank).transpose(1, 2), whole.view(len(D), -1, rank)
            )
            dD += whole.view(len(D), rank, -1, rank).sum(2)
            if ctx.needs_input_grad[1]:
                dweight = whole + torch.bmm(whole.view(len(D), -1, rank), D.transpose(1, 2)).view(whole.shape)
        return (
            None if dx is None else dx.view(x.shape),
            dweight,
            dy.sum(0) if ctx.needs_input_grad[2] else None,
            dD.to(kept.dtype),
            None,
        )


def bat_linear(x: Tensor, weight: Tensor, bias: Tensor | None, D: Tensor, by_row: bool) -> Tensor:
    """Compute y = x (W + dW)^T + bias, where the r x r blocks of dW are (W[a, b] + I) D[a], D (out / r, r,
    r).

    `by_row`: the blocks are (W[a, b] + I) D[b], D (in / r, r, r). Kept for the backward: x.

    By row dW is never formed: every block of inputs is first multiplied by its matrix, at the cost of a LoRA.
    By column W + dW is formed for each product, and so is the gradient of the whole weight: 1.5 times the
    products of the frozen linear. In half precision both orders compute the product with dW separately, which
    costs half a frozen linear more.
    """
    return call(_BatLinear, x, weight, bias, D, by_row)
