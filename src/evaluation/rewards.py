"""What a drawn answer is worth: the weighted sum of the rewards that --rewards names.

rewards = Rewards.of(config, template)      # UserError for settings that make no sense
rewards.check(questions)                    # UserError where the rewards cannot judge these questions
rewards.score(question, answers)            # Scored, or Failed: this group alone cannot be used
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rwkv_miss.errors import UserError

from ..config import Config
from ..data.chat_template import Template
from ..data.questions import Question
from ..data.templates import answer_text, whole_text
from .scoring import SCORES, require_readable

LARGEST = 1e9  # the size of a reward: the squares of larger ones may overflow where they are compared


class Drawn(Protocol):
    """An answer as the model drew it."""

    text: str
    tokens: Sequence[int]  # the end of document included
    cut: bool  # whether it reached the limit of tokens before its end


class Scored(NamedTuple):
    """What the G answers of a group are worth."""

    values: Tensor  # (G, rewards) float64, on the CPU
    total: Tensor  # (G,) float64: their weighted sums


class Failed(NamedTuple):
    """Why a group has no rewards."""

    kind: str  # alike for reasons that the user needs to read once
    reason: str


class Spoken(NamedTuple):
    """What a reward looks at."""

    whole: str  # the answer with its thoughts
    said: str  # without them, as scripts.evaluate judges it
    tokens: int
    cut: bool


def partial(said: str, right: str) -> float:
    """The share of characters that are right in their place, of the longer text's.

    "1234" for "1235" -> 0.75, "12345" for "1234" -> 0.8
    """
    longest = max(len(said), len(right))
    return sum(map(str.__eq__, said, right)) / longest if longest else 1.0


def overlong(tokens: int, most_without: int, limit: int) -> float:
    """0 up to `most_without` tokens, from there in a straight line to -1 at the limit of tokens.

    The soft punishment of arXiv 2503.14476, equation 13.
    """
    if tokens <= most_without:
        return 0.0
    return max((most_without - tokens) / (limit - most_without), -1.0)


def _unless_cut(agree: Callable[[str, str], bool]) -> Callable[[Spoken, str], float]:
    """1 for an answer that came to its end and is right, else 0."""
    return lambda spoken, right: float(not spoken.cut and agree(spoken.said, right))


# what each built-in reward gives for (what was said, the right answer), where nothing can make it hang
JUDGES: dict[str, Callable[[Spoken, str], float]] = {
    **{name: _unless_cut(SCORES[name].agree) for name in ("exact", "number", "boxed", "math_verify")},
    "partial": lambda spoken, right: partial(spoken.said, right),
}
BUILT_IN = (*JUDGES, "length")
PARSED = 64  # right answers that math_verify reads before a run; each takes milliseconds, or seconds


def check_settings(config: Config) -> None:
    """UserError for rewards that there are not, and for flags without their rewards."""
    for name, weight in config.rewards.items():
        if name not in BUILT_IN:
            near = difflib.get_close_matches(name, BUILT_IN, 1)
            raise UserError(
                f"--rewards {name}: there is no such reward"
                + (f"; did you mean {near[0]}?" if near else f"; there are {', '.join(BUILT_IN)}")
            )
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise UserError(f"--rewards {name}={weight}: expected a number, as in {name}=0.5")
    if not any(config.rewards.values()):
        raise UserError("--rewards: expected at least one weight that is not 0, as in exact=1")
    _check_length(config)


def _check_length(config: Config) -> None:
    """UserError where --rewards length and --reward_length do not go together."""
    given, limit = config.reward_length, config.max_tokens
    if not given and "length" not in config.rewards:
        return
    if not given:
        raise UserError(
            "--rewards length: it falls from 0 to -1 between --reward_length and --max_tokens; give"
            " --reward_length N, the tokens that an answer may have without a loss"
        )
    if "length" not in config.rewards:
        raise UserError(f"--reward_length {given}: it belongs to the reward length; add it to --rewards")
    if limit and given >= limit:
        raise UserError(
            f"--reward_length {given}: an answer has at most {limit} tokens, so it would never be too long;"
            " give fewer, or more --max_tokens"
        )


class Rewards:
    """The rewards of a run, in one process."""

    def __init__(self, config: Config, template: Template):
        self.names = tuple(config.rewards)
        self.weights = torch.tensor(list(config.rewards.values()), dtype=torch.float64)
        self.template, self.config = template, config

    @classmethod
    def of(cls, config: Config, template: Template) -> Rewards:
        """The rewards of --rewards, whose answers are in this template.

        UserError for settings that make no sense.
        """
        check_settings(config)
        return cls(config, template)

    def check(self, questions: Sequence[Question]) -> None:
        """UserError where the rewards cannot judge answers to these questions."""
        for name in self.names:
            if name in SCORES:
                asked = questions[:PARSED] if name == "math_verify" else questions
                require_readable(name, asked, f"--rewards {name}")

    def score(self, question: Question, answers: Sequence[Drawn]) -> Scored | Failed:
        """What each of a group's answers to a question is worth."""
        spoken = [self._spoken(question, answer) for answer in answers]
        columns = [self._column(name, spoken, question.right) for name in self.names]
        values = torch.tensor(columns, dtype=torch.float64).T
        return Scored(values, values @ self.weights)

    def close(self) -> None:
        """The end of the run."""

    def __enter__(self) -> Rewards:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _spoken(self, question: Question, answer: Drawn) -> Spoken:
        asked = answer.text, self.template, question.opening
        return Spoken(whole_text(*asked).strip(), answer_text(*asked), len(answer.tokens), answer.cut)

    def _column(self, name: str, spoken: list[Spoken], right: str) -> list[float]:
        if name == "length":
            most, limit = self.config.reward_length, self.config.max_tokens
            return [overlong(answer.tokens, most, limit) for answer in spoken]
        return [JUDGES[name](answer, right) for answer in spoken]
