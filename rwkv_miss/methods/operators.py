"""Autograd operators of the methods other than MiSS, with the conventions of functional.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
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
from ..gemm import differentiated, in_torch_func, product, product_exact, product_onto, product_plus
from ..quantised import shape_of


def _drop(x: Tensor, dropout: float, seed: Tensor) -> Tensor:
    generator = torch.Generator(x.device).manual_seed(int(seed))
    kept = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(
        1 - dropout, generator=generator
    )
    return x.mul(kept).div_(1 - dropout)


# A registered operator, because torch.compile traces the backwards that call it without values of a seed.
torch.library.define("rwkv_miss::drop", "(Tensor x, float dropout, Tensor seed) -> Tensor")
torch.library.impl("rwkv_miss::drop", "default", _drop)
torch.library.register_fake("rwkv_miss::drop", lambda x, dropout, seed: torch.empty_like(x))


def dropped(x: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """Set each number of x (N, in) to 0 with probability `dropout`, else divide it by 1 - dropout.

    A seed (0-dim, int64) always drops the same places; without one x stays.
    """
    if seed is None:
        return x
    second = torch.is_grad_enabled() and not torch.compiler.is_compiling()  # the operator has no derivative
    return (_drop if second else torch.ops.rwkv_miss.drop)(x, dropout, seed)


def _times(
    x: Tensor, factor: Tensor | float, dtype: torch.dtype, layout: Any = torch.preserve_format
) -> Tensor:
    """Multiply x by a factor for each column, or one, in `dtype`: rounded once, without a copy in fp32."""
    if differentiated():
        return (x * factor).to(dtype)
    return torch.mul(x, factor, out=torch.empty_like(x, dtype=dtype, memory_format=layout))


def scaled(B: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Compute scale B in B's dtype, rounded once."""
    return B.to(dtype) if scale == 1 else _times(B, scale, dtype, torch.contiguous_format)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scale, dropout, seed):
        tokens, A_cast, B_scaled = flat_tokens(x), A.to(x.dtype), scaled(B, scale, x.dtype)
        if seed is not None and in_torch_func():  # torch draws, because vmap's seeds have no values
            h = product(F.dropout(tokens, dropout), A_cast)
        else:
            h = product(dropped(tokens, dropout, seed), A_cast)
        ctx.x_shape, ctx.scale, ctx.dropout, ctx.dtypes = x.shape, scale, dropout, (A.dtype, B.dtype)
        ctx.set_materialize_grads(False)
        keeps_x = A.requires_grad or weight.requires_grad
        ctx.save_for_backward(x if keeps_x else None, h, weight, A_cast, B_scaled, seed)
        matrix = product_matrix(weight, x.shape[-1], x.dtype)
        y = product_plus(tokens, matrix, product_bias(bias, x.dtype), h, B_scaled.t())
        kept = [A_cast] if A_cast is not A else []
        if not A.requires_grad:  # otherwise a second derivative computes h again
            kept = [h]
        if B_scaled is not B:
            kept.append(B_scaled)
        return with_kept(like_tokens(y, x), *kept)

    @staticmethod
    @operator_backward
    def backward(ctx, dy):
        x, h, weight, A, B_scaled, seed = ctx.saved_tensors
        dy, dx, dA, dB = flat_tokens(dy), None, None, None
        if ctx.needs_input_grad[3] and differentiated():
            h = product(dropped(flat_tokens(x), ctx.dropout, seed), A)
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[3]:
            dh = product(dy, B_scaled.t())
        if ctx.needs_input_grad[0]:
            matrix = product_matrix(weight, ctx.x_shape[-1], dy.dtype).t()
            if seed is None:
                dx = product_plus(dy, matrix, None, dh, A).view(ctx.x_shape)
            else:
                through_A = dropped(product(dh, A.t()), ctx.dropout, seed)
                dx = product(dy, matrix).add_(through_A).view(ctx.x_shape)
        if ctx.needs_input_grad[3]:
            dA = gradient_of_factor(dh, dropped(flat_tokens(x), ctx.dropout, seed), ctx.dtypes[0])
        if ctx.needs_input_grad[4]:
            multiply = product if dy.dtype == ctx.dtypes[1] else product_exact
            dB = multiply(dy.t(), h.t()).mul_(ctx.scale).to(ctx.dtypes[1])
        return dx, *weight_gradients(ctx, dy, x, weight), dA, dB, None, None, None

    @staticmethod
    def through(ctx, *dkept):
        _, _, _, A, _, seed = ctx.saved_tensors
        first, dA, dx = dkept[0], None, None
        if first is not None and not ctx.needs_input_grad[3]:
            dx = dropped(product(first, A.t()), ctx.dropout, seed).view(ctx.x_shape)
        elif first is not None and A.dtype != ctx.dtypes[0]:
            dA = first.to(ctx.dtypes[0])
        is_made = ctx.scale != 1 or A.dtype != ctx.dtypes[1]
        dB = scaled(dkept[-1], ctx.scale, ctx.dtypes[1]) if is_made and dkept[-1] is not None else None
        return dx, None, None, dA, dB, None, None, None


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Compute y = x W^T + bias + scale x' A^T B^T with x' = dropped(x, dropout, seed).

    Kept for the backward: x' A^T; x unless A is frozen; copies of A and scale B if x has another dtype.

    The backward draws the dropped places again, which takes no memory and less time than reading them.
    """
    return call(_LoraLinear, x, weight, bias, A, B, scale, dropout, seed)


class _TimesColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor, bias):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if factor.requires_grad else None, factor)
        y = _times(x, factor, x.dtype)
        return with_kept(y if bias is None else y.add_(bias))

    @staticmethod
    @operator_backward
    def backward(ctx, dy):
        (x, factor), dx, dfactor = ctx.saved_tensors, None, None
        if ctx.needs_input_grad[0]:
            dx = _times(dy, factor, dy.dtype)
        if ctx.needs_input_grad[1]:
            dfactor = flat_tokens(dy * x).sum(0, dtype=factor.dtype)
        return dx, dfactor, flat_tokens(dy).sum(0) if ctx.needs_input_grad[2] else None


def times_columns(x: Tensor, factor: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute y = x diag(factor) + bias for x (..., out) and factor (out), fp32. Kept for the backward: x.

    The product is rounded once: a factor near 1 in bf16 would move in steps of 0.8 % above it and 0.4 %
    below, before it is used.
    """
    return call(_TimesColumns, x, factor, bias)


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
