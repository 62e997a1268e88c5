"""Questions, whose answers the model draws.

rewarded.py and taught.py tell what becomes of the answers.
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

import numpy as np

from rwkv_miss.files.checkpoint import Arch

from ...common.device import PRECISIONS
from ...common.formatting import counted
from ...data.batches import Schedule
from ...data.chat_template import Template
from ...data.encode import Encoder
from ...data.examples import Examples
from ...data.formats import Reading, Report
from ...data.held_out import EVALUATION, FORWARD
from ...data.questions import LoadedQuestions, QuestionReader, Questions
from ...evaluation.rewards import Rewards
from ...model.batch_loss import state_bytes
from ..base import PromptReading, Source, SourceCost, TrainingData
from ..estimates import BatchSizes, Speed, Times, Work
from ..policy import Policy
from .sizes import (
    LIKELIHOODS,
    READ_NUMBERS,
    STATES,
    TOGETHER,
    evaluation_work,
    largest_groups,
    rollout_tokens,
    rows_at_once,
)

if TYPE_CHECKING:
    from .rollouts import Rollouts


class DrawnCost(SourceCost, abc.ABC):
    """Cost of drawing answers and of training on them."""

    @property
    @abc.abstractmethod
    def reading(self) -> float:
        """Work of reading a token of a draw once more, by another model, as trained tokens."""

    def largest_batch(self, schedule: Schedule, documents: Examples | None, arch: Arch) -> BatchSizes:
        return largest_groups(documents, self.config.micro_bsz, self.config.chunk_ctx)

    def sampled_at_once(self, arch: Arch, precision: str, accelerator: str) -> int:
        config = self.config
        answers = config.micro_bsz * config.accumulation * config.group_size
        return rows_at_once(arch, PRECISIONS[precision].itemsize, accelerator, answers)

    def sampling_bytes(self, arch: Arch, precision: str, accelerator: str) -> int:
        """Count the bytes of the states of rollouts that are sampled at once, of the likelihoods of their
        next tokens, and of prompts that are read meanwhile.
        """
        config, itemsize = self.config, PRECISIONS[precision].itemsize
        a_row = STATES * state_bytes(arch, 1, itemsize) + LIKELIHOODS * 4 * arch.vocab_size
        prompts = min(TOGETHER, config.micro_bsz * config.accumulation * config.ctx_len)
        read = READ_NUMBERS * itemsize * arch.n_embd * prompts
        return self.sampled_at_once(arch, precision, accelerator) * a_row + read

    def evaluation_costs(self, held_out: Questions) -> np.ndarray:
        return np.array([work.total for work in evaluation_work(held_out)])

    def evaluation_budget(self, held_out: Questions, schedule: Schedule, steps: int) -> float:
        return EVALUATION * self._work(schedule, steps, held_out).total

    def _work(self, schedule: Schedule, steps: int, asked: Questions) -> Work:
        """Estimate the work of `steps` steps, with answers of likely length, none of equal reward."""
        prompts, answers = rollout_tokens(schedule, steps, asked)
        prompts_of_training = prompts * (asked.group_size if self.config.chunk_ctx else 1)
        batch = prompts_of_training + answers
        return Work(schedule.repeats * batch + FORWARD * prompts + self.reading * batch, answers)

    def times(
        self, data: TrainingData, arch: Arch, schedule: Schedule, steps: int, evaluations: int, speed: Speed
    ) -> Times:
        asked = data.documents
        work = self._work(schedule, steps, asked)
        read = sum(evaluation_work(data.evaluated) if evaluations else [], start=Work(0)).times(evaluations)
        seconds = (0.0, 0.0, 0.0)
        if speed.tokens:
            seconds = [part.seconds(speed) for part in (work, read, Work(0, work.drawn))]
        training, evaluation, sampling = seconds
        usual = f"if answers have all {counted(asked.max_tokens, 'token')}; shorter ones take less"
        if asked.usual < asked.max_tokens:
            usual = f"if answers are about as long as the right ones, {counted(round(asked.usual), 'token')}"
        tokens = schedule.repeats * sum(rollout_tokens(schedule, steps, asked))
        return Times(tokens, read.total / work.total, training, evaluation, 0.0, sampling, usual)


class DrawnSource(Source):
    """Questions, whose answers the model draws for each step, or for some of them."""

    cost_type = DrawnCost

    def load(self, path: str, encoder: Encoder, found: Report) -> LoadedQuestions:
        reader = QuestionReader(encoder, Reading.of(self.config), found, self.needs_answers)
        return reader.load(path, self.config.random_seed)

    @property
    @abc.abstractmethod
    def needs_answers(self) -> bool:
        """Tell whether a question needs a reference answer."""

    def longest(self, loaded: LoadedQuestions) -> tuple[int, int, str]:
        answer = self.config.max_tokens - 1  # the first token is read after the last one of the prompt
        return loaded.longest + answer, 0, "question with its answer"

    def examples(self, loaded: LoadedQuestions) -> Questions:
        return loaded.examples(self.config.ctx_len, self.config.group_size, self.config.max_tokens)

    def prompt_reading(self, documents: Examples, schedule: Schedule, arch: Arch) -> PromptReading:
        return PromptReading(not self.config.chunk_ctx)

    def lines(self, documents: Examples, schedule: Schedule, arch: Arch) -> list[str]:
        config = self.config
        rows = self.cost.sampled_at_once(arch, config.precision, config.accelerator)
        read = f"is read once for its {config.group_size} answers, to draw them and to train on them"
        if config.chunk_ctx:
            read = "is read once to draw, and before each answer to train on it, as rows run in chunks"
        return [
            f"loss       {self.loss.description}",
            f"prompts    each {read}; {counted(rows, 'answer')} are drawn at once, at temperature 1",
        ]

    def trained_text(self, documents: Examples) -> str:
        return " of prompts"

    def evaluated_text(self, evaluated: Examples) -> str:
        answered = "is" if len(evaluated) == 1 else "are"
        return f"{counted(len(evaluated), self.loss.words.example)} of them {answered} answered"

    def rollouts(self, data: TrainingData, policy: Policy) -> Rollouts:
        """Make what draws the answers."""
        from .rollouts import Rollouts  # the engine, which a plan need not load

        return Rollouts(policy.model, data.documents, data.encoder, data.rewards, self.config)

    def judge(self, template: Template) -> Rewards:
        return Rewards.of(self.config, template)

    def callbacks(self, folder: str) -> list:
        from .samples import SampleWriter

        return [SampleWriter(folder)]
