"""Reference pass: values that another model gives for each trained token, without gradient, before the
training.

For a preference the value is ln p, and the reference is the model before step 1: the base, as a fresh adapter
changes nothing. Or it is the model of --reference, which is freed after the pass. The pass reads the run's
own micro-batches of its first pass over the data, in the same rows, so that each value has the bits of the
model's first step. A teacher's values (distillation.py) are not compared with the model's own: they are read
in an order that the run's batch does not change.

The values are kept in the cache folder of the tokens, or without one in the run's folder. The folder's name
is a hash of all that decides them: other data or another model have another folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import time
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from rwkv_miss.errors import UserError
from rwkv_miss.progress import DELAY, Progress, duration_text

from ..common.batch import Batch
from ..common.late_reading import LateNumbers
from ..config import Config
from ..data.batches import Schedule
from ..data.collate import row_by_row
from ..data.examples import Examples
from ..data.held_out import evaluation_rows
from ..data.reference_values import LOG_PROB, are_finite, packed, row_shape, unknown, unpacked
from ..data.token_cache import cache_folder, remove_old
from ..model import RWKV
from ..ops.build import announce
from .base import Source
from .policy import Policy, policy_of
from .reference_blocks import NAMES, ValueBlocks, blocks_in
from .reference_model import build_reference, reference_of

VERSION = 2  # raised when the code changes the values
FOLDER = "reference"  # in the run's folder
ALL = "evaluation"  # the order of a pass over all examples

Rows = list[list[int]]  # the places of the examples of each row of a batch


@dataclasses.dataclass(frozen=True)
class Rounds:
    """Rounds of reading, in each of which every process reads a batch."""

    order: str  # names the order of the examples
    count: int
    batches: Callable[[int], list[Rows]]  # number of a round -> the batch of each process


def training_rounds(schedule: Schedule, steps: int) -> Rounds:
    """Make rounds of the micro-batches of the first `steps` steps, up to the end of the first pass."""

    def batches_of(number: int) -> list[Rows]:
        step, micro = divmod(number, schedule.accumulate)
        batches = [schedule.micro_rows(step, micro, rank) for rank in range(schedule.world)]
        return [[schedule.rows[row] for row in batch] for batch in batches]

    return Rounds("training", min(steps, schedule.steps_per_pass) * schedule.accumulate, batches_of)


def held_out_rounds(batches: list[Rows], world: int) -> Rounds:
    """Make rounds of the batches of an evaluation."""

    def batches_of(number: int) -> list[Rows]:
        now = batches[number * world : (number + 1) * world]
        return now + [[]] * (world - len(now))

    return Rounds(ALL, -(-len(batches) // world), batches_of)


@dataclasses.dataclass(frozen=True)
class TokenValues:
    """Values of trained tokens, and how a model gives them."""

    dtype: np.dtype  # dtype of a token's values, one of data/reference_values.py
    # a batch on the device -> the numbers of its values, (n,) or (n, columns)
    read: Callable[[Policy, Batch], Tensor]
    settings: tuple = ()  # settings that decide the values, too
    as_in_steps: bool = True  # whether they have the bits of the run's own steps, perhaps by its own model


LOG_PROBS = TokenValues(LOG_PROB, lambda policy, batch: policy.log_probs(batch))


class ReferencePass:
    """Pass of the reference over examples; all processes take part, and get the same values.

    `shared`: the prompt of a pair is read once.
    """

    def __init__(self, source: Source, shared: bool, policy: Policy, values: TokenValues = LOG_PROBS):
        self.config, self.chunks, self.shared = source.config, source.chunks, shared
        self.called = source.loss.words.reference
        self.model, self.policy, self.values = policy.model, policy, values
        self.processes, self.device = policy.processes, policy.device
        reference = reference_of(self.config.reference)
        self.other = reference and reference.fingerprint
        is_base = self.other == self.model.base_fingerprint
        # the model in training is then the reference, and no second base is loaded
        if values.as_in_steps and is_base and not self.config.init_adapter:
            self.other = None

    def training(self, documents: Examples, schedule: Schedule, steps: int, what: str) -> np.ndarray:
        """Return the values of examples, (targets,), in the batches of `steps` steps. The values of others
        are NaN. `what` names the examples."""
        return self._values_of(documents, training_rounds(schedule, steps), what)

    def all(self, documents: Examples, what: str) -> np.ndarray:
        """Return the values of all examples, (targets,), in batches of an evaluation."""
        config = self.config
        seed = config.random_seed if self.values.as_in_steps else 0
        row = longest_row(config, self.values, documents)
        batches = evaluation_rows(documents, row, config.micro_bsz, seed)
        return self._values_of(documents, held_out_rounds(batches, self.processes.world), what)

    def part(self, documents: Examples, chosen: np.ndarray, what: str) -> np.ndarray:
        """Return the values of all examples, (targets,), of which those not `chosen` are NaN."""
        if len(chosen) == len(documents):
            return self.all(documents, what)
        sizes = documents.target_counts.astype(np.int64)
        is_chosen = np.zeros(len(sizes), bool)
        is_chosen[chosen] = True
        values = self.all(documents.take(chosen), what)
        found = unknown(int(sizes.sum()), self.values.dtype)
        found[np.repeat(is_chosen, sizes)] = values
        return found

    def _values_of(self, documents: Examples, rounds: Rounds, what: str) -> np.ndarray:
        folder, first = self._folder(documents, rounds.order), self.processes.rank == 0
        begun = time.perf_counter()
        kept = blocks_in(folder, self.values.dtype, first, self.called)
        with kept as blocks, self._reference_model() as read:
            if blocks.folder and self.config.data_cache != "none":
                remove_old(folder.parent)
            known = blocks.read()
            count = torch.tensor(float(len(known)), dtype=torch.float64, device=self.device)
            values = _Values(documents, int(self.processes.total(count)), blocks)
            examples = sum(_examples(rounds.batches(number)) for number in range(rounds.count))
            with Progress(f"the {self.called} reads {what}", examples, f"{documents.word}s", first) as bar:
                for number in range(rounds.count):
                    batches = rounds.batches(number)
                    if place := values.known_place(batches):
                        values.put(batches, self._from_first(known[place], place.stop - place.start))
                    else:
                        values.add(batches, self._read(documents, batches, read))
                    self._check(values, what)
                    bar.update(_examples(batches))
            found = values.all()
            self._check(values, what)
        seconds = time.perf_counter() - begun
        if first and blocks.folder and seconds > DELAY:
            took = f"the {self.called} read {what} in {duration_text(seconds)}"
            announce(f"{took}; its values are kept in {folder} for later runs")
        return found

    def _check(self, values: _Values, what: str) -> None:
        """Raise UserError if a value is not finite. All processes see the same values; none is kept."""
        if values.not_finite is None:
            return
        values.blocks.clear()
        word, line = values.documents.word, values.documents.line(values.not_finite)
        model = self.config.reference or self.config.load_model
        raise UserError(
            f"the {self.called}, {model}, gives ln p that is not finite"
            f" for the {word} of line or row {line} of {what}; check this row and the model, or"
            " choose another --precision"
        )

    def _from_first(self, values: np.ndarray, count: int) -> np.ndarray:
        """Return the `count` values that the first process gives, in every process."""
        if self.processes.world == 1:
            return values
        shared = torch.zeros(count, *row_shape(values.dtype), device=self.device)
        shared[: len(values)] = torch.from_numpy(unpacked(values))
        return packed(self.processes.total(shared).cpu().numpy(), values.dtype)

    def _read(self, documents: Examples, batches: list[Rows], read: Callable[[Batch], Tensor]) -> LateNumbers:
        """Start reading all examples of a round in order; they are on their way from the device."""
        sizes = [_count(documents, rows) for rows in batches]
        rank = self.processes.rank
        examples = [[documents[i] for i in row] for row in batches[rank]]
        lengths = documents.lengths - 1
        width = max([1, *(int(lengths[row].sum()) for rows in batches for row in rows)])
        collate = documents.collator(self.config.chunk_ctx, self.shared)
        batch = collate(examples, 1.0).having(width=width)
        # chunks have the tokens of several examples in turns
        order = torch.from_numpy(row_by_row(batch)).to(self.device)
        found = torch.zeros(sum(sizes), *row_shape(self.values.dtype), device=self.device)
        start = sum(sizes[:rank])
        found[start : start + sizes[rank]] = read(batch.to(self.device))[order].float()
        return LateNumbers(self.processes.total(found))

    @contextlib.contextmanager
    def _reference_model(self) -> Iterator[Callable[[Batch], Tensor]]:
        """Give the block a function: a batch -> numbers of the reference, which is read at the first call."""
        models: list[RWKV] = []

        def read(batch: Batch) -> Tensor:
            if self.other is None:
                if self.device.type == "cuda" and not self.config.strategy.startswith("deepspeed_stage_3"):
                    self.model.to(self.device)
                return self.values.read(self.policy, batch)
            if not models:
                models.append(build_reference(self.config).to(self.device))
            return self.values.read(policy_of(models[0], self.chunks), batch)

        try:
            yield read
        finally:
            if models and self.device.type == "cuda":
                models.clear()
                torch.cuda.empty_cache()

    def _folder(self, documents: Examples, order: str) -> pathlib.Path:
        """Return the folder for the values of these documents, read in this order."""
        config = self.config
        # a method may change the base, up to its rounding
        parts = config.train_parts
        method = [config.peft, config.written("peft_config"), parts, config.train_tokens, config.layers]
        start = [self.model.base_fingerprint, *method]
        batch = []  # the settings that decide which examples are in a batch together
        if self.values.as_in_steps:
            batch = [config.packing, config.micro_bsz, config.accumulation, self.processes.world]
            batch += [config.random_seed, config.chunk_ctx, self.shared]
        return folder_of(config, self.values, documents, order, self.other or start, batch)


def folder_of(
    config: Config, values: TokenValues, documents: Examples, order: str, model: str | list, batch: list
) -> pathlib.Path:
    """Return the folder for the values of these documents, read in this order. `model` tells which model
    reads, and `batch` what else decides."""
    in_fp32 = config.peft == "none" and not isinstance(model, str)  # is the model in training
    described = [
        VERSION,
        torch.__version__,
        np.__version__,  # numpy's random numbers are the order
        order,
        documents.digest,
        model,
        [str(values.dtype), *values.settings],
        [config.precision, in_fp32, config.quant, config.wkv, config.accelerator],
        [longest_row(config, values, documents), *batch],
    ]
    digest = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:24]
    if config.data_cache == "none":
        return pathlib.Path(config.proj_dir, FOLDER, digest)
    return cache_folder(config.data_cache) / digest


def longest_row(config: Config, values: TokenValues, documents: Examples) -> int:
    """Return the most tokens of a row in a pass over all documents: a teacher's rows are no longer than the
    steps' own, also where documents share none there."""
    shares_rows = values.as_in_steps or config.packing
    return config.ctx_len if shares_rows else int(documents.lengths.max()) - 1


def kept_share(config: Config, values: TokenValues, documents: Examples) -> float:
    """Return the share of a teacher's values of these documents that earlier passes have left."""
    teacher = reference_of(config.reference).fingerprint
    files = folder_of(config, values, documents, ALL, teacher, []).glob(NAMES)
    kept = sum(file.stat().st_size for file in files)
    return kept / max(1, values.dtype.itemsize * documents.targets)


class _Values:
    """Values of examples as they come in, round by round; the first `known` are those of an earlier pass."""

    def __init__(self, documents: Examples, known: int, blocks: ValueBlocks):
        self.documents, self.known, self.blocks = documents, known, blocks
        self.sizes = documents.target_counts.astype(np.int64)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.values = unknown(int(self.sizes.sum()), blocks.dtype)
        self.position = 0
        self.not_finite: int | None = None  # the first example with a value that is not finite
        self.late: deque[tuple[list[Rows], LateNumbers]] = deque()

    def known_place(self, batches: list[Rows]) -> slice | None:
        """Return the place of the next round's values among the known ones; None if not all are known.

        After a round that was read no later one is known: the position of a round on its way is not passed.
        """
        end = self.position + sum(_count(self.documents, rows) for rows in batches)
        return slice(self.position, end) if not self.late and end <= self.known else None

    def add(self, batches: list[Rows], numbers: LateNumbers) -> None:
        """Add the next round's numbers. They are read when the device has its next work."""
        self.late.append((batches, numbers))
        if len(self.late) > 1:
            self._take()

    def all(self) -> np.ndarray:
        """Return the values of all examples, (targets,); NaN for examples in no round."""
        while self.late:
            self._take()
        return self.values

    def _take(self) -> None:
        batches, numbers = self.late.popleft()
        values = packed(numbers.array(), self.blocks.dtype)
        # the files have the first ones already, if an earlier pass ended within this round
        self.blocks.add(values[max(0, self.known - self.position) :])
        self.put(batches, values)

    def put(self, batches: list[Rows], values: np.ndarray) -> None:
        """Put the values of the next round in their places."""
        self.position += len(values)
        examples = [i for rows in batches for row in rows for i in row]
        if not examples:
            return
        places = [np.arange(self.starts[i], self.starts[i] + self.sizes[i]) for i in examples]
        self.values[np.concatenate(places)] = values
        if self.not_finite is None and not are_finite(values):
            self.not_finite = next(i for i, at in zip(examples, places) if not are_finite(self.values[at]))


def _examples(batches: list[Rows]) -> int:
    """Count the examples of the batches of a round."""
    return sum(len(row) for rows in batches for row in rows)


def _count(documents: Examples, rows: Rows) -> int:
    """Count the trained tokens of these rows."""
    return int(sum(documents.target_counts[i] for row in rows for i in row))
