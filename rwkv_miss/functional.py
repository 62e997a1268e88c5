"""The adapters' linear maps as autograd Functions, each with the smallest set of tensors for the backward.

Shapes: x (..., in), weight (out, in), bias (out,) or None, D (r, out), A (r, in), B (out, r), y (..., out).

Dtypes: y has x's dtype, and all other tensors are cast to it for the products. Inside torch.autocast x is
first cast to autocast's dtype, as for torch's own linear. fp64 stays.

The backward keeps the parameter itself, where torch keeps its cast copy. The frozen weight gets a gradient
only when it requires one; only then x is kept. A quantised weight (quantised.py) is expanded for each
product, and kept as it is.

Second derivatives: a backward with create_graph=True computes by torch's own operators (gemm.differentiated).
What a forward computes for its backward is an output, too, so that it has a place in the graph. Inside
torch.func the forward alone runs, by torch's operators, and torch differentiates it.

MiSS (arXiv 2409.15371): x dW^T = S D with the shard sums S[j] = sum of x[i] over i = j (mod r).
- "contiguous" sums neighbouring columns instead: dW[o, i] = D[i // ceil(in / r), o] (equations 2-3).
- "balanced" sums with alternating signs. Inputs with a common mean, such as those after a squared ReLU, would
  all have nearly the same S otherwise. One more entry of S, with a row of D, is the sum of all / sqrt(in).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .gemm import (
    differentiated,
    in_torch_func,
    product,
    product_exact,
    product_onto,
    product_plus,
    product_transposed,
)
from .quantised import dense, is_of_others, shape_of

Function = Callable[..., Any]
_unsafe_view = torch.ops.aten._unsafe_view.default  # looked up once: 0.6 us of each call


def shard_sum(x: Tensor, rank: int, contiguous: bool = False, balanced: bool = False) -> Tensor:
    """Sum `rank` shards of the last axis, (..., in) -> (..., rank).

    Where rank does not divide the width, some shards have fewer columns.

    `balanced`: every other column of a shard is subtracted, and one more number, the last, is the sum of all
    columns / sqrt(in).
    """
    width = x.shape[-1]
    size = -(-width // rank)
    if size * rank != width and not (contiguous or balanced):  # padding would copy x
        whole = width - width % rank
        sums = x[..., :whole].unflatten(-1, (-1, rank)).sum(-2)
        sums[..., : width - whole] += x[..., whole:]
        return sums
    if size * rank != width:
        x = F.pad(x, (0, size * rank - width))
    leading = x.shape[:-1]
    if contiguous:
        shards = x.reshape(*leading, rank, size).transpose(-1, -2)
    else:
        shards = x.reshape(*leading, size, rank)
    if not balanced:
        return shards.sum(-2)
    even, odd = shards[..., ::2, :].sum(-2), shards[..., 1::2, :].sum(-2)
    return torch.cat((even - odd, (even + odd).sum(-1, keepdim=True) * width**-0.5), -1)


def with_shard_sums(x: Tensor, sums: Tensor) -> Tensor:
    """Return x, which carries its shard_sum() to the linear that reads it.

    The function that made x also returns `sums`. The linear then gives `sums` a gradient of its own, and x
    the gradient without that part. A copy or view of x carries no sums; then the linear sums x itself.
    """
    x.shard_sums = sums
    return x


def shard_index(
    width: int, rank: int, contiguous: bool = False, device: torch.device | str | None = None
) -> Tensor:
    """Return the shard of each of `width` input columns, int64 (width,)."""
    column = torch.arange(width, device=device)
    return column // -(-width // rank) if contiguous else column % rank


def shard_signs(
    width: int, rank: int, contiguous: bool = False, device: torch.device | str | None = None
) -> Tensor:
    """Return the sign, 1 or -1, of each of `width` input columns in its balanced shard, int64 (width,)."""
    column = torch.arange(width, device=device)
    return 1 - 2 * ((column % -(-width // rank) if contiguous else column // rank) % 2)


def add_repeated_(x: Tensor, values: Tensor) -> None:
    """Add: x[n, j, :] += values[n, j], in place. x (N, r, size), values (N, r)."""
    # contiguous: in bf16 4 to 9 times as fast as an addition of the expanded view
    x.add_(values.unsqueeze(2).expand_as(x).contiguous())


def _columns_of_shards(
    dx: Tensor, ds: Tensor, contiguous: bool, balanced: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Transpose shard_sum in parts: (view of dx (N, in), the values of its columns in ds (N, r or r + 1)).

    Where all columns of a shard have one value, the values have one number for them.
    """
    width, rank = dx.shape[1], ds.shape[1] - balanced
    if width % rank == 0 and not (contiguous or balanced):  # the usual case, in the fewest calls
        yield dx.view(-1, width // rank, rank), ds.unsqueeze(1)
        return
    parts = [(slice(None), ds)]
    if balanced:
        mean = ds[:, rank:] * width**-0.5
        parts = [(slice(0, None, 2), mean + ds[:, :rank]), (slice(1, None, 2), mean - ds[:, :rank])]
    size = -(-width // rank) if contiguous else rank
    count = width // size
    whole, rest = dx[:, : count * size].unflatten(1, (count, size)), dx[:, count * size :]
    for part, values in parts:
        if contiguous:  # the last shard may be shorter, and some after it empty
            yield whole[:, :, part], values[:, :count].unsqueeze(2)
            if rest.shape[1]:
                yield rest[:, part], values[:, count : count + 1]
        else:
            yield whole[:, part], values.unsqueeze(1)
    if rest.shape[1] and not contiguous:
        yield rest, parts[count % len(parts)][1][:, : rest.shape[1]]


def add_expanded_(dx: Tensor, ds: Tensor, contiguous: bool = False, balanced: bool = False) -> None:
    """Add the transpose of shard_sum in place: dx[n, i] += the value of column i in ds[n].

    dx (N, in), ds (N, r), or (N, r + 1) if balanced.
    """
    for part, values in _columns_of_shards(dx, ds, contiguous, balanced):
        if values.shape[-1] < part.shape[-1] and part.dim() == 3:
            add_repeated_(part, values.squeeze(2))
        else:
            part.add_(values)


def expanded(ds: Tensor, width: int, contiguous: bool = False, balanced: bool = False) -> Tensor:
    """Expand ds by the transpose of shard_sum, (N, r or r + 1) -> (N, width): each number is written once."""
    dx = ds.new_empty(ds.shape[0], width)
    for part, values in _columns_of_shards(dx, ds, contiguous, balanced):
        part.copy_(values)
    return dx


def in_autocast(device: torch.device) -> bool:
    """Tell whether torch.autocast is on for a device.

    torch.is_autocast_enabled() fails for devices without autocast, such as meta.
    """
    has_autocast = device.type in ("cpu", "cuda") or torch.amp.is_autocast_available(device.type)
    return has_autocast and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Turn the caller's torch.autocast off: the block computes in the dtypes of its tensors."""
    return torch.autocast(device.type, enabled=False) if in_autocast(device) else contextlib.nullcontext()


def autocast(x: Tensor) -> Tensor:
    """Cast x to the dtype of the caller's torch.autocast. Without autocast, and in fp64, x stays."""
    if not in_autocast(x.device) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


class _NoContext:
    """Context of a forward whose backward is torch's: it keeps nothing."""

    def set_materialize_grads(self, value: bool) -> None: ...

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


def call(function: type[torch.autograd.Function], x: Tensor, *others: Any) -> Tensor:
    """Call function.apply(x, *others) with autocast off and x in its dtype; returns the first output.

    Inside torch.func torch differentiates the forward: setup_context() would take 19 us of each call.
    """
    run = functools.partial(function.forward, _NoContext()) if in_torch_func() else function.apply
    if not in_autocast(x.device):
        return run(x, *others)[0]
    x = autocast(x)
    with without_autocast(x.device):
        return run(x, *others)[0]


def with_kept(y: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
    """Return what a forward returns: y, and what it computed for the backward.

    As outputs these tensors have a place in the graph, which a second derivative needs. There is none of a
    compiled model, and its backward would compute with their gradients, zeros.
    """
    return (y,) if torch.compiler.is_compiling() else (y, *kept)


def operator_backward(backward: Function) -> Function:
    """Decorate an operator's backward(ctx, dy, *dkept), which may be called inside a caller's autocast.

    dkept: the gradients of with_kept()'s tensors, in a second derivative. Then the operator's
    through(ctx, *dkept) gives their part of the inputs' gradients. Without a dy, backward() is not called.
    """

    @functools.wraps(backward)
    def compute(ctx, dy, *dkept):
        for d in dkept:
            if d is not None:
                return _second(compute, _ReadContext(ctx), dy, dkept)
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        if not in_autocast(dy.device):
            return backward(ctx, dy)
        with without_autocast(dy.device):
            return backward(ctx, dy)

    return compute


class _ReadContext:
    """Context whose saved tensors have been read: an activation checkpoint lets them be read once."""

    def __init__(self, ctx: Any) -> None:
        self.ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ctx, name)


def _second(
    backward: Function, ctx: _ReadContext, dy: Tensor | None, dkept: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Add to backward(ctx, dy) what reaches the inputs through the tensors that the forward has kept."""
    with without_autocast(next(d.device for d in dkept if d is not None)):
        further = ctx._forward_cls.through(ctx, *dkept)
    pairs = zip(backward(ctx, dy), further, strict=True)
    return tuple([b if a is None else a if b is None else a + b for a, b in pairs])


def flat_tokens(x: Tensor) -> Tensor:
    """Reshape (..., n) -> (tokens, n)."""
    return x.reshape(-1, x.shape[-1])


def like_tokens(y: Tensor, x: Tensor) -> Tensor:
    """Reshape an operator's result (tokens, n) to the leading axes of its input x (..., in).

    The result is no view, because torch refuses writes into a view that an operator made, such as
    ReLU(inplace=True)'s.
    """
    return _unsafe_view(y, [*x.shape[:-1], y.shape[-1]])


def weight_gradients(
    ctx: Any, dy: Tensor, x: Tensor | None, weight: Tensor, transposed: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """Compute (dweight, dbias), None if not needed; weight and bias are the operator's arguments 1 and 2."""
    dweight = None
    if ctx.needs_input_grad[1]:
        x = flat_tokens(x)
        multiply = product if weight.dtype == dy.dtype else product_exact
        dweight = multiply(x.t(), dy.t()) if transposed else multiply(dy.t(), x.t())
    return dweight, dy.sum(0) if ctx.needs_input_grad[2] else None


def gradient_of_factor(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute a^T b in a parameter's dtype, with fp32 sums: a (N, r), b (N, n)."""
    a_t = a.t()
    if a.device.type == "cpu":  # the copy is small, and without it the product is 10 % slower
        a_t = a_t.contiguous()
    if a.dtype == dtype:
        return product_transposed(a_t, b)
    return product_exact(a_t, b.t()).to(dtype)


def product_matrix(weight: Tensor, width: int, dtype: torch.dtype, transposed: bool = False) -> Tensor:
    """Cast the weight (out, in) to the dtype of a product; `transposed`: it is (in, out)."""
    if transposed:
        return weight.t().to(dtype)
    if weight.dtype == dtype and not is_of_others(weight):
        return weight
    return dense(weight, width, dtype).to(dtype)


def product_bias(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Cast the bias to the dtype of a product."""
    return None if bias is None else bias.to(dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, transposed, exact):
        ctx.x_shape, ctx.transposed, ctx.dtype = x.shape, transposed, x.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, x if weight.requires_grad else None)
        matrix = product_matrix(weight, x.shape[-1], x.dtype, transposed)
        tokens, bias = flat_tokens(x), product_bias(bias, x.dtype)
        y = product_exact(tokens, matrix) if exact else product(tokens, matrix, bias)
        return with_kept(like_tokens(y, x))

    @staticmethod
    @operator_backward
    def backward(ctx, dy):
        weight, x = ctx.saved_tensors
        dy, dx = flat_tokens(dy).to(ctx.dtype), None
        if ctx.needs_input_grad[0]:
            matrix = product_matrix(weight, ctx.x_shape[-1], dy.dtype, ctx.transposed)
            dx = product_transposed(dy, matrix).view(ctx.x_shape)
        return dx, *weight_gradients(ctx, dy, x, weight, ctx.transposed), None, None


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, transposed: bool = False, exact: bool = False
) -> Tensor:
    """Compute y = x W^T + bias; `transposed`: the weight is W^T, (in, out). `exact`: by product_exact(),
    without a bias.

    Kept for the backward: the weight, and x only if the weight requires a gradient.

    A caller can't pass a transposed view instead: under ZeRO-3 the backward would keep the whole parameter.
    """
    return call(_Linear, x, weight, bias, transposed, exact)


def sums_go_on(device: torch.device) -> bool:
    """Tell whether adding a product to a large matrix costs no more than writing it, as on a GPU."""
    return device.type == "cuda"


class _MissLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, D, shards, sums):
        contiguous, balanced, scale = shards
        rank, out = D.shape[0] - balanced, shape_of(weight)[0]
        carried = sums is not None
        tokens, D_cast = flat_tokens(x), D.to(x.dtype)
        s = flat_tokens(sums).to(x.dtype) if carried else shard_sum(tokens, rank, contiguous, balanced)
        if scale != 1:
            s[:, :rank].mul_(scale)
        ctx.x_shape, ctx.shards, ctx.dtype, ctx.carried = x.shape, shards, D.dtype, carried
        ctx.set_materialize_grads(False)
        exact = None if D_cast is D else D  # for a second derivative
        # D's cast copy: one kernel launch less in the backward, and far smaller than S
        ctx.save_for_backward(s, weight, D_cast, x if weight.requires_grad else None, exact)
        matrix, bias = product_matrix(weight, x.shape[-1], x.dtype), product_bias(bias, x.dtype)
        if D.shape[1] == out:
            y = product_plus(tokens, matrix, bias, s, D_cast)
        else:
            repeated = product(s, D_cast.t()).repeat(1, -(-out // D.shape[1]))[:, :out]
            y = product_onto(repeated.contiguous(), tokens, matrix, bias)
        return with_kept(like_tokens(y, x), s)

    @staticmethod
    @operator_backward
    def backward(ctx, dy):
        s, weight, D, x, exact = ctx.saved_tensors
        if exact is not None and differentiated():
            D = exact.to(D.dtype)
        contiguous, balanced, scale = ctx.shards
        dy, dx, dD, dsums = flat_tokens(dy), None, None, None
        part = dy if D.shape[1] == dy.shape[1] else shard_sum(dy, D.shape[1])
        if ctx.needs_input_grad[0]:
            ds = product(part, D)
            if scale != 1:
                ds[:, : D.shape[0] - balanced].mul_(scale)
            width = ctx.x_shape[-1]
            matrix = product_matrix(weight, width, dy.dtype)
            if ctx.carried:  # the function that made x adds ds to dx
                dx, dsums = product_transposed(dy, matrix), ds.view(*ctx.x_shape[:-1], -1)
            elif sums_go_on(dy.device):  # write ds first, so that dx is not read and written again
                dx = product_onto(expanded(ds, width, contiguous, balanced), dy, matrix.t())
            else:
                dx = product_transposed(dy, matrix)
                add_expanded_(dx, ds, contiguous, balanced)
            dx = dx.view(ctx.x_shape)
        if ctx.needs_input_grad[3]:
            dD = gradient_of_factor(s, part, ctx.dtype)
        return dx, *weight_gradients(ctx, dy, x, weight), dD, None, dsums

    @staticmethod
    def through(ctx, ds):
        contiguous, balanced, scale = ctx.shards
        rank = ds.shape[1] - balanced
        ds = torch.cat((ds[:, :rank] * scale, ds[:, rank:]), 1)
        if ctx.carried:
            return *(None,) * 5, ds.view(*ctx.x_shape[:-1], -1)
        return expanded(ds, ctx.x_shape[-1], contiguous, balanced).view(ctx.x_shape), *(None,) * 5


def miss_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    D: Tensor,
    contiguous: bool = False,
    balanced: bool = False,
    scale: float = 1,
) -> Tensor:
    """Compute y = x W^T + bias + S(x) D.

    Kept for the backward in x's dtype: S (tokens, r), and a copy of D if D has another dtype. The default
    scale is an integer: a float would be a variable for a compiler with dynamic shapes.

    `balanced`: S and D have one more entry, for the mean. `scale` multiplies the shard sums, not the mean.
    D of shape (r, m) with m < out repeats its columns, D[:, o mod m]; the last repeat is cut off where m does
    not divide out.
    """
    sums = getattr(x, "shard_sums", None)
    if sums is not None and (contiguous or balanced or scale != 1 or sums.shape[-1] != len(D)):
        sums = None
    return call(_MissLinear, x, weight, bias, D, (contiguous, balanced, scale), sums)
