"""Reference pass of a preference: ln p of the answers, without gradient, before the training.

The reference is the model before step 1: the base, as a fresh adapter changes nothing. Or it is the model of
--reference, which is freed after the pass. The pass reads the run's own micro-batches of its first pass over
the data, in the same rows, so that each value has the bits of the model's first step.

The values are kept in the cache folder of the tokens, or without one in the run's folder. The folder's name
is a hash of all that decides them: other data or another batch have another folder.
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

from ...common.late_reading import Numbers
from ...data.batches import Schedule
from ...data.collate import to_device
from ...data.held_out import evaluation_rows
from ...data.preferences import Preferences
from ...data.token_cache import cache_folder, remove_old
from ...model import RWKV
from ...ops.build import announce
from ..base import Objective
from ..policy import Policy, policy_of
from ..reference_model import build_reference, reference_of
from .reference_blocks import Blocks, blocks_in

VERSION = 1  # raised when the code changes the values
FOLDER = "reference"  # in the run's folder

Rows = list[list[int]]  # of a batch: the places of the examples of each row


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

    return Rounds("evaluation", -(-len(batches) // world), batches_of)


class ReferencePass:
    """Pass of the reference over preferences; all processes take part, and get the same values.

    `shared`: the prompt of a pair is read once.
    """

    def __init__(self, objective: Objective, shared: bool, policy: Policy):
        self.config, self.chunks, self.shared = objective.config, objective.chunks, shared
        self.model, self.policy = policy.model, policy
        self.processes, self.device = policy.processes, policy.device
        reference = reference_of(self.config.reference)
        self.other = reference and reference.fingerprint
        is_base = self.other == self.model.base_fingerprint
        if is_base and not self.config.init_adapter:  # then it is not read a second time
            self.other = None

    def training(self, documents: Preferences, schedule: Schedule, steps: int) -> Preferences:
        """Add reference log-probs for the examples that `steps` steps read; the rest stay NaN."""
        rounds = training_rounds(schedule, steps)
        return self._with_others(documents, lambda _: rounds, "the training data")

    def held_out(self, documents: Preferences) -> Preferences:
        """Add the reference log-probs of all examples."""
        config = self.config

        def rounds_of(examples: Preferences) -> Rounds:
            batches = evaluation_rows(examples, config.ctx_len, config.micro_bsz, config.random_seed)
            return held_out_rounds(batches, self.processes.world)

        return self._with_others(documents, rounds_of, "the held-out data")

    def _with_others(
        self, documents: Preferences, rounds_of: Callable[[Preferences], Rounds], what: str
    ) -> Preferences:
        """Add values to the documents, and under kto to the mismatched examples beside them."""
        if not len(documents):
            return documents
        known = self._with_values(documents, rounds_of(documents), what)
        if documents.paired:
            return known
        others = documents.mismatched()
        others = self._with_values(others, rounds_of(others), f"{what}, with other prompts")
        return dataclasses.replace(known, others=others)

    def _with_values(self, documents: Preferences, rounds: Rounds, what: str) -> Preferences:
        folder, first = self._folder(documents, rounds.order), self.processes.rank == 0
        begun = time.perf_counter()
        with blocks_in(folder, first) as blocks, self._reference_model() as log_probs:
            if blocks.folder and self.config.data_cache != "none":
                remove_old(folder.parent)
            values = _Values(documents, self._known(blocks), blocks)
            examples = sum(_examples(rounds.batches(number)) for number in range(rounds.count))
            with Progress(f"the reference reads {what}", examples, f"{documents.word}s", first) as bar:
                for number in range(rounds.count):
                    batches = rounds.batches(number)
                    if not values.take_known(batches):
                        values.add(batches, self._read(documents, batches, log_probs))
                    self._check(values, what)
                    bar.update(_examples(batches))
            found = values.all()
            self._check(values, what)
        seconds = time.perf_counter() - begun
        if first and blocks.folder and seconds > DELAY:
            took = f"the reference read {what} in {duration_text(seconds)}"
            announce(f"{took}; its values are kept in {folder} for later runs")
        return documents.with_reference(found)

    def _check(self, values: _Values, what: str) -> None:
        """Raise UserError if a value is not finite. All processes see the same values; none is kept."""
        if values.not_finite is None:
            return
        values.blocks.clear()
        word, line = values.documents.word, values.documents.line(values.not_finite)
        raise UserError(
            f"the reference, {self.config.reference or self.config.load_model}, gives ln p that is not finite"
            f" for the {word} of line or row {line} of {what}; check this row and the model, or"
            " choose another --precision"
        )

    def _known(self, blocks: Blocks) -> np.ndarray:
        """Return the values of an earlier pass, in every process."""
        found = blocks.read()
        count = torch.tensor(float(len(found)), dtype=torch.float64, device=self.device)
        shared = torch.zeros(int(self.processes.total(count)), device=self.device)
        shared[: len(found)] = torch.from_numpy(found)
        return self.processes.total(shared).cpu().numpy()

    def _read(
        self, documents: Preferences, batches: list[Rows], log_probs: Callable[[dict], Tensor]
    ) -> Numbers:
        """Start reading all examples of a round in order; they are on their way from the device."""
        sizes = [_count(documents, rows) for rows in batches]
        rank = self.processes.rank
        examples = [[documents[i] for i in row] for row in batches[rank]]
        lengths = documents.lengths - 1
        width = max([1, *(int(lengths[row].sum()) for rows in batches for row in rows)])
        collate = documents.collator(self.config.chunk_ctx, self.shared)
        batch = to_device(collate(examples, 1.0) | {"width": width}, self.device)
        found = torch.zeros(sum(sizes), device=self.device)
        # chunks have the tokens of several answers in turns
        order = batch["answer"].argsort(stable=True)
        start = sum(sizes[:rank])
        found[start : start + sizes[rank]] = log_probs(batch)[order].float()
        return Numbers(self.processes.total(found))

    @contextlib.contextmanager
    def _reference_model(self) -> Iterator[Callable[[dict], Tensor]]:
        """Give the block a function: a batch -> ln p by the reference, which is read at the first call."""
        models: list[RWKV] = []

        def log_probs(batch: dict) -> Tensor:
            if self.other is None:
                if self.device.type == "cuda" and not self.config.strategy.startswith("deepspeed_stage_3"):
                    self.model.to(self.device)
                return self.policy.log_probs(batch)
            if not models:
                models.append(build_reference(self.config).to(self.device))
            return policy_of(models[0], self.chunks).log_probs(batch)

        try:
            yield log_probs
        finally:
            if models and self.device.type == "cuda":
                models.clear()
                torch.cuda.empty_cache()

    def _folder(self, documents: Preferences, order: str) -> pathlib.Path:
        """Return the folder for the values of these documents, read in this order."""
        config = self.config
        # a method may change the base, up to its rounding
        parts = config.value_or_zero("train_parts")
        start = [self.model.base_fingerprint, config.peft, config.written("peft_config"), parts]
        described = [
            VERSION,
            torch.__version__,
            np.__version__,  # its random numbers are the order
            order,
            documents.digest,
            self.other or start,
            [config.precision, config.quant, config.wkv, config.accelerator, config.chunk_ctx, self.shared],
            # the examples that are in a batch together
            [config.packing, config.ctx_len, config.micro_bsz, config.accumulation, self.processes.world],
            config.random_seed,
        ]
        digest = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:24]
        if config.data_cache == "none":
            return pathlib.Path(config.proj_dir, FOLDER, digest)
        return cache_folder(config.data_cache) / digest


class _Values:
    """Values of documents as they come in, round by round; `known` are those of the first rounds."""

    def __init__(self, documents: Preferences, known: np.ndarray, blocks: Blocks):
        self.documents, self.known, self.blocks = documents, known, blocks
        self.sizes = documents.target_counts.astype(np.int64)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.values = np.full(int(self.sizes.sum()), np.nan, np.float32)
        self.position = 0
        self.not_finite: int | None = None  # the first example with a value that is not finite
        self.late: deque[tuple[list[Rows], Numbers]] = deque()

    def take_known(self, batches: list[Rows]) -> bool:
        """Take the next round's values from an earlier pass; returns whether it has read them."""
        size = sum(_count(self.documents, rows) for rows in batches)
        end = self.position + size
        if end > len(self.known):
            return False
        self._put(batches, self.known[self.position : end])
        self.position = end
        return True

    def add(self, batches: list[Rows], numbers: Numbers) -> None:
        """Add the next round's values. They are read when the device has its next work."""
        if self.position < len(self.known):
            raise UserError(f"{self.blocks.folder} has values that do not fit the data; remove it")
        self.late.append((batches, numbers))
        if len(self.late) > 1:
            self._take()

    def all(self) -> np.ndarray:
        """Return the values of all examples, (targets,) float32; NaN for examples in no round."""
        while self.late:
            self._take()
        return self.values

    def _take(self) -> None:
        batches, numbers = self.late.popleft()
        values = np.array(numbers.read(), np.float32)
        self._put(batches, values)
        self.blocks.add(values)

    def _put(self, batches: list[Rows], values: np.ndarray) -> None:
        examples = [i for rows in batches for row in rows for i in row]
        if not examples:
            return
        places = [np.arange(self.starts[i], self.starts[i] + self.sizes[i]) for i in examples]
        self.values[np.concatenate(places)] = values
        if self.not_finite is None and not np.isfinite(values).all():
            self.not_finite = next(
                i for i, at in zip(examples, places) if not np.isfinite(self.values[at]).all()
            )


def _examples(batches: list[Rows]) -> int:
    """Count the examples of the batches of a round."""
    return sum(len(row) for rows in batches for row in rows)


def _count(documents: Preferences, rows: Rows) -> int:
    """Count the trained tokens of these rows."""
    return int(sum(documents.target_counts[i] for row in rows for i in row))
