"""KTO, arXiv 2402.01306, for single answers with a label, with b for beta:

w s(-b (ln p(y) - ln ref(y) - baseline)) of a desirable answer, and w s(b (ln p(y) - ln ref(y) - baseline)) of
an undesirable one.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..common.batch import Batch
from ..common.option import opt
from . import options
from ._preference import NO_AVERAGE, PreferenceLoss
from .base import LABELS, Facts, Words, register


@register
class Kto(PreferenceLoss):
    name = "kto"
    about = "a preference for rows with one answer, with label true or false"
    data = LABELS
    needs_reference, paired = True, False
    words = Words("answer", "whose prompts are")
    instead = NO_AVERAGE

    @dataclasses.dataclass(frozen=True)
    class Options(options.Reference, options.SftWeight, options.Beta):
        desirable_weight: float = opt(1.0, "the weight of the answers with label true", low=0, high=1e30)
        undesirable_weight: float = opt(1.0, "the weight of the answers with label false", low=0, high=1e30)

    @property
    def facts(self) -> Facts:
        """Each example is read a second time with another prompt, for the baseline."""
        return dataclasses.replace(super().facts, passes=2)

    def settings(self) -> list[str]:
        weights = f"{self.options.desirable_weight:g} and {self.options.undesirable_weight:g}"
        return [*super().settings(), f"weights {weights}"]

    def example_losses(self, scores: Tensor, batch: Batch) -> Tensor:
        reward = self.options.beta * (scores - batch.baseline)
        weight = torch.full_like(reward, self.options.undesirable_weight)
        weight = weight.masked_fill(batch.chosen, self.options.desirable_weight)
        return weight * torch.sigmoid(torch.where(batch.chosen, -reward, reward))  # 1 - s(x) = s(-x)
