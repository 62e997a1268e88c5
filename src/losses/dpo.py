"""DPO, arXiv 2305.18290: -ln s(b (ln p(c) - ln ref(c) - (ln p(r) - ln ref(r)))), with b for beta."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from ..common.batch import Batch
from ..common.option import opt
from . import options
from ._preference import PreferenceLoss, smoothed
from .base import register


@register
class Dpo(PreferenceLoss):
    name = "dpo"
    about = "a preference between two answers, for rows with chosen and rejected"
    needs_reference = True

    @dataclasses.dataclass(frozen=True)
    class Options(options.Reference, options.Smoothing, options.SftWeight, options.Beta):
        loss_average: str = opt(
            "sum",
            "what is compared. sum: the log-probability of an answer, as in the paper. mean: the"
            " log-probability per token. ipo, orpo and simpo always take the mean, and kto the sum",
            choices=("sum", "mean"),
        )

    @property
    def averaged(self) -> bool:
        return self.options.loss_average == "mean"

    def settings(self) -> list[str]:
        smoothing = self.options.label_smoothing
        said = [*super().settings(), "log p per token" if self.averaged else "log p summed"]
        return [*said, *([f"label smoothing {smoothing:g}"] if smoothing else [])]

    def example_losses(self, scores: Tensor, batch: Batch) -> Tensor:
        return smoothed(self.options.beta * (scores[0::2] - scores[1::2]), self.options.label_smoothing)
