"""Training on rewards of the model's own answers: --loss grpo."""

from __future__ import annotations

import functools

from ...data.batches import Schedule
from ...data.chat_template import Template
from ...evaluation.rewards import Rewards
from ...model.grpo_loss import GrpoLoss
from ...planning.step import grpo_of
from ..base import Evaluation, Feed, Objective, TrainingData
from ..policy import Policy


class OnRewards(Objective):
    """The loss of GRPO on answers that the model gives to questions."""

    @functools.cached_property
    def loss(self) -> GrpoLoss:
        return grpo_of(self.config)

    def feed(
        self, data: TrainingData, schedule: Schedule, steps: range, policy: Policy, shared: bool
    ) -> Feed:
        from .feed import RolloutFeed  # the engine, which a plan need not load
        from .rollouts import Rollouts

        rollouts = Rollouts(policy.model, data.documents, data.encoder, data.rewards, self.config)
        return RolloutFeed(rollouts, schedule, steps, self.loss, policy)

    def evaluation(self, module) -> Evaluation:
        from .evaluation import RewardEvaluation

        data = module.data
        return RewardEvaluation(data.encoder, data.rewards, self.config.reward_timeout)

    def judge(self, template: Template) -> Rewards:
        return Rewards.of(self.config, template)

    def callbacks(self, folder: str) -> list:
        from .sample_writer import SampleWriter

        return [SampleWriter(folder)]
