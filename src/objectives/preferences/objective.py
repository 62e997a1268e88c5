"""Training on preferences: --loss dpo, ipo, orpo, simpo and kto."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

from ... import ops
from ...data.batches import Schedule
from ...data.units import Units
from ...model.preference_loss import PreferenceLoss
from ...planning.step import preference_of
from ..base import Evaluated, Feed, Objective, TrainingData
from ..from_reference import ReferenceKl
from ..held_out_loss import HeldOutLoss
from ..policy import Policy
from .kto_baseline import WithBaseline, baseline
from .reference import ReferencePass


class OnPreferences(Objective):
    """A loss on pairs of answers, or under kto on single ones."""

    @functools.cached_property
    def loss(self) -> PreferenceLoss:
        return preference_of(self.config)

    def with_reference(
        self, data: TrainingData, schedule: Schedule, steps: int, policy: Policy, shared: bool
    ) -> TrainingData:
        if not self.loss.needs_reference:
            return data
        with policy.undisturbed(), ops.nan_passes():
            reference = ReferencePass(self.config, shared, policy)
            documents = reference.training(data.documents, schedule, steps)
            return dataclasses.replace(
                data, documents=documents, evaluated=reference.held_out(data.evaluated)
            )

    def feed(
        self, data: TrainingData, schedule: Schedule, steps: range, policy: Policy, shared: bool
    ) -> Feed:
        found = super().feed(data, schedule, steps, policy, shared)
        if self.loss.paired:
            return found
        return WithBaseline(found.batches, schedule, steps, policy, self.chunks.size)

    def before_evaluation(
        self, units: Units, batches: Callable[[Units], Iterator[dict]], policy: Policy
    ) -> dict:
        return {} if self.loss.paired else {"baseline": baseline(batches(units.others), policy)}

    def evaluation(self, module) -> HeldOutLoss:
        return WithKl(module) if self.loss.needs_reference else HeldOutLoss(module)


class WithKl(HeldOutLoss):
    """Evaluations with the KL to the reference beside the other metrics."""

    def __init__(self, module):
        super().__init__(module)
        self.kl = ReferenceKl(module)

    def start(self, trainer) -> None:
        self.kl.reference.start(trainer, self.module)

    def measure(self, trainer, is_stopped: Callable[[], bool]) -> Evaluated | None:
        found = super().measure(trainer, is_stopped)
        if found:
            found.metrics["kl"] = self.kl.measure(trainer)
        return found
