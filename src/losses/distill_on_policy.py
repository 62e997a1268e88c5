"""On-policy distillation: the KL of a token from a teacher p, taken over the model in training q.

It is --loss distill_on_policy:

    T^2 KL(q || p) = T^2 sum of q (ln q - ln p)

q and p are the softmax of logits / T, and T^2 is that of distill.py. The sum is over the whole
vocabulary. The tokens are those that the model has drawn. As in GKD (arXiv 2306.13649) the gradient is that
of the KL at the places that it drew, and not of the draw.

`WholeTeacher.sums` defines the loss, from logits. `losses_of` computes it with its gradient: the logits of
both models are made for a few tokens at a time.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_miss.gemm import product_into

from ..common.batch import Batch
from ..common.formatting import counted
from ..common.token_loss import wide
from . import options
from ._drawn import DrawnLoss
from .base import Keep, register
from .metrics import RIGHT, SHOWN, LossMetrics, Shown, percent

if TYPE_CHECKING:
    from ..model.batch_loss import Chunks
    from ..model.loss import Blocks
    from ..model.rwkv import RWKV

OWN_ANSWERS = LossMetrics(
    {
        **RIGHT,
        "length": "length of an answer, tokens",
        "cut": "answers cut at --max_tokens",
        "entropy": "entropy per token",
        "draw_seconds": "drawing, seconds",
        "draw_tokens_per_second": "drawing, tokens/s",
        "train_tokens_per_second": "training, tokens/s",
    },
    shares=(*RIGHT, "cut"),
    bar=(Shown(("entropy",), lambda nats: f"entropy {nats:.2f}"),),
    line=(
        SHOWN,
        Shown(("length",), lambda tokens: f"length {tokens:.4g} tokens"),
        Shown(("cut",), lambda share: f"cut at --max_tokens {percent(share)}"),
        Shown(("entropy",), lambda nats: f"entropy {nats:.3g} per token"),
    ),
    heading="Drawn answers, of the training data",
    explanation="The loss is the KL from the teacher per token of these answers, in nats.",
)


@register
class DistillOnPolicy(DrawnLoss):
    name = "distill_on_policy"
    about = "the model answers questions, and the KL from a teacher is taken at each token of its own answers"
    source = "drawn.taught"
    needs_reference = needs_teacher = True
    helps = {"reference": "the teacher, of any size, which must be given"}
    words = dataclasses.replace(DrawnLoss.words, reference="teacher")
    metrics = OWN_ANSWERS

    @dataclasses.dataclass(frozen=True)
    class Options(options.Draws, options.Teacher):
        pass

    def __call__(self, model: RWKV, batch: Batch, chunks: Chunks, keep: Keep = None) -> tuple[Tensor, Tensor]:
        teacher = WholeTeacher(batch.teacher, batch.teacher_head, self.options.distill_temperature)
        loss = chunks.sums(model, batch, teacher)
        return loss, self.sums(loss.device)

    def reported(self, loss: Tensor, metrics: Tensor) -> Tensor:
        """Return the KL alone."""
        return loss.detach() / self.options.distill_temperature**2

    def means(self, sums: list[float]) -> dict[str, float]:
        return {name: value for name, value in super().means(sums).items() if name in self.metrics.titles}

    @property
    def description(self) -> str:
        """The loss with its settings: T^2 x the KL from big.pth, T 2, at each token of 8 answers ..."""
        given = self.options
        teacher = given.reference_name
        return (
            f"{self.name}, T^2 x the KL from {teacher}, T {given.distill_temperature:g}, at each token of"
            f" {counted(given.group_size, 'answer')} to a question, of at most"
            f" {counted(given.max_tokens, 'token')}{self.inner_text()}"
        )


class WholeTeacher(NamedTuple):
    """All probabilities of a teacher for some tokens, as the inputs of its head: a model.loss.LogitLoss."""

    numbers: Tensor  # (tokens, C of the teacher)
    head: Tensor  # (V, C of the teacher), of one dtype with the inputs
    temperature: float
    per_token = ()

    def sums(self, logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        """Sum T^2 KL over tokens, each times its weight, in at least fp32; logits (tokens, V).

        The targets, which were drawn, are not read.
        """
        logits = wide(logits)
        log_q = (logits / self.temperature).log_softmax(1)
        log_p = (F.linear(self.numbers, self.head).to(logits.dtype) / self.temperature).log_softmax(1)
        kl = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(1)
        return self.temperature**2 * (kl if weights is None else kl * weights).sum()

    def losses_of(self, logits: Tensor, part: slice, weights: Tensor | None, blocks: Blocks) -> Tensor:
        """Compute T^2 KL of a part of the tokens; the logits become the gradient."""
        inputs, head, temperature = self
        if not blocks.rooms:  # for logits of the teacher; the first block is the largest
            blocks.rooms.append(torch.empty_like(logits))
        other = wide(product_into(blocks.rooms[0][: len(logits)], inputs[part], head))
        own = wide(logits)
        for x in (own, other):
            x.div_(temperature).sub_(x.logsumexp(1, keepdim=True))
        torch.sub(own, other, out=other)  # ln q - ln p
        kl = torch.linalg.vecdot(own.exp_(), other)
        own.mul_(other.sub_(kl.unsqueeze(1))).mul_(temperature)
        kl *= temperature**2
        if weights is not None:
            own.mul_(weights.unsqueeze(1))
            kl *= weights
        blocks.gradient_in(logits).copy_(own)
        return kl
