"""Data file -> documents (tokens and loss mask) -> rows of one or more documents -> a schedule of optimizer
steps -> batches.

The schedule is a pure function of (documents, sizes, seed, step): every process computes the same one, a
resume needs only the step number, and the trained tokens of a whole optimizer step are known before its first
micro-batch.
"""

from __future__ import annotations

import array
import bisect
import dataclasses
import functools
import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from rwkv_miss.errors import UserError
from rwkv_miss.progress import progress

from .config import Config, accumulation
from .config.launcher import is_first_process
from .formats import BY_NAME, Reading, Report, sample, sources
from .template import DEFAULT, Template, trains_by_marker
from .tokenise import Encoder, Tokens, tokenise


@dataclasses.dataclass
class Document:
    """ids (n,) int32 and trained (n,) bool: token i is a target where trained[i]. Token 0 is never one,
    nothing stands before it.
    """

    ids: np.ndarray
    trained: np.ndarray

    @property
    def targets(self) -> int:
        return int(np.count_nonzero(self.trained[1:]))


# A run keeps what is here for each document, of which there may be 10^8, so that numbers have the bytes they
# need and are no objects.


class Rows(Sequence):
    """Documents that are parts of flat arrays, one or several files' worth: row i is `lengths[i]` int32
    tokens of files[of[i]] from `starts[i]` int64 on.
    """

    def __init__(self, files: list[Tokens], of: np.ndarray, starts: np.ndarray, lengths: np.ndarray):
        self.files, self.of, self.starts, self.lengths = files, of, starts, lengths

    def __len__(self) -> int:
        return len(self.of)

    def __getitem__(self, i: int) -> Document:
        start = int(self.starts[i])
        tokens, part = self.files[self.of[i]], slice(start, start + int(self.lengths[i]))
        return Document(tokens.ids[part], tokens.trained[part])

    def take(self, chosen: np.ndarray) -> Rows:
        return Rows(self.files, self.of[chosen], self.starts[chosen], self.lengths[chosen])


@dataclasses.dataclass
class Documents:
    """The encoded data set. `lost` (n,) int32: tokens that were cut off each row, a conversation longer than
    ctx_len; None: of no row. `text` (n,) int32: the number of the text, longer than ctx_len, that a row is a
    part of, -1 for a row of its own; None: for all. `untrained`: how many were left out because they have no
    trained token.
    """

    rows: Sequence[Document]
    lost: np.ndarray | None = None
    text: np.ndarray | None = None
    untrained: int = 0

    @property
    def cut(self) -> int:
        """Rows that were longer than ctx_len and lost their end."""
        return 0 if self.lost is None else int(np.count_nonzero(self.lost))

    @property
    def cut_tokens(self) -> int:
        """Tokens that they lost in all."""
        return 0 if self.lost is None else int(self.lost.sum(dtype=np.int64))

    @property
    def split(self) -> int:
        """Texts that became several rows, of which at least one is here."""
        return 0 if self.text is None else len(np.unique(self.text[self.text >= 0]))

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, (n,) int32."""
        return (
            self.rows.lengths
            if isinstance(self.rows, Rows)
            else np.array([len(row.ids) for row in self.rows], dtype=np.int32)
        )

    @functools.cached_property
    def row_targets(self) -> np.ndarray:
        """Trained tokens of each row, (n,) int32."""
        rows = progress(self.rows, "counting trained tokens", unit="documents", shown=is_first_process())
        return np.fromiter((row.targets for row in rows), np.int32, len(self.rows))

    def take(self, chosen: np.ndarray) -> Documents:
        """The documents at these places."""
        rows = self.rows.take(chosen) if isinstance(self.rows, Rows) else [self.rows[i] for i in chosen]
        return Documents(
            rows, *(None if part is None else part[chosen] for part in (self.lost, self.text)), self.untrained
        )

    def learnable(self) -> Documents:
        """Those with a trained token: a step of others alone would have no loss."""
        chosen = np.flatnonzero(self.row_targets)
        left_out = len(self.rows) - len(chosen)
        return (
            dataclasses.replace(self.take(chosen), untrained=self.untrained + left_out) if left_out else self
        )

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the tokens and masks; every save asks for it."""
        digest = hashlib.sha256()
        for row in progress(self.rows, "hashing the tokens", unit="documents", shown=is_first_process()):
            digest.update(row.ids)
            digest.update(row.trained)
        return digest.hexdigest()

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def targets(self) -> int:
        return int(self.row_targets.sum(dtype=np.int64))


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What --data_file or --eval_file names, as tokens: its files, and which documents of each are used."""

    data_file: str
    encoder: Encoder
    files: list[Tokens]
    chosen: list[np.ndarray]

    @property
    def longest(self) -> int:
        """Inputs of the longest document."""
        lengths = [
            np.diff(tokens.ends, prepend=0)[documents] for tokens, documents in zip(self.files, self.chosen)
        ]
        return int(max(length.max(initial=1) for length in lengths)) - 1

    @property
    def texts(self) -> int:
        """Inputs of all documents where all are running text, else 0."""
        if not all(tokens.texts[documents].all() for tokens, documents in zip(self.files, self.chosen)):
            return 0
        return sum(
            int(np.diff(tokens.ends, prepend=0)[documents].sum()) - len(documents)
            for tokens, documents in zip(self.files, self.chosen)
        )

    def documents(self, ctx_len: int) -> Documents:
        """As documents of at most ctx_len + 1 tokens: ctx_len inputs with their targets.

        A longer conversation is cut; a longer text becomes several documents, each beginning with the last
        token of the one before, so that every token is a target once. Those without a trained token are left
        out. Raises UserError where nothing is trained.
        """
        documents = fit(self.files, self.chosen, ctx_len)
        if not documents.targets:
            raise UserError(
                f"{self.data_file}: no token is trained; every answer is cut off at --ctx_len {ctx_len},"
                " raise it"
            )
        mask, end = self.encoder.loss_mask, len(self.encoder.tokenizer.eod)
        if trains_by_marker(mask) and all(
            int(tokens.trained.sum()) == len(tokens.ends) * end for tokens in self.files
        ):
            raise UserError(
                f"{self.data_file}: no row has anything after the marker {mask!r}; --loss_mask takes"
                " assistant, all, or a text in the rows"
            )
        return documents.learnable()


def load(
    data_file: str,
    encoder: Encoder,
    cache: str = "none",
    reading: Reading = BY_NAME,
    report: Report | None = None,
    seed: int = 0,
) -> Loaded:
    """Read and tokenise. `cache` is that of tokenise(); `seed` decides which rows of a source with a weight
    are seen.

    Raises UserError for what cannot be read, and for no rows at all.
    """
    report = report or Report()
    found = sources(str(data_file), reading, report.notes)
    files = [tokenise(source, encoder, report, reading, cache) for source in found]
    chosen = [
        sample(len(tokens.ends), source.weight, seed, i)
        for i, (tokens, source) in enumerate(zip(files, found))
    ]
    return Loaded(str(data_file), encoder, files, chosen)


def load_documents(
    data_file, tokenizer, ctx_len: int, template: Template = DEFAULT, loss_mask: str = "assistant", **how
) -> Documents:
    """load() and Loaded.documents() in one."""
    return load(data_file, Encoder(tokenizer, template, loss_mask), **how).documents(ctx_len)


def fit(files: list[Tokens], chosen: list[np.ndarray], ctx_len: int) -> Documents:
    """Documents of at most ctx_len + 1 tokens, from the chosen documents of each file."""
    file = np.repeat(
        np.arange(len(files), dtype=np.min_scalar_type(len(files))), [len(documents) for documents in chosen]
    )
    ends = np.concatenate([tokens.ends[documents] for tokens, documents in zip(files, chosen)])
    starts = np.concatenate(
        [np.concatenate([[0], tokens.ends[:-1]])[documents] for tokens, documents in zip(files, chosen)]
    )
    texts = np.concatenate([tokens.texts[documents] for tokens, documents in zip(files, chosen)])
    lengths = ends - starts
    too_long = lengths > ctx_len + 1
    lost = (
        np.where(too_long & ~texts, lengths - (ctx_len + 1), 0).astype(np.int32)
        if (too_long & ~texts).any()
        else None
    )
    if not (too_long & texts).any():
        return Documents(Rows(files, file, starts, np.minimum(lengths, ctx_len + 1).astype(np.int32)), lost)
    windows = np.where(too_long & texts, -(-(lengths - 1) // ctx_len), 1)
    of = np.repeat(np.arange(len(lengths)), windows)
    begins = starts[of] + (np.arange(len(of)) - np.repeat(np.cumsum(windows) - windows, windows)) * ctx_len
    rows = Rows(files, file[of], begins, np.minimum(ends[of] - begins, ctx_len + 1).astype(np.int32))
    return Documents(
        rows,
        None if lost is None else lost[of],
        np.where(windows > 1, np.arange(len(windows)), -1).astype(np.int32)[of],
    )


@dataclasses.dataclass(frozen=True)
class Groups(Sequence):
    """Lists of numbers one after another: list i is members[ends[i - 1] : ends[i]], from 0 for the first."""

    members: Sequence[int]
    ends: Sequence[int]

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> list[int]:
        i = range(len(self.ends))[i]
        return list(self.members[self.ends[i - 1] if i else 0 : self.ends[i]])

    def sums(self, values: np.ndarray) -> array.array:
        """The sum of the members' values of each list."""
        return _integers(
            np.diff(
                np.cumsum(values[np.asarray(self.members)], dtype=np.int64)[np.asarray(self.ends) - 1],
                prepend=0,
            )
        )


def _integers(values: np.ndarray) -> array.array:
    """As Python's integers, 4 bytes each: those of numpy overflow in a sum, and are no JSON."""
    return array.array("i", values.astype(np.int32).tobytes())


def pack(lengths: Sequence[int] | np.ndarray, capacity: int, seed: int) -> Groups:
    """Documents into rows of at most `capacity` tokens, best fit, longest first: each into the fullest row
    that has room.

    Which of two documents of one length comes first is random, so that neighbours in the file do not share
    rows.
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
    """The order of the rows in pass `turn` over the data."""
    return np.random.default_rng([seed, turn]).permutation(count).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which rows make up each optimizer step, micro-batch and rank. Every pass over the data is a new
    permutation of the rows.
    """

    rows: Sequence[list[int]]  # the documents of each row
    lengths: Sequence[int]  # inputs of each row
    targets: Sequence[int]  # trained tokens of each row
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
        rows = _permutation(self.seed, turn, len(self.lengths))[
            place * self.rows_per_step : (place + 1) * self.rows_per_step
        ]
        return sorted(rows.tolist(), key=lambda row: (self.lengths[row], row))

    def step_targets(self, step: int) -> int:
        """Trained tokens of the whole step, over all micro-batches and ranks."""
        return sum(self.targets[row] for row in self.step_rows(step))

    def step_tokens(self, step: int) -> int:
        """Input tokens of the whole step, padding not counted."""
        return sum(self.lengths[row] for row in self.step_rows(step))

    def seed_of(self, step: int, micro: int, rank: int) -> int:
        """The seed of what is random in a micro-batch (dropout): a function of its place, so that a resumed
        run draws the same numbers.
        """
        return int(np.random.SeedSequence([self.seed, step, micro, rank]).generate_state(1)[0])

    def micro_width(self, step: int, micro: int) -> int:
        """Inputs of the longest row of a micro-batch over all ranks, at least 1."""
        return max(
            [self.lengths[row] for rank in range(self.world) for row in self.micro_rows(step, micro, rank)]
            + [1]
        )

    def micro_rows(self, step: int, micro: int, rank: int) -> list[int]:
        """Rows of one micro-batch on one rank; fewer than micro_bsz only in a short step."""
        rows = self.step_rows(step)
        groups = self.accumulate * self.world
        size = -(-len(rows) // groups)
        group = micro * self.world + rank
        return rows[group * size : (group + 1) * size]


def make_schedule(documents: Documents, config: Config, world: int) -> Schedule:
    """The steps of a run over these documents."""
    lengths, count = documents.lengths - 1, len(documents.rows)
    rows = (
        pack(lengths, config.ctx_len, config.random_seed)
        if config.packing
        else Groups(range(count), range(1, count + 1))
    )
    return Schedule(
        rows,
        rows.sums(lengths),
        rows.sums(documents.row_targets),
        config.micro_bsz,
        accumulation(config),
        world,
        config.random_seed,
    )


def collate(rows: list[list[Document]], step_targets: int) -> dict:
    """Rows padded on the right to the longest: ids, targets (B, T) int64, mask (B, T) bool, and the step's
    trained tokens; reset (B, T) bool, set where a document starts inside a row, or None.

    No rows at all (a short step) gives one fully masked row, so that every rank runs the same operations.
    """
    width = max([sum(len(document.ids) - 1 for document in row) for row in rows] + [1])
    ids = np.zeros((max(len(rows), 1), width), dtype=np.int64)
    targets, mask, reset = (
        np.zeros_like(ids),
        np.zeros(ids.shape, dtype=bool),
        np.zeros(ids.shape, dtype=bool),
    )
    for i, row in enumerate(rows):
        start = 0
        for document in row:
            part = slice(start, start := start + len(document.ids) - 1)
            ids[i, part] = document.ids[:-1]
            targets[i, part] = document.ids[1:]
            mask[i, part] = document.trained[1:]
            reset[i, part][:1] = part.start > 0
    batch = {"ids": ids, "targets": targets, "mask": mask, "reset": reset if reset.any() else None}
    return {name: None if array is None else torch.from_numpy(array) for name, array in batch.items()} | {
        "step_targets": step_targets
    }


class Batches:
    """The micro-batches of one rank in order, from optimizer step `first_step` (0-based) until before
    `steps`: what Lightning iterates over.

    `width` of a batch is the length of the longest row that any rank has in this micro-batch.
    """

    def __init__(self, documents: Documents, schedule: Schedule, steps: int, rank: int, first_step: int = 0):
        self.documents, self.schedule, self.steps, self.rank = (
            documents,
            schedule,
            range(first_step, steps),
            rank,
        )

    def __len__(self) -> int:
        return len(self.steps) * self.schedule.accumulate

    def __iter__(self):
        for step in self.steps:
            for micro in range(self.schedule.accumulate):
                rows = self.schedule.micro_rows(step, micro, self.rank)
                batch = collate(
                    [[self.documents.rows[i] for i in self.schedule.rows[row]] for row in rows],
                    self.schedule.step_targets(step),
                )
                yield batch | {"width": self.schedule.micro_width(step, micro)}
