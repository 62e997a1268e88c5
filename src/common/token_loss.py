"""Loss of tokens from their logits, by definition: the cross entropy with RWKV-LM's L2Wrap."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

L2WRAP = 1e-4


class _L2Wrap(torch.autograd.Function):
    """Identity on the loss that adds L2WRAP * max(logits) to the gradient at each token's arg-max.

    So logits stay small. A token's weight multiplies its term too.
    """

    @staticmethod
    def forward(ctx, loss, logits, weights):
        top, where = logits.max(-1, keepdim=True)
        ctx.save_for_backward(top if weights is None else top * weights.unsqueeze(1), where)
        ctx.like = logits.shape, logits.dtype
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        top, where = ctx.saved_tensors
        shape, dtype = ctx.like
        pull = torch.zeros(shape, dtype=dtype, device=top.device)
        return grad, pull.scatter_(-1, where, (L2WRAP * grad * top).to(dtype)), None


def loss_sum(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum the cross entropy in nats: logits (tokens, V), targets (tokens,) int64 -> scalar.

    It is computed in fp32, or in float64 for such logits, and is 0 for no tokens. The gradient has L2Wrap's
    term, 1e-4 * max logit at the arg-max of every token. Dividing by the number of tokens gives RWKV-LM's
    mean loss and its factor 1e-4 / (B T). Weights (tokens,) multiply the loss of a token and its term; their
    sum is then the divisor.
    """
    exact = logits if logits.dtype == torch.float64 else logits.float()
    if weights is None:
        loss = F.cross_entropy(exact, targets, reduction="sum")
    else:
        loss = (F.cross_entropy(exact, targets, reduction="none") * weights).sum()
    return _L2Wrap.apply(loss, exact, weights) if len(targets) else loss


def wide(logits: Tensor) -> Tensor:
    """Return the logits in at least fp32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
