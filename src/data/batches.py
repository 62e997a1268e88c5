"""Batches: documents or preferences -> rows of one or more -> a schedule of optimizer steps -> batches.

The schedule is a pure function of (documents, sizes, seed, step): every process computes the same one, a
resume needs only the step number, and the weights of a whole optimizer step are known before its first
micro-batch.
"""

from __future__ import annotations

import array
import bisect
import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

from ..config import Config
from .examples import Examples


@dataclasses.dataclass(frozen=True)
class Groups(Sequence):
    """Lists of numbers in one array: list i is members[ends[i - 1] : ends[i]], from 0 for the first."""

    members: Sequence[int]
    ends: Sequence[int]

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> list[int]:
        i = range(len(self.ends))[i]
        return list(self.members[self.ends[i - 1] if i else 0 : self.ends[i]])

    def sums(self, values: np.ndarray) -> array.array:
        """Sum the members' values of each list."""
        return _integers(self._sums(values, np.int64))

    def exact_sums(self, values: np.ndarray) -> array.array:
        """Return sum as sums() does, in float64."""
        return array.array("d", self._sums(values, np.float64).tobytes())

    def _sums(self, values: np.ndarray, dtype: type) -> np.ndarray:
        starts = np.append(0, np.asarray(self.ends))[:-1]
        return np.add.reduceat(values[np.asarray(self.members)], starts, dtype=dtype)


def _integers(values: np.ndarray) -> array.array:
    """Convert to Python's integers, of 4 bytes each: numpy's overflow in a sum and JSON can't hold them."""
    return array.array("i", values.astype(np.int32).tobytes())


def pack(lengths: Sequence[int] | np.ndarray, capacity: int, seed: int) -> Groups:
    """Put documents into rows of at most `capacity` tokens: the longest first, each where it fits best.

    Best means the fullest row that has room. Which of two documents of one length comes first is random, so
    that neighbours in the file do not share rows.
    """
    lengths = np.asarray(lengths)
    order = np.random.default_rng(seed).permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    row_of = array.array("i", bytes(4 * len(order)))
    rows = 0
    room: list[int] = []  # the distinct amounts of room in rows, ascending
    rows_with: dict[int, list[int]] = {}
    for i, length in enumerate(memoryview(lengths[order])):
        place = bisect.bisect_left(room, length)
        if place == len(room):
            row, left = rows, capacity
            rows += 1
        else:
            left = room[place]
            row = rows_with[left].pop()
            if not rows_with[left]:
                del rows_with[left], room[place]
        row_of[i] = row
        left -= length
        if left not in rows_with:
            bisect.insort(room, left)
            rows_with[left] = []
        rows_with[left].append(row)
    in_row = np.asarray(row_of)
    return Groups(
        _integers(order[np.argsort(in_row, kind="stable")]),
        _integers(np.cumsum(np.bincount(in_row, minlength=rows))),
    )


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, turn: int, count: int) -> np.ndarray:
    """Draw the order of the rows in pass `turn` over the data."""
    return np.random.default_rng([seed, turn]).permutation(count).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Schedule: the rows of each optimizer step, micro-batch and rank.

    Every pass over the data is a new permutation of the rows. `repeats` steps in a row have the same ones.
    A source with another order has a subclass, which overrides order().
    """

    rows: Sequence[list[int]]  # the documents of each row
    lengths: Sequence[int]  # inputs of each row
    targets: Sequence[int]  # trained tokens of each row
    weights: Sequence[float]  # sum of the weights of each row's trained tokens
    micro_bsz: int
    accumulate: int
    world: int
    seed: int
    repeats: int = 1

    @property
    def rows_per_step(self) -> int:
        return self.micro_bsz * self.accumulate * self.world

    @property
    def steps_per_pass(self) -> int:
        """Optimizer steps of one pass over the data; the last one may be short."""
        return self._row_sets * self.repeats

    @property
    def _row_sets(self) -> int:
        """Steps of a pass that have other rows than the step before."""
        return -(-len(self.lengths) // self.rows_per_step)

    def order(self, turn: int) -> np.ndarray:
        """Return the order of the rows in pass `turn` over the data (0-based), a permutation, (rows,) int."""
        return _permutation(self.seed, turn, len(self.lengths))

    def step_rows(self, step: int) -> list[int]:
        """Return the row indices of optimizer step `step` (0-based), longest last, at most rows_per_step.

        Sorting inside a step saves padding and changes nothing else: the loss is one sum over the step.
        """
        turn, place = divmod(step // self.repeats, self._row_sets)
        begin = place * self.rows_per_step
        rows = self.order(turn)[begin : begin + self.rows_per_step]
        return sorted(rows.tolist(), key=lambda row: (self.lengths[row], row))

    def step_targets(self, step: int) -> int:
        """Count the trained tokens of the whole step, over all micro-batches and ranks."""
        return sum(self.targets[row] for row in self.step_rows(step))

    def step_weight(self, step: int) -> float:
        """Sum the weights of the step's trained tokens: their number if all weights are 1."""
        return math.fsum(self.weights[row] for row in self.step_rows(step))

    def step_tokens(self, step: int) -> int:
        """Count the input tokens of the whole step, without padding."""
        return sum(self.lengths[row] for row in self.step_rows(step))

    def seed_of(self, step: int, micro: int, rank: int) -> int:
        """Return the seed of a micro-batch's random numbers, such as dropout.

        It depends only on the micro-batch's place, so that a resumed run draws the same numbers.
        """
        return int(np.random.SeedSequence([self.seed, step, micro, rank]).generate_state(1)[0])

    def micro_width(self, step: int, micro: int) -> int:
        """Return the inputs of the longest row of a micro-batch over all ranks, at least 1."""
        ranks = range(self.world)
        lengths = (self.lengths[row] for rank in ranks for row in self.micro_rows(step, micro, rank))
        return max([1, *lengths])

    def micro_rows(self, step: int, micro: int, rank: int) -> list[int]:
        """Return the rows of one micro-batch on one rank; fewer than micro_bsz only in a short step."""
        rows = self.step_rows(step)
        groups = self.accumulate * self.world
        size = -(-len(rows) // groups)
        group = micro * self.world + rank
        return rows[group * size : (group + 1) * size]


def make_schedule(
    documents: Examples, config: Config, world: int, schedule_type: type[Schedule] = Schedule
) -> Schedule:
    """Make the schedule of a run over these documents."""
    lengths, count = documents.lengths - 1, len(documents)
    if config.packing and not documents.alone:
        rows = pack(lengths, config.ctx_len, config.random_seed)
    else:
        rows = Groups(range(count), range(1, count + 1))
    targets, sums = rows.sums(documents.target_counts), documents.weight_sums
    return schedule_type(
        rows,
        lengths=rows.sums(lengths),
        targets=targets,
        weights=targets if sums is documents.target_counts else rows.exact_sums(sums),
        micro_bsz=config.micro_bsz,
        accumulate=config.accumulation,
        world=world,
        seed=config.random_seed,
        repeats=config.inner_steps,
    )


class Batches:
    """Micro-batches of one rank in order, which Lightning iterates over.

    They go from optimizer step `first_step` (0-based) until before `steps`. `width` of a batch is the length
    of the longest row that any rank has in this micro-batch. `chunk` and `shared` are those of collator().
    """

    def __init__(
        self,
        documents: Examples,
        schedule: Schedule,
        steps: int,
        rank: int,
        first_step: int = 0,
        chunk: int = 0,
        shared: bool = False,
    ):
        self.documents = documents
        self.schedule = schedule
        self.steps = range(first_step, steps)
        self.rank = rank
        self.collate = documents.collator(chunk, shared)

    def __len__(self) -> int:
        return len(self.steps) * self.schedule.accumulate

    def __iter__(self):
        for step in self.steps:
            for micro in range(self.schedule.accumulate):
                numbers = self.schedule.micro_rows(step, micro, self.rank)
                rows = [[self.documents[i] for i in self.schedule.rows[row]] for row in numbers]
                batch = self.collate(rows, self.schedule.step_weight(step))
                yield batch.having(width=self.schedule.micro_width(step, micro))
