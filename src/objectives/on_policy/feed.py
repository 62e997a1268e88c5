"""The batches of on-policy distillation: drawn answers, with what the teacher makes of each token."""

from __future__ import annotations

from collections.abc import Iterator

from ...common.batch import Batch
from ...data.batches import Schedule
from ..base import Objective
from ..policy import Policy
from ..reference_model import TeacherBeside
from ..rewards.feed import RolloutFeed
from ..rewards.rollouts import Group, Rollouts


class TaughtFeed(RolloutFeed):
    """Feed of all drawn answers. The teacher reads a micro-batch when its turn comes, so that only its inputs
    of the head are in memory."""

    def __init__(
        self,
        rollouts: Rollouts,
        schedule: Schedule,
        steps: range,
        objective: Objective,
        policy: Policy,
        teacher: TeacherBeside,
    ):
        super().__init__(rollouts, schedule, steps, objective, policy, None)
        self.teacher = teacher

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            yield self.teacher.beside(batch)

    def _is_trained(self, group: Group) -> bool:
        return True
