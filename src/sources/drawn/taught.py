"""Questions, whose answers the model draws, and a teacher that reads them, for --loss distill_on_policy.

The teacher tells what it would have written at each token: all probabilities of the vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch

from rwkv_miss.files.checkpoint import Arch

from ...common.batch import Reads
from ...data.batches import Schedule
from ...data.examples import Examples
from ...data.held_out import FORWARD
from ...data.questions import LoadedQuestions, Questions, answer_limit
from ...data.tokenizer import Tokenizer
from ..base import Evaluation, Feed, TrainingData
from ..policy import Policy
from ..reference_model import LiveTeacher, reference_arch, relative_work
from .sizes import FREE, have_answers, usual_length, within_row
from .source import DrawnCost, DrawnSource


class TaughtDrawnCost(DrawnCost):
    """Cost of drawn answers that a teacher reads."""

    def estimated(self, examples: Questions, loaded: LoadedQuestions, tokenizer: Tokenizer) -> Questions:
        usual = usual_length(loaded, tokenizer, {}) if have_answers(loaded.questions) else math.inf
        return dataclasses.replace(examples, usual=usual)

    @property
    def reading(self) -> float:
        own = reference_arch(self.config.load_model)
        return FORWARD * self.config.inner_steps * relative_work(self.config.reference, own)


class TaughtDrawnSource(DrawnSource):
    """Drawn answers with the probabilities of a teacher."""

    cost_type = TaughtDrawnCost

    def defaults_by_data(
        self, loaded: LoadedQuestions, tokenizer: Tokenizer
    ) -> Iterator[tuple[str, object, str]]:
        limit, reason = FREE, "the data have no reference answers, which would tell how long an answer is"
        if have_answers(loaded.questions):
            limit = answer_limit("exact", tokenizer, loaded.questions)
            reason = "1.25 times the longest reference answer, plus 16"
        ctx_len = self.config.settled().ctx_len
        yield "max_tokens", *within_row(limit, reason, loaded, ctx_len)

    @property
    def needs_answers(self) -> bool:
        return False

    def reads(self) -> Reads:
        other = reference_arch(self.config.reference)
        dtype = torch.float32 if self.config.precision == "fp32" else torch.bfloat16
        return Reads(("teacher", "teacher_head"), 0, other.n_embd, other.vocab_size, dtype)

    def lines(self, documents: Examples, schedule: Schedule, arch: Arch) -> list[str]:
        teacher = reference_arch(self.config.reference).describe()
        line = f"teacher    {teacher}; stays in memory with the model, and reads each answer once a step"
        return [*super().lines(documents, schedule, arch), line]

    def with_reference(
        self, data: TrainingData, schedule: Schedule, steps: int, policy: Policy, shared: bool
    ) -> TrainingData:
        return dataclasses.replace(data, teacher=LiveTeacher(self.config, self.chunks, policy.device))

    def feed(
        self, data: TrainingData, schedule: Schedule, steps: range, policy: Policy, shared: bool
    ) -> Feed:
        from .taught_feed import TaughtFeed  # the engine, which a plan need not load

        return TaughtFeed(self.rollouts(data, policy), schedule, steps, self, policy, teacher=data.teacher)

    def evaluation(self, module) -> Evaluation:
        from .taught_evaluation import TaughtEvaluation

        data = module.data
        return TaughtEvaluation(data.encoder, data.rewards, self.config.reward_timeout)


SOURCE = TaughtDrawnSource
