"""The training loss: a sum over the trained tokens, with RWKV-LM's L2Wrap."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

L2WRAP = 1e-4


class _L2Wrap(torch.autograd.Function):
    """Identity on the loss; adds factor * max(logits) to the gradient at each row's arg-max, so that logits stay small."""

    @staticmethod
    def forward(ctx, loss, logits):
        ctx.save_for_backward(*logits.max(-1, keepdim=True))
        ctx.like = logits.shape, logits.dtype
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        top, where = ctx.saved_tensors
        shape, dtype = ctx.like
        pull = torch.zeros(shape, dtype=dtype, device=top.device)
        return grad, pull.scatter_(-1, where, (L2WRAP * grad * top).to(dtype))


def loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy in nats, summed: logits (rows, V), targets (rows,) int64 -> scalar in at least fp32; 0 for no rows.

    The gradient has L2Wrap's term, 1e-4 * max logit at the arg-max of every row. Dividing by the number of rows gives
    RWKV-LM's mean loss and its factor 1e-4 / (B T).
    """
    exact = logits if logits.dtype == torch.float64 else logits.float()
    loss = F.cross_entropy(exact, targets, reduction="sum")
    return _L2Wrap.apply(loss, exact) if len(targets) else loss
