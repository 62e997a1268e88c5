"""Questions, whose answers the model draws, and the rewards of the answers, as --loss grpo reads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from ...common.formatting import counted
from ...data.batches import Schedule
from ...data.held_out import FORWARD
from ...data.questions import LoadedQuestions, Questions, text_length
from ...data.tokenizer import Tokenizer
from ..base import Evaluation, Feed, TrainingData
from ..policy import Policy
from .sizes import longest_answer, needs_answer, usual_length
from .source import DrawnCost, DrawnSource


class RewardCost(DrawnCost):
    """Cost of drawn answers with rewards."""

    def estimated(self, examples: Questions, loaded: LoadedQuestions, tokenizer: Tokenizer) -> Questions:
        return dataclasses.replace(examples, usual=usual_length(loaded, tokenizer, self.config.rewards))

    @property
    def reading(self) -> float:
        return FORWARD if self.config.beta else 0.0


class RewardSource(DrawnSource):
    """Drawn answers with their rewards."""

    cost_type = RewardCost

    def defaults_by_data(
        self, loaded: LoadedQuestions, tokenizer: Tokenizer
    ) -> Iterator[tuple[str, object, str]]:
        config = self.config
        ctx_len = config.settled().ctx_len
        yield "max_tokens", *longest_answer(loaded, tokenizer, config.rewards, config.reward_length, ctx_len)

    @property
    def needs_answers(self) -> bool:
        return needs_answer(self.config.rewards)

    def warnings(self, documents: Questions, tokenizer: Tokenizer) -> list[str]:
        """Tell how many reference answers can't be drawn, as they and an end are too long."""
        lengths = [text_length(tokenizer, question.answer) for question in documents.questions]
        if not (long := sum(length >= documents.max_tokens for length in lengths)):
            return []
        return [
            f"{long:,} of {counted(len(lengths), 'reference answer')} {'has' if long == 1 else 'have'} more"
            f" tokens than --max_tokens {documents.max_tokens}, so that {'it' if long == 1 else 'they'}"
            " can't be drawn"
        ]

    def feed(
        self, data: TrainingData, schedule: Schedule, steps: range, policy: Policy, shared: bool
    ) -> Feed:
        from .feed import Reference, RewardFeed  # the engine, which a plan need not load

        rollouts = self.rollouts(data, policy)
        return RewardFeed(rollouts, schedule, steps, self, policy, reference=Reference(self, policy))

    def evaluation(self, module) -> Evaluation:
        from .evaluation import RewardEvaluation

        data = module.data
        return RewardEvaluation(data.encoder, data.rewards, self.config.reward_timeout)


SOURCE = RewardSource
