"""Answers that the model in training gives to its questions, and what they are worth.

They are sampled at temperature 1 from the whole distribution, the only one for which ln p of the training is
that of the sampling. A rollout depends on the model, the seed of the run, the number of its phase and the
place of the question in the data. The number of processes changes no more than the rounding of prompts that
are read together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from rwkv_miss.errors import UserError
from rwkv_miss.progress import say

from ...config import Config
from ...data.answer_example import AnswerGroup
from ...data.encode import Encoder
from ...data.questions import Question, Questions
from ...evaluation.rewards import Failed, GroupRewards, Rewards
from ...inference.decoders import for_training
from ...inference.engine import Engine
from ...inference.request import Answer, Request
from ...inference.sampling import Sampling
from ...losses.grpo import advantages
from ...model import RWKV
from .sizes import TOGETHER, rows_at_once

FROM_THE_MODEL = Sampling(temperature=1.0, top_p=1.0)
PATIENCE = 3  # timeouts that are waited for, at least
SHARE = 0.1  # share of the groups that may time out, if these are more than PATIENCE


@dataclasses.dataclass(frozen=True)
class Group:
    """Group of answers to one question."""

    phase: int  # the number of the sampling, which is for `inner_steps` steps
    place: int  # place of the question in the data
    question: Question
    prompt: np.ndarray  # tokens of the question
    answers: list[Answer]  # all sampled tokens: an end of document, or the text that ended it, too
    scored: GroupRewards | Failed
    advantages: Tensor | None  # (G,) float64; None if the reward failed

    @property
    def failed(self) -> bool:
        """Tell whether the rewards failed."""
        return self.advantages is None

    @property
    def live(self) -> bool:
        """Tell whether some answers are better than others."""
        return self.advantages is not None and bool(self.advantages.any())

    @property
    def tokens(self) -> int:
        """Sampled tokens."""
        return sum(len(answer.tokens) for answer in self.answers)

    @property
    def log_probs(self) -> list[np.ndarray]:
        """Return ln p of each answer's tokens when they were sampled, (t,) float32."""
        return [np.array([token.logprob for token in one.logprobs], np.float32) for one in self.answers]

    def example(self) -> AnswerGroup:
        """Return the example to train on."""
        return AnswerGroup.of(
            self.prompt,
            [answer.tokens for answer in self.answers],
            self.advantages.tolist(),
            self.log_probs,
        )


class PatientRewards:
    """Rewards of one rollout phase, or of one evaluation, with a limit on the time of failures.

    Without it a function that hangs would delay every group.

    Once failures have taken PATIENCE times `timeout` seconds, or as long as a tenth of `groups` that run out
    of time, no more is asked, and all that is left fails.
    """

    def __init__(self, rewards: Rewards, timeout: float, groups: int):
        self.rewards = rewards
        self.patience = max(PATIENCE, SHARE * groups) * timeout  # seconds
        self.waited = 0.0  # seconds, for rewards that failed

    def score(self, question: Question, answers: Sequence[Answer]) -> GroupRewards | Failed:
        """Score as Rewards.score() does."""
        if self.waited > self.patience:
            return Failed(
                "given up",
                f"rewards that failed had taken {self.waited:.0f} s, and were asked for no more",
            )
        begun = time.monotonic()
        scored = self.rewards.score(question, answers)
        if isinstance(scored, Failed):
            self.waited += time.monotonic() - begun
        return scored


class Rollouts:
    """Rollouts of groups for questions, by the model as it is; the groups are scored."""

    def __init__(self, model: RWKV, questions: Questions, encoder: Encoder, rewards: Rewards, config: Config):
        self.model, self.questions, self.encoder = model, questions, encoder
        self.rewards, self.config = rewards, config
        self.reported: set[str] = set()  # kinds of failures that were reported

    def groups(self, phase: int, places: Sequence[int]) -> list[Group]:
        """Draw a group for each of these questions. Raises UserError if the model overflows.

        Dropout and gradients are to be off.
        """
        rewards = PatientRewards(self.rewards, self.config.reward_timeout, len(places))
        return [
            self._judged(rewards, phase, place, answers)
            for place, answers in zip(places, self._sampled(phase, places), strict=True)
        ]

    def request(self, phase: int, place: int) -> Request:
        """Make the request to the engine for a question."""
        seeds = np.random.SeedSequence([self.config.random_seed, phase, place])
        return Request(
            self.questions.prompts[place].tolist(),
            self.config.max_tokens,
            FROM_THE_MODEL,
            seed=int(seeds.generate_state(1, np.uint64)[0]),
            stops=self.encoder.template.stops,
            n=self.config.group_size,
            logprobs=0,
        )

    def _sampled(self, phase: int, places: Sequence[int]) -> list[list[Answer]]:
        """Sample the answers to each question."""
        answers = len(places) * self.config.group_size
        if not answers:
            return []
        # made anew: between two phases the training has the memory
        rows = rows_at_once(self.model.arch, self.model.dtype.itemsize, self.config.accelerator, answers)
        with contextlib.closing(for_training(self.model, rows)) as decoder:
            engine = Engine(decoder, self.encoder.tokenizer, together=TOGETHER)
            submitted = [engine.submit(self.request(phase, place)) for place in places]
            while not engine.idle:
                for answer in engine.step():
                    if answer.error:
                        raise UserError(f"draw {phase + 1}: {answer.error}; lower --lr_init")
        return submitted

    def _judged(self, rewards: PatientRewards, phase: int, place: int, answers: list[Answer]) -> Group:
        question = self.questions[place]
        scored = rewards.score(question, answers)
        better_by = None
        if isinstance(scored, Failed):
            if scored.kind not in self.reported:
                self.reported.add(scored.kind)
                say(f"note: a group of draw {phase + 1} is left out, as its reward failed: {scored.reason}")
        else:
            better_by = advantages(scored.total[None], self.config.advantage_scale == "group")[0]
        return Group(phase, place, question, self.questions.prompts[place], answers, scored, better_by)
