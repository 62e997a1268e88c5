"""ORPO, arXiv 2403.07691: -lambda ln s(ln odds(c) - ln odds(r)), odds(y) = p / (1 - p) of ln p(y)/|y|."""

from __future__ import annotations

import dataclasses

import torch.nn.functional as F
from torch import Tensor

from rwkv_miss.errors import UserError

from ..common.batch import Batch
from ..common.option import AUTO, opt
from . import options
from ._preference import NO_AVERAGE, NO_REFERENCE, PreferenceLoss, log_odds
from .base import Settings, register


@register
class Orpo(PreferenceLoss):
    name = "orpo"
    about = "the cross entropy of the chosen answer, and the odds of both; it needs no reference"
    averaged = True
    instead = {**NO_AVERAGE, **NO_REFERENCE, "beta": "orpo weighs its odds ratio with --orpo_lambda"}

    @dataclasses.dataclass(frozen=True)
    class Options(options.SftWeight):
        orpo_lambda: float = opt(
            0.1, "the weight of the odds ratio, added to the cross entropy", low=0, high=1e30
        )

    @classmethod
    def usual_weight(cls, beta: float) -> tuple[float, str]:
        return 1.0, "a part of --loss orpo"

    @classmethod
    def check(cls, config: Settings) -> None:
        super().check(config)
        if config.sft_weight not in (AUTO, 1):
            raise UserError(
                f"--sft_weight {config.sft_weight:g} has no meaning with --loss orpo, whose cross entropy has"
                " the weight 1; --orpo_lambda weighs the odds ratio against it"
            )

    @property
    def scale(self) -> float:
        return self.options.orpo_lambda

    def settings(self) -> list[str]:
        return [f"lambda {self.options.orpo_lambda:g}"]

    def example_losses(self, scores: Tensor, batch: Batch) -> Tensor:
        return -self.options.orpo_lambda * F.logsigmoid(log_odds(scores[0::2]) - log_odds(scores[1::2]))
