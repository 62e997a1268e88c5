"""JSONL -> documents (tokens and loss mask) -> rows of one or more documents -> a schedule of optimizer steps -> batches.

The schedule is a pure function of (documents, sizes, seed, step): every process computes the same one, a resume needs only the
step number, and the trained tokens of a whole optimizer step are known before its first micro-batch.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools

import numpy as np
import torch

from rwkv_miss.errors import UserError

from .formats import read_rows
from .template import Segment, render


@dataclasses.dataclass
class Document:
    """ids (n,) int32 and trained (n,) bool: token i is a target where trained[i]. Token 0 is never one, nothing stands before it."""

    ids: np.ndarray
    trained: np.ndarray

    @property
    def targets(self) -> int:
        return int(self.trained[1:].sum())


@dataclasses.dataclass
class Documents:
    """The encoded data set; `cut` rows were longer than ctx_len and lost `cut_tokens` in all."""

    rows: list[Document]
    cut: int = 0
    cut_tokens: int = 0

    @property
    def tokens(self) -> int:
        return sum(len(row.ids) for row in self.rows)

    @property
    def targets(self) -> int:
        return sum(row.targets for row in self.rows)


def encode(segments: list[Segment], tokenizer) -> Document:
    """Tokens of a document with the end of document appended; the end is always trained."""
    pieces = [(tokenizer.encode(segment.text), segment.trained) for segment in segments]
    pieces.append((list(tokenizer.eod), True))
    ids = np.array([i for piece, _ in pieces for i in piece], dtype=np.int32)
    trained = np.array([flag for piece, flag in pieces for _ in piece], dtype=bool)
    return Document(ids, trained)


def load_documents(path, tokenizer, ctx_len: int) -> Documents:
    """Read and tokenise a data file. A row's first ctx_len + 1 tokens are kept: ctx_len inputs with their targets.

    Raises UserError for no rows at all, and when no token of the whole file is trained.
    """
    documents = Documents([])
    for where, content in read_rows(path):
        segments = render(content["messages"]) if "messages" in content else [Segment(content["text"], True)]
        try:
            row = encode(segments, tokenizer)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        excess = len(row.ids) - (ctx_len + 1)
        if excess > 0:
            row = Document(row.ids[:-excess], row.trained[:-excess])
            documents.cut += 1
            documents.cut_tokens += excess
        documents.rows.append(row)
    if not documents.rows:
        raise UserError(f"{path} holds no rows; expected one JSON object per line")
    if not documents.targets:
        raise UserError(f"{path}: no token is trained; every answer is cut off at --ctx_len {ctx_len}, raise it")
    return documents


def pack(lengths: list[int], capacity: int, seed: int) -> list[list[int]]:
    """Documents into rows of at most `capacity` tokens, best fit, longest first: each into the fullest row that has room.

    Which of two documents of one length comes first is random, so that neighbours in the file do not share rows.
    """
    order = np.random.default_rng(seed).permutation(len(lengths))
    order = order[np.argsort(-np.asarray(lengths)[order], kind="stable")]
    rows: list[list[int]] = []
    room: list[int] = []  # the distinct amounts of room in rows, ascending
    rows_with: dict[int, list[int]] = {}
    for document in order.tolist():
        place = bisect.bisect_left(room, lengths[document])
        if place == len(room):
            row, left = len(rows), capacity
            rows.append([])
        else:
            left = room[place]
            row = rows_with[left].pop()
            if not rows_with[left]:
                del rows_with[left], room[place]
        rows[row].append(document)
        left -= lengths[document]
        if left not in rows_with:
            bisect.insort(room, left)
            rows_with[left] = []
        rows_with[left].append(row)
    return rows


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, turn: int, count: int) -> np.ndarray:
    """The order of the rows in pass `turn` over the data."""
    return np.random.default_rng([seed, turn]).permutation(count)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which rows make up each optimizer step, micro-batch and rank. Every pass over the data is a new permutation of the rows."""

    rows: list[list[int]]  # the documents of each row
    lengths: list[int]  # inputs of each row
    targets: list[int]  # trained tokens of each row
    micro_bsz: int
    accumulate: int
    world: int
    seed: int

    @property
    def rows_per_step(self) -> int:
        return self.micro_bsz * self.accumulate * self.world

    @property
    def steps_per_pass(self) -> int:
        """Optimizer steps for the whole data once; the last one may be short."""
        return -(-len(self.lengths) // self.rows_per_step)

    def step_rows(self, step: int) -> list[int]:
        """Row indices of optimizer step `step` (0-based), longest last, at most rows_per_step of them.

        Sorting inside a step saves padding and changes nothing else: the loss is one sum over the step.
        """
        turn, place = divmod(step, self.steps_per_pass)
        rows = _permutation(self.seed, turn, len(self.lengths))[place * self.rows_per_step : (place + 1) * self.rows_per_step]
        return sorted(rows.tolist(), key=lambda row: (self.lengths[row], row))

    def step_targets(self, step: int) -> int:
        """Trained tokens of the whole step, over all micro-batches and ranks."""
        return sum(self.targets[row] for row in self.step_rows(step))

    def step_tokens(self, step: int) -> int:
        """Input tokens of the whole step, padding not counted."""
        return sum(self.lengths[row] for row in self.step_rows(step))

    def micro_rows(self, step: int, micro: int, rank: int) -> list[int]:
        """Rows of one micro-batch on one rank; fewer than micro_bsz only in a short step."""
        rows = self.step_rows(step)
        groups = self.accumulate * self.world
        size = -(-len(rows) // groups)
        group = micro * self.world + rank
        return rows[group * size : (group + 1) * size]


def collate(rows: list[list[Document]], step_targets: int) -> dict:
    """Rows padded on the right to the longest: ids, targets (B, T) int64, mask (B, T) bool, and the step's trained tokens; reset (B, T)
    bool, set where a document starts inside a row, or None.

    No rows at all (a short step) gives one fully masked row, so that every rank runs the same operations.
    """
    width = max([sum(len(document.ids) - 1 for document in row) for row in rows] + [1])
    ids = torch.zeros(max(len(rows), 1), width, dtype=torch.int64)
    targets, mask, reset = torch.zeros_like(ids), torch.zeros(ids.shape, dtype=torch.bool), torch.zeros(ids.shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        start = 0
        for document in row:
            part = slice(start, start := start + len(document.ids) - 1)
            ids[i, part] = torch.from_numpy(document.ids[:-1])
            targets[i, part] = torch.from_numpy(document.ids[1:])
            mask[i, part] = torch.from_numpy(document.trained[1:])
            reset[i, part][:1] = part.start > 0
    return {"ids": ids, "targets": targets, "mask": mask, "reset": reset if reset.any() else None, "step_targets": step_targets}


class Batches:
    """The micro-batches of one rank in order, from optimizer step `first_step` (0-based) until before `steps`: what Lightning iterates over."""

    def __init__(self, documents: Documents, schedule: Schedule, steps: int, rank: int, first_step: int = 0):
        self.documents, self.schedule, self.steps, self.rank = documents, schedule, range(first_step, steps), rank

    def __len__(self) -> int:
        return len(self.steps) * self.schedule.accumulate

    def __iter__(self):
        for step in self.steps:
            for micro in range(self.schedule.accumulate):
                rows = self.schedule.micro_rows(step, micro, self.rank)
                yield collate([[self.documents.rows[i] for i in self.schedule.rows[row]] for row in rows], self.schedule.step_targets(step))
