"""SimPO, arXiv 2405.14734: -ln s(b (ln p(c)/|c| - ln p(r)/|r|) - gamma), with b for beta."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from ..common.batch import Batch
from ..common.option import opt
from . import options
from ._preference import NO_AVERAGE, NO_REFERENCE, PreferenceLoss, smoothed
from .base import register


@register
class Simpo(PreferenceLoss):
    name = "simpo"
    about = "a preference by the mean log-probability of a token; it needs no reference"
    averaged = True
    usual_beta = 2.0
    instead = {**NO_AVERAGE, **NO_REFERENCE}
    helps = PreferenceLoss.helps | {"beta": "the scale of the reward. Left out: 2"}

    @dataclasses.dataclass(frozen=True)
    class Options(options.Smoothing, options.SftWeight, options.Beta):
        simpo_gamma: float = opt(
            1.0,
            "by how much the reward of the chosen answer should be above the other's",
            low=0,
            high=1e30,
        )

    def settings(self) -> list[str]:
        smoothing = self.options.label_smoothing
        said = [*super().settings(), f"gamma {self.options.simpo_gamma:g}"]
        return [*said, *([f"label smoothing {smoothing:g}"] if smoothing else [])]

    def example_losses(self, scores: Tensor, batch: Batch) -> Tensor:
        margin = self.options.beta * (scores[0::2] - scores[1::2]) - self.options.simpo_gamma
        return smoothed(margin, self.options.label_smoothing)
