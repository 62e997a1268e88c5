"""Estimates for a run: the sizes of its micro-batches, its work in tokens, and the time that it takes."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence

import numpy as np

from ..data.batches import Schedule
from ..data.examples import Examples
from ..data.preferences import Preferences

LOOKED_AT = 256  # steps of a pass, for the largest micro-batch
# The time of a drawn token, as a share of a trained one's: 128 answers of the demo's model took 0.10 s to
# draw, and 0.19 s to train on with their prompts.
DRAWN = 0.6


@dataclasses.dataclass(frozen=True)
class SharedPrompts:
    """Sizes of a micro-batch in which prompts are read once, with padding."""

    prompts: int
    prompt: int  # tokens of the longest, without its last one
    answer: int  # inputs of the longest, of which the last token of its prompt is the first
    each: int = 2  # answers of a prompt

    @property
    def rows(self) -> int:
        """Answers in all."""
        return self.prompts * self.each

    @property
    def tokens(self) -> int:
        return self.prompts * self.prompt + self.rows * self.answer


@dataclasses.dataclass(frozen=True)
class BatchSizes:
    """The sizes of the largest micro-batch."""

    row: int  # tokens of the longest row
    targets: int  # trained tokens
    shared: SharedPrompts | None = None  # sizes of the micro-batch where prompts are read once
    documents: Sequence[Sequence[int]] = ()  # the lengths of each row's documents


def largest_batch(schedule: Schedule, ctx_len: int, micro_bsz: int) -> tuple[int, int]:
    """Return (tokens of the longest row, most targets in micro_bsz rows); no micro-batch is larger."""
    most = heapq.nlargest(micro_bsz, schedule.targets)
    row = min(max(schedule.lengths), ctx_len)
    return row, max(1, min(sum(most), row * micro_bsz))


def fullest_rows(documents: Examples, schedule: Schedule, micro_bsz: int) -> list[list[int]]:
    """Return the lengths of the documents in the micro_bsz rows that have most of them."""
    rows = heapq.nlargest(micro_bsz, schedule.rows, key=len)
    return [(documents.lengths[row] - 1).tolist() for row in rows]


def largest_shared(preferences: Preferences, schedule: Schedule) -> SharedPrompts:
    """Find the micro-batch of the first pass with the most tokens, if prompts are read once.

    In a long pass LOOKED_AT steps are sampled.
    """
    prompts = preferences.prompt_lengths
    answers = preferences.answers.lengths - prompts
    most = SharedPrompts(0, 0, 0)
    count = schedule.steps_per_pass
    for step in np.unique(np.linspace(0, count - 1, min(LOOKED_AT, count)).astype(int)).tolist():
        for group in range(schedule.accumulate * schedule.world):
            rows = schedule.micro_rows(step, *divmod(group, schedule.world))
            pairs = np.array([example for row in rows for example in schedule.rows[row]], np.int64)
            if not len(pairs):
                continue
            longest = max(answers[2 * pairs].max(), answers[2 * pairs + 1].max())
            prompt = max(1, prompts[2 * pairs].max() - 1)
            found = SharedPrompts(len(pairs), int(prompt), int(longest))
            most = max(most, found, key=lambda sizes: sizes.tokens)
    return most


@dataclasses.dataclass(frozen=True)
class Speed:
    """Speed of a run, and its source."""

    tokens: float  # trained a second, 0 if unknown
    answer: float = 0.0  # seconds for one more token of all sample answers together
    source: str = ""
    drawn: float = 0.0  # tokens of answers a second, if a run draws them; 0: by DRAWN


@dataclasses.dataclass(frozen=True)
class Work:
    """Work of a part of a run, in tokens."""

    trained: float  # a token that is only read counts as a part of a trained one
    drawn: float = 0.0  # one after another, in answers that are drawn together

    def __add__(self, other: Work) -> Work:
        return Work(self.trained + other.trained, self.drawn + other.drawn)

    def times(self, count: float) -> Work:
        return Work(count * self.trained, count * self.drawn)

    @property
    def total(self) -> float:
        """Work in trained tokens."""
        return self.trained + DRAWN * self.drawn

    def seconds(self, speed: Speed) -> float:
        if not speed.drawn:
            return self.total / speed.tokens
        return self.trained / speed.tokens + self.drawn / speed.drawn


@dataclasses.dataclass(frozen=True)
class Times:
    """Estimated seconds of a run's parts, without the search for a learning rate."""

    tokens: float  # to train on, with repetitions
    evaluation_share: float  # work of all evaluations without sample answers, as a share of the training's
    training: float = 0.0  # seconds; 0 where no speed is known
    evaluation: float = 0.0  # seconds of evaluations, with sample answers
    reference: float = 0.0  # seconds of the pass of the reference, unless its values are kept already
    sampling: float = 0.0  # seconds of the training in which answers are sampled
    provided: str = ""  # assumption behind the time, as "if ..."
