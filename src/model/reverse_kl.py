"""Loss of on-policy distillation: the KL of a token from a teacher p, taken over the model in training q.

    T^2 KL(q || p) = T^2 sum of q (ln q - ln p)

q and p are the softmax of logits / T, and T^2 is that of distillation_loss.py. The sum is over the whole
vocabulary. The tokens are those that the model has drawn. As in GKD (arXiv 2306.13649) the gradient is that
of the KL at the places that it drew, and not of the draw.

`WholeTeacher.sums` defines the loss, from logits. `ReverseBlocks` computes it for loss.HeadLoss: the logits
of both models are made for a few tokens at a time.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_miss.gemm import product_into

from ..common.batch import Batch
from .grpo_loss import DrawnAnswers
from .loss import Blocks, in_place_of, wide


class WholeTeacher(NamedTuple):
    """All probabilities of a teacher for some tokens, as the inputs of its head."""

    numbers: Tensor  # (tokens, C of the teacher)
    head: Tensor  # (V, C of the teacher), of one dtype with the inputs
    temperature: float

    @property
    def blocks(self) -> type[Blocks]:
        return ReverseBlocks

    def sums(self, logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        """Sum T^2 KL over tokens, each times its weight, in at least fp32; logits (tokens, V).

        The targets, which were drawn, are not read.
        """
        logits = wide(logits)
        log_q = (logits / self.temperature).log_softmax(1)
        log_p = (F.linear(self.numbers, self.head).to(logits.dtype) / self.temperature).log_softmax(1)
        kl = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(1)
        return self.temperature**2 * (kl if weights is None else kl * weights).sum()


@dataclasses.dataclass(frozen=True)
class OnPolicyLoss(DrawnAnswers):
    """Loss with its settings: the mean of T^2 KL over the tokens of all answers of a step."""

    temperature: float

    def teacher(self, batch: Batch) -> WholeTeacher:
        """Return the teacher of a batch, which has the entries `teacher` and `teacher_head`."""
        return WholeTeacher(batch.teacher, batch.teacher_head, self.temperature)

    def nats(self, loss: Tensor) -> Tensor:
        """Return the KL alone."""
        return loss.detach() / self.temperature**2


@dataclasses.dataclass(frozen=True)
class ReverseBlocks(Blocks):
    """Blocks whose tokens have T^2 KL, each times its weight."""

    teacher: WholeTeacher | None = None
    rooms: list[Tensor] = dataclasses.field(default_factory=list)  # one, for logits of the teacher

    def losses_of(self, logits: Tensor, part: slice) -> Tensor:
        """Compute T^2 KL of a part of the tokens; the logits become the gradient."""
        inputs, head, temperature = self.teacher
        if not self.rooms:  # the first block is the largest
            self.rooms.append(torch.empty_like(logits))
        other = wide(product_into(self.rooms[0][: len(logits)], inputs[part], head))
        own, weights = wide(logits), self.weights
        for x in (own, other):
            x.div_(temperature).sub_(x.logsumexp(1, keepdim=True))
        torch.sub(own, other, out=other)  # ln q - ln p
        kl = torch.linalg.vecdot(own.exp_(), other)
        own.mul_(other.sub_(kl.unsqueeze(1))).mul_(temperature)
        kl *= temperature**2
        if weights is not None:
            own.mul_(weights[part].unsqueeze(1))
            kl *= weights[part]
        in_place_of(logits, self.x.dtype).copy_(own)
        return kl
