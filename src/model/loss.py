"""Training loss, a sum over the trained tokens with RWKV-LM's L2Wrap, and ln p of each token.

common/token_loss.py defines the loss, from logits. `head_loss` computes it from the head's input, with the
logits of a few tokens at a time. It makes the gradients of input and weight at once, because the gradient of
the loss, one number, only scales them. `head_log_probs` returns a number for each token, whose gradient
scales that of the input, too. The gradient of a weight is a sum over the tokens: for it the logits are made a
second time.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from rwkv_miss.gemm import add_product_, product, product_into

from ..common.token_loss import L2WRAP, wide
from ..ops.launch_errors import require_started
from ..ops.native import ACTIVATION_DTYPES, DTYPE_CODES, context, library, once_differentiable

LOGITS_AT_ONCE = 1 << 24  # 64 MiB in fp32, of enough tokens for a fast product
LOWEST = -65504.0  # the smallest ln p, in fp16; its exp() is 0


def head_loss(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    native: bool = False,
    weights: Tensor | None = None,
    exact: bool = False,
    logit_loss: LogitLoss | None = None,
) -> Tensor:
    """Compute loss_sum(x W^T, targets, weights), a scalar, or logit_loss.sums() of these: x (tokens, C),
    weight (V, C), targets (tokens,) int64.

    x and the weight have one dtype; the result is in at least fp32. `exact`: the logits are unrounded, in at
    least fp32, too (see gemm.product_exact). Kept for the backward are the gradients of x and of the weight,
    if they require one. With `native` the softmax is that of cuda/loss.cu, which needs `exact`, or of
    cuda/loss_cpu.cpp, for the dtypes that these take. `weights` are (tokens,) fp32.

    A target that is not in the vocabulary is an error on a CPU. On a GPU, where nothing may wait, it makes
    the native loss NaN.
    """
    if not torch.is_grad_enabled():
        x, weight = x.detach(), weight.detach()
    native = native and x.dtype in ACTIVATION_DTYPES.get(x.device.type, ())
    blocks = Blocks(x, weight, targets, weights, native, exact, logit_loss=logit_loss)
    return HeadLoss.apply(x, weight, blocks)


class LogitLoss(Protocol):
    """Loss of tokens that needs all of their logits; src/losses/distill.py has one."""

    numbers: Tensor  # (tokens, ...), what else it reads of each token
    per_token: tuple[int, ...]  # shape of the numbers that losses_of() returns for a token

    def sums(self, logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        """Sum the loss, or numbers that begin with it, over tokens: the definition. logits (tokens, V)."""

    def losses_of(self, logits: Tensor, part: slice, weights: Tensor | None, blocks: Blocks) -> Tensor:
        """Return the numbers (*per_token, tokens) of a part of the tokens, each times its weight; the logits
        become the gradient of the loss, by blocks.gradient_in()."""

    def _replace(self, **fields: Any) -> LogitLoss: ...


def head_log_probs(
    x: Tensor, weight: Tensor, targets: Tensor, native: bool = False, exact: bool = False
) -> Tensor:
    """Compute ln p of each target: x (tokens, C), weight (V, C), targets (tokens,) int64 -> (tokens,).

    Dtypes and settings are those of head_loss, but the weight may have another dtype, which its gradient then
    has. There is no L2Wrap. Kept for the backward is the gradient of x, or x if the weight is trained.
    """
    if not torch.is_grad_enabled():
        x, weight = x.detach(), weight.detach()
    native = native and x.dtype in ACTIVATION_DTYPES.get(x.device.type, ())
    return _HeadLogProbs.apply(x, weight, targets, native, exact)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Losses of x W^T, as many tokens at a time as LOGITS_AT_ONCE allows. Fields are as for head_loss."""

    x: Tensor
    weight: Tensor
    targets: Tensor
    weights: Tensor | None
    native: bool
    exact: bool
    l2wrap: float = L2WRAP
    logit_loss: LogitLoss | None = None
    rooms: list[Tensor] = dataclasses.field(default_factory=list)  # kept by a logit loss from block to block

    def losses_of(self, logits: Tensor, part: slice) -> Tensor:
        """Return the losses (*per_token, tokens) of a part of the tokens from its logits, which become the
        gradient of the first number."""
        weights = None if self.weights is None else self.weights[part]
        if self.logit_loss is None:
            return self.cross_entropy(logits, part, weights)
        return self.logit_loss.losses_of(logits, part, weights, self)

    def cross_entropy(self, logits: Tensor, part: slice, weights: Tensor | None) -> Tensor:
        """Return the cross entropy of each token; the logits become its gradient."""
        softmax_loss = torch.ops.rwkv.softmax_loss_ if self.native else softmax_loss_
        return softmax_loss(logits, self.targets[part], weights, self.x.dtype, self.l2wrap)

    def gradient_in(self, logits: Tensor) -> Tensor:
        """View the gradient (tokens, V), which has the dtype of x, in the memory of the logits."""
        return in_place_of(logits, self.x.dtype)

    @property
    def per_token(self) -> tuple[int, ...]:
        """Return the shape of the numbers that a token has."""
        return () if self.logit_loss is None else self.logit_loss.per_token

    @property
    def wide(self) -> torch.dtype:
        """Return the dtype of the losses."""
        return torch.promote_types(self.x.dtype, torch.float32)

    def losses(self, dx: Tensor | None, dw: Tensor | None) -> Iterator[Tensor]:
        """Yield the losses (*per_token, tokens) of a block of tokens at a time.

        The gradients of the first one's sum are written to `dx` and added to `dw`, if these are not None.
        """
        x, vocab = self.x, len(self.weight)
        at_once = max(1, LOGITS_AT_ONCE // vocab)  # tokens
        if dw is not None:  # is read and written for each block: its logits are at least as large
            at_once = max(at_once, x.shape[1])
        block = x.new_empty(min(at_once, len(x)), vocab, dtype=self.wide if self.exact else x.dtype)
        for start in range(0, len(x), at_once):
            part = slice(start, start + at_once)
            logits = product_into(block[: len(x[part])], x[part], self.weight)
            yield self.losses_of(logits, part)
            gradient = self.gradient_in(logits)
            if dx is not None:
                dx[part] = product(gradient, self.weight.t())
            if dw is not None:
                add_product_(dw, gradient.t(), x[part].t())


class HeadLoss(torch.autograd.Function):
    """Sums over all tokens of what blocks yield: the loss, or numbers that begin with it."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, blocks: Blocks) -> Tensor:
        need_dx, need_dw, *_ = ctx.needs_input_grad
        dx = torch.empty_like(x) if need_dx else None
        dw = torch.zeros_like(weight, dtype=blocks.wide) if need_dw else None
        total = torch.zeros(blocks.per_token, dtype=blocks.wide, device=x.device)
        for losses in blocks.losses(dx, dw):
            total += losses.sum(-1)
        ctx.save_for_backward(dx, dw)
        ctx.dtype = x.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor):
        # in the loss's own dtype: 1 / tokens in bf16 would be off by up to 0.2 %
        dloss = dloss.flatten()[0]
        dx, dw = (None if d is None else (d.to(dloss.dtype) * dloss).to(ctx.dtype) for d in ctx.saved_tensors)
        return dx, dw, None


class _HeadLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, native: bool, exact: bool) -> Tensor:
        need_dx, need_dw, *_ = ctx.needs_input_grad
        blocks = Blocks(x, weight.to(x.dtype), targets, None, native, exact, l2wrap=0.0)
        dx = torch.empty_like(x) if need_dx and not need_dw else None
        log_probs = [-losses for losses in blocks.losses(dx, None)]
        ctx.save_for_backward(*((x, weight, targets) if need_dw else (dx,)))
        ctx.native, ctx.exact = native, exact
        return torch.cat(log_probs) if log_probs else torch.zeros(0, dtype=blocks.wide, device=x.device)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        need_dx, need_dw, *_ = ctx.needs_input_grad
        if not need_dw:
            (dx,) = ctx.saved_tensors
            return (dx.to(dout.dtype) * -dout.unsqueeze(1)).to(dx.dtype), None, None, None, None
        x, weight, targets = ctx.saved_tensors
        dx = torch.zeros_like(x) if need_dx else None
        dw = torch.zeros_like(weight, dtype=dout.dtype)
        if len(x):
            # scaled to at most 1 in the softmax: fp16 holds no more than 65504, and loses small values
            largest = dout.abs().max().clamp(min=torch.finfo(dout.dtype).tiny)
            blocks = Blocks(
                x, weight.to(x.dtype), targets, -dout / largest, ctx.native, ctx.exact, l2wrap=0.0
            )
            for _ in blocks.losses(dx, dw):
                pass
            dx = None if dx is None else (dx.to(dout.dtype) * largest).to(x.dtype)
            dw *= largest
        return dx, dw.to(weight.dtype), None, None, None


def top_of(logits: Tensor, count: int, temperature: float) -> Tensor:
    """Return (tokens, 2 count + 1) in at least fp32, from logits (tokens, V).

    Of each token these are the ids of the `count` likeliest tokens, ln p of each at the temperature, and ln p
    of all others together.
    """
    log_probs = (wide(logits) / temperature).log_softmax(1)
    top, ids = log_probs.topk(count, 1)
    rest = log_probs.scatter_(1, ids, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([ids.to(top.dtype), top.clamp(min=LOWEST), rest.clamp(min=LOWEST)], 1)


def in_place_of(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """View (tokens, V) of a narrower dtype in the memory of logits: each row begins where its row begins."""
    return logits if logits.dtype == dtype else logits.view(dtype)[:, : logits.shape[1]]


def softmax_loss_(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    dtype: torch.dtype | None = None,
    l2wrap: float = L2WRAP,
) -> Tensor:
    """Compute the loss of each token of logits (tokens, V), times its weight if it has one, in at least fp32.

    The logits become their gradient in place, with L2Wrap's term of this factor: in their own dtype, or in
    `dtype` as by in_place_of().
    """
    exact = wide(logits)
    top, where = exact.max(-1, keepdim=True)
    targets = targets.unsqueeze(1)
    own = exact.gather(1, targets)
    gradient = exact.sub_(top) if exact is logits else exact - top
    total = gradient.exp_().sum(-1, keepdim=True)
    gradient.div_(total).scatter_add_(1, targets, -torch.ones_like(own)).scatter_add_(1, where, l2wrap * top)
    loss = (total.log() + top - own).squeeze(1)
    if weights is not None:
        gradient.mul_(weights.unsqueeze(1))
        loss = loss * weights
    dtype = dtype or logits.dtype
    in_place_of(logits, dtype).copy_(gradient.to(dtype))  # two copies, as they share memory
    return loss


def _native_softmax_loss_(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    dtype: torch.dtype | None = None,
    l2wrap: float = L2WRAP,
) -> Tensor:
    tokens, vocab = logits.shape
    device, dtype = logits.device.type, dtype or logits.dtype
    loss = logits.new_empty(tokens, dtype=torch.float32)
    in_range = (
        targets.dtype == torch.int64
        and targets.shape == (tokens,)
        # on a GPU this check would wait: there the loss of such a token is NaN
        and (device == "cuda" or not tokens or 0 <= targets.min() <= targets.max() < vocab)
    )
    if not in_range or not logits.is_contiguous():
        raise ValueError(
            f"softmax_loss_: targets are {targets.dtype} {tuple(targets.shape)}, logits {tuple(logits.shape)}"
            f" with strides {logits.stride()}; expected contiguous logits, and for each token an int64 target"
            f" from 0 to {vocab - 1}"
        )
    if (
        logits.dtype != (torch.float32 if device == "cuda" else dtype)
        or dtype not in ACTIVATION_DTYPES[device]
    ):
        raise ValueError(
            f"softmax_loss_: logits are {logits.dtype} and their gradient {dtype}; expected fp32 logits on a"
            " GPU, and one dtype, fp32 or bf16, on a CPU"
        )
    if weights is not None and (weights.dtype != torch.float32 or weights.shape != (tokens,)):
        raise ValueError(
            f"softmax_loss_: weights are {weights.dtype} {tuple(weights.shape)}; expected torch.float32"
            f" {(tokens,)}"
        )
    arguments = (logits, targets.contiguous(), None if weights is None else weights.contiguous(), loss)
    require_started("softmax_loss_", launch(library(device), *arguments, dtype, context(logits), l2wrap))
    return loss


def launch(
    library: ctypes.CDLL,
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    loss: Tensor,
    dtype: torch.dtype,
    context: tuple,
    l2wrap: float = L2WRAP,
) -> int:
    """Have a library write loss and gradient of contiguous tensors; returns 0, or CUDA's error."""
    pointers = [
        ctypes.c_void_p(None if t is None else t.data_ptr()) for t in (logits, targets, weights, loss)
    ]
    sizes = [*map(ctypes.c_int64, logits.shape), ctypes.c_float(l2wrap)]
    return library.softmax_loss(*pointers, *sizes, DTYPE_CODES[dtype], *context)


torch.library.define(
    "rwkv::softmax_loss_",
    "(Tensor(a!) logits, Tensor targets, Tensor? weights=None, ScalarType? dtype=None,"
    f" float l2wrap={L2WRAP}) -> Tensor",
)
torch.library.impl("rwkv::softmax_loss_", ("cpu", "cuda"), _native_softmax_loss_)
torch.library.register_fake(
    "rwkv::softmax_loss_", lambda logits, *others: logits.new_empty(len(logits), dtype=torch.float32)
)
