"""IPO, arXiv 2310.12036: ((ln p(c) - ln ref(c))/|c| - (ln p(r) - ln ref(r))/|r| - 1/(2 beta))^2."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from ..common.batch import Batch
from . import options
from ._preference import NO_AVERAGE, PreferenceLoss
from .base import register


@register
class Ipo(PreferenceLoss):
    name = "ipo"
    about = "a preference between two answers, with a square in the place of a logistic function"
    needs_reference = averaged = True
    instead = NO_AVERAGE

    @dataclasses.dataclass(frozen=True)
    class Options(options.Reference, options.SftWeight, options.Beta):
        pass

    @classmethod
    def usual_weight(cls, beta: float) -> tuple[float, str]:
        reason = super().usual_weight(beta)[1]
        # the gradient of ipo's own term is 1 / beta at first
        return float(f"{1 / beta:.3g}"), f"1 / beta, as much as the preference pulls; {reason}"

    def example_losses(self, scores: Tensor, batch: Batch) -> Tensor:
        return (scores[0::2] - scores[1::2] - 1 / (2 * self.options.beta)).square()
