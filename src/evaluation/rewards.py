"""Rewards of drawn answers: the weighted sum of the rewards that --rewards names.

rewards = Rewards.of(config, template)      # UserError for settings that make no sense
rewards.check(questions, tokenizer)         # notes; UserError where the rewards cannot judge these questions
rewards.score(question, answers)            # GroupRewards, or Failed: this group alone cannot be used
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_miss.errors import UserError

from ..config import Config
from ..data.chat_template import Template
from ..data.questions import Question
from ..data.templates import answer_text, whole_text
from ..data.tokenizer import Tokenizer
from ..inference.request import Answer
from ..losses.grpo import REWARDS
from .mathematics import require_math_verify
from .reward_functions import SIGNATURE, FunctionFailed, RewardFunctions
from .scoring import SCORES, require_readable


class GroupRewards(NamedTuple):
    """Rewards of the G answers of a group."""

    values: Tensor  # (G, rewards) float64, on the CPU
    total: Tensor  # (G,) float64: their weighted sums


class Failed(NamedTuple):
    """Failure of a group's rewards."""

    kind: str  # equal for failures of which the user needs to read one
    reason: str


class Spoken(NamedTuple):
    """Text of an answer for the rewards."""

    whole: str  # the answer with its thoughts
    said: str  # without thoughts, as scripts.evaluate judges it
    tokens: Sequence[int]
    cut: bool


def partial(said: str, right: str) -> float:
    """Compute the share of characters that are right in their place, of the longer text's.

    "1234" for "1235" -> 0.75, "12345" for "1234" -> 0.8
    """
    longest = max(len(said), len(right))
    return sum(map(str.__eq__, said, right)) / longest if longest else 1.0


def overlong(tokens: int, most_without: int, limit: int) -> float:
    """Punish length: 0 up to `most_without` tokens, from there in a straight line to -1 at the limit.

    The soft punishment of arXiv 2503.14476, equation 13.
    """
    if tokens <= most_without:
        return 0.0
    return max((most_without - tokens) / (limit - most_without), -1.0)


def _unless_cut(agree: Callable[[str, str], bool]) -> Callable[[Spoken, str], float]:
    """Return a reward: 1 for an answer that came to its end and is right, else 0."""
    return lambda spoken, right: float(not spoken.cut and agree(spoken.said, right))


# built-in rewards, which run in this process: (an answer, the reference answer) -> reward
RIGHT_OR_WRONG: dict[str, Callable[[Spoken, str], float]] = {
    **{name: _unless_cut(SCORES[name].agree) for name in ("exact", "number", "boxed")},
    "partial": lambda spoken, right: partial(spoken.said, right),
}
# lower and upper bound of a built-in reward
RANGES = dict.fromkeys(REWARDS, (0.0, 1.0)) | {"length": (-1.0, 0.0)}
# rewards that a text may keep busy for hours, each in a process of its own
GUARDED = {"regex": "guarded_regex.py", "math_verify": "guarded_mathematics.py"}
PARSED = 64  # reference answers that math_verify reads before a run; each takes milliseconds, or seconds


def _as_drawn(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the tokens of a reference answer with its end; of a text without tokens the end alone."""
    with contextlib.suppress(UserError):
        return [*tokenizer.encode(text), *tokenizer.eod]
    return list(tokenizer.eod)


class Rewards:
    """Rewards of a run, in one process."""

    def __init__(self, config: Config, template: Template):
        self.config, self.template = config, template
        rewards = config.settled().rewards
        self.names = tuple(rewards)
        self.weights = torch.tensor(list(rewards.values()), dtype=torch.float64)
        self.own, this_file, seconds = None, pathlib.Path(__file__), config.reward_timeout
        if names := tuple(name for name in self.names if name not in REWARDS):
            self.own = RewardFunctions(config.reward_file, names, seconds, REWARDS)
        self.guarded = {
            name: RewardFunctions(str(this_file.with_name(file)), (name,), seconds)
            for name, file in GUARDED.items()
            if name in self.names
        }

    @classmethod
    def of(cls, config: Config, template: Template) -> Rewards:
        """Make the rewards of --rewards, for answers in this template; --reward_file is imported.

        Raises UserError for a file without the functions, and if math_verify is not installed.
        """
        if "math_verify" in config.settled().rewards:
            require_math_verify()
        rewards = cls(config, template)
        if rewards.own:
            try:
                rewards.own.start()
            except FunctionFailed as failed:
                raise UserError(
                    f"--reward_file {config.reward_file}: {failed.reason}; expected a file with {SIGNATURE}"
                    " for each reward that is not built in"
                ) from None
        return rewards

    @property
    def digest(self) -> str | None:
        """Return the SHA-256 of --reward_file; the bytes read at the start run to the end."""
        return self.own.digest if self.own else None

    def check(self, questions: Sequence[Question], tokenizer: Tokenizer) -> list[str]:
        """Return notes on odd rewards. Raises UserError if they cannot judge answers to these questions.

        The user's functions are called once, with reference answers to the first question and an empty one.
        """
        for name in self.names:
            if name in SCORES:
                to_read = questions[:PARSED] if name == "math_verify" else questions
                require_readable(name, to_read, f"--rewards {name}")
        question = questions[0]
        answers = [question.answer] * (self.config.group_size - 1) + [""]
        tokens = [_as_drawn(tokenizer, answer) for answer in answers]
        extras, notes = {"cut": [False] * len(answers), "tokens": tokens}, []
        for name in self.own.names if self.own else ():
            try:
                values = self.own.call(name, question.prompt, answers, question.answer, **extras)
            except FunctionFailed as failed:
                raise UserError(
                    f"--reward_file {self.config.reward_file}: in a trial with {len(answers) - 1} reference"
                    f" answers and an empty one, {failed.reason}; the question was"
                    f" {question.prompt[-80:]!r}, the reference answer {question.answer[-80:]!r}"
                ) from None
            if len({*values}) == 1:
                notes.append(
                    f"{name} of --reward_file gave {values[0]:g} to the reference answer and to an empty one"
                    " alike; answers of equal rewards teach nothing"
                )
        return notes

    def score(self, question: Question, answers: Sequence[Answer]) -> GroupRewards | Failed:
        """Score each of a group's answers to a question."""
        spoken = [self._spoken(question, answer) for answer in answers]
        try:
            columns = [self._column(name, spoken, question) for name in self.names]
        except FunctionFailed as failed:
            first = f", the first answer {answers[0].text[:80]!r}" if answers else ""
            where = f"; the question was {question.prompt[-80:]!r}{first}"
            return Failed(failed.kind, f"{failed.reason}{where}")
        values = torch.tensor(columns, dtype=torch.float64).reshape(len(columns), len(spoken)).T
        return GroupRewards(values, values @ self.weights)

    def close(self) -> None:
        """End the processes of the functions."""
        for functions in (self.own, *self.guarded.values()):
            if functions:
                functions.close()

    def __enter__(self) -> Rewards:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _spoken(self, question: Question, answer: Answer) -> Spoken:
        text = answer.text, self.template, question.opening
        return Spoken(whole_text(*text).strip(), answer_text(*text), answer.tokens, answer.cut)

    def _column(self, name: str, spoken: list[Spoken], question: Question) -> list[float]:
        """Return one reward of each answer."""
        prompt, right = question.prompt, question.answer
        whole = [answer.whole for answer in spoken]
        if name == "length":
            most, limit = self.config.reward_length, self.config.max_tokens
            return [overlong(len(answer.tokens), most, limit) for answer in spoken]
        if name == "regex":
            return self.guarded[name].call(name, prompt, whole, self.config.reward_regex)
        if name == "math_verify":
            complete = [answer.said for answer in spoken if not answer.cut]
            judged = iter(self.guarded[name].call(name, prompt, complete, right))
            return [0.0 if answer.cut else next(judged) for answer in spoken]
        if name in RIGHT_OR_WRONG:
            return [RIGHT_OR_WRONG[name](answer, right) for answer in spoken]
        cut, tokens = [answer.cut for answer in spoken], [list(answer.tokens) for answer in spoken]
        return self.own.call(name, prompt, whole, right, cut=cut, tokens=tokens)
