"""Loss of distillation: the cross entropy of a token, and the KL to a student q from a teacher p.

    (1 - mix) CE + mix T^2 KL(p || q)

p and q are the softmax of logits / T, of the teacher and of the model in training. T^2 keeps the size of the
gradient, which has 1 / T^2 (Hinton, Vinyals and Dean 2015, arXiv 1503.02531, section 2). Of p the likeliest
tokens are known. All others are one class more, in p and in q, as with `loss_add_tail` of TRL's trainers on a
teacher's server: without it a model could move all it has of them anywhere. KL of fewer classes is a lower
bound of KL over the vocabulary. Inside the last class the gradient keeps the model's own proportions.

`distillation_sums` defines the loss, from logits. `head_distillation` computes it from the head's input by
blocks of tokens, as loss.py does. The cross entropy has the term of L2Wrap, and the KL none.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.native import ACTIVATION_DTYPES
from .loss import Blocks, HeadLoss, in_place_of, loss_sum, wide
from .reverse_kl import WholeTeacher

LOWEST = -65504.0  # the smallest ln p, in fp16; its exp() is 0


class Teacher(NamedTuple):
    """Values of a teacher for some tokens, and the settings of the loss.

    `numbers` are (tokens, 2 k + 1) in fp32: the ids of its k likeliest tokens, ln p of each at the
    temperature, and ln p of all others together.
    """

    numbers: Tensor
    mix: float
    temperature: float

    @property
    def blocks(self) -> type[Blocks]:
        return TeacherBlocks

    def sums(self, logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        """Call distillation_sums()."""
        return distillation_sums(logits, targets, weights, self)

    def classes(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return (ids (tokens, k) int64, ln p (tokens, k + 1), of which the exp() adds up to 1)."""
        count = self.numbers.shape[1] // 2
        return self.numbers[:, :count].long(), self.numbers[:, count:].to(dtype).log_softmax(1)


def top_of(logits: Tensor, count: int, temperature: float) -> Tensor:
    """Return Teacher.numbers of logits (tokens, V), in at least fp32."""
    log_probs = (wide(logits) / temperature).log_softmax(1)
    top, ids = log_probs.topk(count, 1)
    rest = log_probs.scatter_(1, ids, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([ids.to(top.dtype), top.clamp(min=LOWEST), rest.clamp(min=LOWEST)], 1)


def distillation_sums(logits: Tensor, targets: Tensor, weights: Tensor | None, teacher: Teacher) -> Tensor:
    """Sum over tokens, each times its weight: the loss, the cross entropy, the KL. (3,) in at least fp32.

    logits (tokens, V), targets (tokens,) int64, weights (tokens,). Only the loss has a gradient.
    """
    exact = wide(logits)
    ids, log_p = teacher.classes(exact.dtype)
    log_q = (exact / teacher.temperature).log_softmax(1)
    others = log_q.scatter(1, ids, torch.finfo(exact.dtype).min).logsumexp(1, keepdim=True)
    log_q = torch.cat([log_q.gather(1, ids), others], 1)
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
    kl = (kl if weights is None else kl * weights).sum()
    cross_entropy = loss_sum(logits, targets, weights)
    loss = (1 - teacher.mix) * cross_entropy + teacher.mix * teacher.temperature**2 * kl
    return torch.stack([loss, cross_entropy.detach(), kl.detach()])


def head_distillation(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    teacher: Teacher | WholeTeacher,
    native: bool = False,
    weights: Tensor | None = None,
    exact: bool = False,
) -> Tensor:
    """Compute teacher.sums(x W^T, targets, weights). All others are as for loss.head_loss()."""
    if not torch.is_grad_enabled():
        x, weight = x.detach(), weight.detach()
    native = native and x.dtype in ACTIVATION_DTYPES.get(x.device.type, ())
    blocks = teacher.blocks(x, weight, targets, weights, native, exact, teacher=teacher)
    return HeadLoss.apply(x, weight, blocks)


@dataclasses.dataclass(frozen=True)
class TeacherBlocks(Blocks):
    """Blocks whose tokens have the loss, the cross entropy and the KL, each times its weight."""

    teacher: Teacher | None = None
    numbers: ClassVar[tuple[int, ...]] = (3,)

    def losses_of(self, logits: Tensor, part: slice) -> Tensor:
        teacher = self.teacher._replace(numbers=self.teacher.numbers[part])
        scale = teacher.mix * teacher.temperature**2
        kl, gradient_of_kl = kl_and_gradient(logits, teacher)
        cross_entropy = dataclasses.replace(self, weights=None).cross_entropy(logits, part)
        gradient = in_place_of(logits, self.x.dtype)
        losses = torch.stack([(1 - teacher.mix) * cross_entropy + scale * kl, cross_entropy, kl])
        gradient.mul_(1 - teacher.mix).add_(gradient_of_kl.mul_(scale))
        if self.weights is None:
            return losses
        gradient.mul_(self.weights[part].unsqueeze(1))
        return losses * self.weights[part]

    def cross_entropy(self, logits: Tensor, part: slice) -> Tensor:
        """Return the cross entropy of each token; the logits become its gradient."""
        return super().losses_of(logits, part)


def kl_and_gradient(logits: Tensor, teacher: Teacher) -> tuple[Tensor, Tensor]:
    """Compute KL(p || q) of each token, (tokens,), and its gradient by the logits, (tokens, V)."""
    exact = wide(logits)
    ids, log_p = teacher.classes(exact.dtype)
    scaled = exact / teacher.temperature
    top = scaled.amax(1, keepdim=True)
    known = scaled.gather(1, ids) - top
    q = scaled.sub_(top).exp_().scatter_(1, ids, 0.0)  # of the others, still times `total`
    others = q.sum(1, keepdim=True).clamp(min=torch.finfo(q.dtype).tiny)
    total = others + known.exp().sum(1, keepdim=True)
    log_q = torch.cat([known, others.log()], 1) - total.log()
    p = log_p.exp()
    kl = (p * (log_p - log_q)).sum(1)
    q.mul_(1 / total - p[:, -1:] / others).scatter_(1, ids, log_q[:, :-1].exp() - p[:, :-1])
    return kl, q.div_(teacher.temperature)
