"""Distillation: the cross entropy of a token, and the KL to a student q from a teacher p, --loss distill.

    (1 - mix) CE + mix T^2 KL(p || q)

p and q are the softmax of logits / T, of the teacher and of the model in training. T^2 keeps the size of the
gradient, which has 1 / T^2 (Hinton, Vinyals and Dean 2015, arXiv 1503.02531, section 2). Of p the likeliest
tokens are known. All others are one class more, in p and in q, as with `loss_add_tail` of TRL's trainers on a
teacher's server: without it a model could move all it has of them anywhere. KL of fewer classes is a lower
bound of KL over the vocabulary. Inside the last class the gradient keeps the model's own proportions.

`distillation_sums` defines the loss, from logits. `Teacher.losses_of` computes it with its gradient for a
block of tokens. The cross entropy has the term of L2Wrap, and the KL none. The loss that reports show is the
cross entropy, which can be compared with any other run's; the KL is a metric.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.batch import Batch, Reads
from ..common.option import opt
from ..common.token_loss import loss_sum, wide
from . import options
from .base import DocumentLoss, Keep, Words, register
from .metrics import SUPERVISED, Shown

if TYPE_CHECKING:
    from ..model.batch_loss import Chunks
    from ..model.loss import Blocks
    from ..model.rwkv import RWKV


@register
class Distill(DocumentLoss):
    name = "distill"
    about = "the cross entropy and the KL from a teacher, the model of --reference (docs/training.md)"
    source = "taught_documents"
    needs_reference = needs_teacher = True
    helps = {"reference": "the teacher, of any size, which must be given"}
    words = Words(reference="teacher")
    metrics = dataclasses.replace(
        SUPERVISED,
        titles={**SUPERVISED.titles, "kl": "KL from the teacher, per token"},
        bar=(Shown(("kl",), lambda nats: f"KL {nats:.3f}"),),
        line=(*SUPERVISED.line, Shown(("kl",), lambda nats: f"KL from the teacher {nats:.4f}")),
    )

    @dataclasses.dataclass(frozen=True)
    class Options(options.Teacher):
        distill_top: int = opt(
            64,
            "the number of likeliest tokens that are kept of the teacher at each trained token. All"
            " others count as one",
            low=1,
            high=2**16,
        )
        distill_mix: float = opt(
            0.9,
            "the weight of the KL; the cross entropy has 1 minus that",
            low=0,
            high=1,
        )

    def reads(self) -> Reads:
        return Reads(("teacher",), teacher=2 * self.options.distill_top + 1)

    def __call__(self, model: RWKV, batch: Batch, chunks: Chunks, keep: Keep = None) -> tuple[Tensor, Tensor]:
        teacher = Teacher(batch.teacher, self.options.distill_mix, self.options.distill_temperature)
        sums = chunks.sums(model, batch, teacher)
        count = sums.new_full((1,), batch.targets.numel())
        weight = count if batch.weights is None else batch.weights.sum(0, keepdim=True)
        return sums[0], torch.cat([sums[1:].detach(), weight]).double()

    def reported(self, loss: Tensor, metrics: Tensor) -> Tensor:
        return metrics[0]

    def means(self, sums: list[float]) -> dict[str, float]:
        return {"kl": sums[1] / max(sums[2], 1e-30)}

    @property
    def description(self) -> str:
        """The loss with its settings: 0.1 x the cross entropy + 0.9 x T^2 x the KL from big.pth, T 2."""
        mix = self.options.distill_mix
        teacher = self.options.reference_name
        return (
            f"distill, {1 - mix:g} x the cross entropy + {mix:g} x T^2 x the KL from {teacher},"
            f" T {self.options.distill_temperature:g}"
        )


class Teacher(NamedTuple):
    """Values of a teacher for some tokens, and the settings of the loss: a model.loss.LogitLoss.

    `numbers` are those of model.loss.top_of(), (tokens, 2 k + 1) in fp32.
    """

    numbers: Tensor
    mix: float
    temperature: float
    per_token = (3,)

    def sums(self, logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        """Call distillation_sums()."""
        return distillation_sums(logits, targets, weights, self)

    def losses_of(self, logits: Tensor, part: slice, weights: Tensor | None, blocks: Blocks) -> Tensor:
        """Compute the loss, the cross entropy and the KL of each token; the logits become the gradient."""
        scale = self.mix * self.temperature**2
        kl, gradient_of_kl = kl_and_gradient(logits, self._replace(numbers=self.numbers[part]))
        cross_entropy = blocks.cross_entropy(logits, part, None)
        losses = torch.stack([(1 - self.mix) * cross_entropy + scale * kl, cross_entropy, kl])
        gradient = blocks.gradient_in(logits)
        gradient.mul_(1 - self.mix).add_(gradient_of_kl.mul_(scale))
        if weights is None:
            return losses
        gradient.mul_(weights.unsqueeze(1))
        return losses * weights

    def classes(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return (ids (tokens, k) int64, ln p (tokens, k + 1), of which the exp() adds up to 1)."""
        count = self.numbers.shape[1] // 2
        return self.numbers[:, :count].long(), self.numbers[:, count:].to(dtype).log_softmax(1)


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


def kl_and_gradient(logits: Tensor, teacher: Teacher) -> tuple[Tensor, Tensor]:
    """Compute KL(p || q) of each token, (tokens,), and its gradient by the logits, (tokens, V)."""
    exact = wide(logits)
    ids, log_p = teacher.classes(exact.dtype)
    scaled = exact / teacher.temperature
    top = scaled.amax(1, keepdim=True)
    listed = scaled.gather(1, ids) - top
    q = scaled.sub_(top).exp_().scatter_(1, ids, 0.0)  # q of the other ids, still times `total`
    others = q.sum(1, keepdim=True).clamp(min=torch.finfo(q.dtype).tiny)
    total = others + listed.exp().sum(1, keepdim=True)
    log_q = torch.cat([listed, others.log()], 1) - total.log()
    p = log_p.exp()
    kl = (p * (log_p - log_q)).sum(1)
    q.mul_(1 / total - p[:, -1:] / others).scatter_(1, ids, log_q[:, :-1].exp() - p[:, :-1])
    return kl, q.div_(teacher.temperature)
