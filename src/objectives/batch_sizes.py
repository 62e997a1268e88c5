"""Sizes of a run's micro-batches, for its memory."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence

import numpy as np

from ..data.batches import Schedule
from ..data.examples import Examples
from ..data.preferences import Preferences

LOOKED_AT = 256  # steps of a pass, for the largest micro-batch


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
    shared: SharedPrompts | None = None  # its sizes where prompts are read once
    documents: Sequence[Sequence[int]] = ()  # the lengths of those in each row


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
