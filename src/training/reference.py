"""ln p of the answers by the reference of a preference: one pass without gradient before the training.

The reference is the model as it is before step 1: the base, as a fresh adapter changes nothing. Or it is the
one of --reference, which is freed after the pass. The pass reads the run's own micro-batches of its first
pass over the data, in the same rows, so that each value has the bits that the model gives in its first step.

The values are kept in the cache folder of the tokens, or in the run's folder where that is none. The folder's
name is a hash of all that decides them: other data or another batch are another folder.
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
from rwkv_miss.files.identity import Identity
from rwkv_miss.progress import DELAY, Progress, duration_text

from .. import ops
from ..config import Config, accumulation
from ..data.batches import Schedule
from ..data.collate import to_device
from ..data.held_out import evaluation_rows
from ..data.preference_batches import collator
from ..data.preferences import Preferences
from ..data.token_cache import cache_folder, remove_old
from ..data.units import Units
from ..model import RWKV
from ..model.log_probs import token_log_probs
from ..ops.build import announce
from ..planning.base_model import build_reference, reference_of
from ..planning.step import chunks_of, preference_of, prompt_reading, unit_of
from .late_reading import Numbers
from .objective import undisturbed
from .process_group import ALONE, Processes
from .reference_blocks import Blocks, blocks_in

VERSION = 1  # a change of the code that changes the values raises it
FOLDER = "reference"  # in the run's folder

Rows = list[list[int]]  # of a batch: the places of the units of each row
LogProbs = Callable[[dict], Tensor]  # a batch on the device -> ln p of its trained tokens


@dataclasses.dataclass(frozen=True)
class Turns:
    """What is read at a time: rows(turn) has a batch for every process. `order` names the order of units."""

    order: str
    count: int
    rows: Callable[[int], list[Rows]]


def training_turns(schedule: Schedule, steps: int) -> Turns:
    """The micro-batches of the first `steps` steps, up to the end of the first pass over the data."""

    def rows(turn: int) -> list[Rows]:
        step, micro = divmod(turn, schedule.accumulate)
        batches = [schedule.micro_rows(step, micro, rank) for rank in range(schedule.world)]
        return [[schedule.rows[row] for row in batch] for batch in batches]

    return Turns("training", min(steps, schedule.steps_per_pass) * schedule.accumulate, rows)


def held_out_turns(held_out: Preferences, config: Config, world: int) -> Turns:
    """The batches of an evaluation."""
    batches = evaluation_rows(held_out, config)

    def rows(turn: int) -> list[Rows]:
        now = batches[turn * world : (turn + 1) * world]
        return now + [[]] * (world - len(now))

    return Turns("evaluation", -(-len(batches) // world), rows)


class ReferencePass:
    """Gives preferences the values of the reference; all processes take part, and get the same.

    `shared`: the prompt of a pair is read once. `model` is that of the run, and `log_probs` asks it under the
    run's strategy. `reference` is who the model of --reference is.
    """

    def __init__(
        self,
        config: Config,
        shared: bool,
        model: RWKV,
        reference: Identity | None,
        log_probs: LogProbs,
        processes: Processes,
        device: torch.device,
    ):
        self.config, self.shared, self.model, self.of_run = config, shared, model, log_probs
        self.processes, self.device = processes, device
        self.other = reference and reference.fingerprint
        if self.other == model.base_fingerprint:  # then it is not read a second time
            self.other = None

    def training(self, documents: Preferences, schedule: Schedule, steps: int) -> Preferences:
        """With the values of what a run of so many steps reads; those of other units are not numbers."""
        turns = training_turns(schedule, steps)
        return self._with_others(documents, lambda _: turns, "the training data")

    def held_out(self, documents: Preferences) -> Preferences:
        """With all values."""
        world = self.processes.world
        return self._with_others(
            documents, lambda units: held_out_turns(units, self.config, world), "the held-out data"
        )

    def _with_others(
        self, documents: Preferences, turns: Callable[[Preferences], Turns], what: str
    ) -> Preferences:
        """The documents, and under kto the mismatched units beside them, each with their values."""
        if not len(documents):
            return documents
        known = self._with_values(documents, turns(documents), what)
        if documents.paired:
            return known
        others = documents.mismatched()
        others = self._with_values(others, turns(others), f"{what}, with other prompts")
        return dataclasses.replace(known, others=others)

    def _with_values(self, documents: Preferences, turns: Turns, what: str) -> Preferences:
        folder, first = self._folder(documents, turns.order), self.processes.rank == 0
        begun = time.perf_counter()
        with blocks_in(folder, first) as blocks, self._model() as log_probs:
            if blocks.folder and self.config.data_cache != "none":
                remove_old(folder.parent)
            reading = _Reading(documents, self._known(blocks), blocks)
            units = sum(len(row) for turn in range(turns.count) for rows in turns.rows(turn) for row in rows)
            with Progress(f"the reference reads {what}", units, f"{unit_of(self.config)}s", first) as bar:
                for turn in range(turns.count):
                    batches = turns.rows(turn)
                    if not reading.is_known(batches):
                        reading.give(batches, self._read(documents, batches, log_probs))
                    bar.update(sum(len(row) for rows in batches for row in rows))
            values = reading.end()
        if not reading.finite:
            raise UserError(
                f"the reference, {self.config.reference or self.config.load_model}, gives ln p that is not"
                f" finite for {what}; look for what is odd in them or in the model, or choose another"
                " --precision"
            )
        seconds = time.perf_counter() - begun
        if first and blocks.folder and seconds > DELAY:
            took = f"the reference read {what} in {duration_text(seconds)}"
            announce(f"{took}; its values are kept in {folder} for later runs")
        return documents.with_reference(values)

    def _known(self, blocks: Blocks) -> np.ndarray:
        """What an earlier pass has left, in every process."""
        found = blocks.read()
        count = torch.tensor(float(len(found)), dtype=torch.float64, device=self.device)
        shared = torch.zeros(int(self.processes.total(count)), device=self.device)
        shared[: len(found)] = torch.from_numpy(found)
        return self.processes.total(shared).cpu().numpy()

    def _read(
        self, documents: Preferences, batches: list[Rows], log_probs: Callable[[], LogProbs]
    ) -> Numbers:
        """The values of a turn, of all its units in order, on their way from the device."""
        sizes = [_count(documents, rows) for rows in batches]
        rank = self.processes.rank
        units = [[documents[i] for i in row] for row in batches[rank]]
        lengths = documents.lengths - 1
        width = max([1, *(int(lengths[row].sum()) for rows in batches for row in rows)])
        collate = collator(documents, self.config.chunk_ctx, self.shared)
        batch = to_device(collate(units, 1.0) | {"width": width}, self.device)
        found = torch.zeros(sum(sizes), device=self.device)
        # chunks have the tokens of several answers in turns
        order = batch["answer"].argsort(stable=True)
        start = sum(sizes[:rank])
        found[start : start + sizes[rank]] = log_probs()(batch)[order].float()
        return Numbers(self.processes.total(found))

    @contextlib.contextmanager
    def _model(self) -> Iterator[Callable[[], LogProbs]]:
        """Context with what gives the model that is asked, which is made when it is needed."""
        models: list[RWKV] = []

        def get() -> LogProbs:
            if self.other is None:
                if self.device.type == "cuda" and not self.config.strategy.startswith("deepspeed_stage_3"):
                    self.model.to(self.device)
                return self.of_run
            if not models:
                models.append(build_reference(self.config).to(self.device))
            chunks = chunks_of(self.config)
            return lambda batch: token_log_probs(models[0], batch, chunks, batch["width"])

        try:
            yield get
        finally:
            if models and self.device.type == "cuda":
                models.clear()
                torch.cuda.empty_cache()

    def _folder(self, documents: Preferences, order: str) -> pathlib.Path:
        """Where the values of these documents are kept, which are read in this order."""
        config = self.config
        # a method may change the base, up to its rounding
        start = [self.model.base_fingerprint, config.peft, config.peft_config, config.train_parts]
        described = [
            VERSION,
            torch.__version__,
            np.__version__,  # its random numbers are the order
            order,
            documents.digest,
            self.other or start,
            [config.precision, config.quant, config.wkv, config.accelerator, config.chunk_ctx, self.shared],
            # which units are in a batch together
            [config.packing, config.ctx_len, config.micro_bsz, accumulation(config), self.processes.world],
            config.random_seed,
        ]
        digest = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:24]
        if config.data_cache == "none":
            return pathlib.Path(config.proj_dir, FOLDER, digest)
        return cache_folder(config.data_cache) / digest


def with_reference_alone(
    model: RWKV, config: Config, documents: Units, held_out: Units, schedule: Schedule, steps: int
) -> tuple[Units, Units]:
    """Both with the values of the reference where the loss needs them, in one process without a trainer."""
    preference = preference_of(config)
    if preference is None or not preference.needs_reference:
        return documents, held_out
    chunks, device = chunks_of(config), model.emb.weight.device

    def log_probs(batch: dict) -> Tensor:
        return token_log_probs(model, batch, chunks, batch["width"])

    with undisturbed(model, device), ops.nan_passes():
        shared = prompt_reading(config, documents, schedule, model.arch).shared
        reference = ReferencePass(config, shared, model, reference_of(config), log_probs, ALONE, device)
        return reference.training(documents, schedule, steps), reference.held_out(held_out)


class _Reading:
    """The values of documents as they come in, turn by turn; `known` are those of the first turns."""

    def __init__(self, documents: Preferences, known: np.ndarray, blocks: Blocks):
        self.documents, self.known, self.blocks = documents, known, blocks
        self.sizes = documents.target_counts.astype(np.int64)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.values = np.full(int(self.sizes.sum()), np.nan, np.float32)
        self.position, self.finite = 0, True
        self.late: deque[tuple[list[Rows], Numbers]] = deque()

    def is_known(self, batches: list[Rows]) -> bool:
        """Whether the next turn was read by an earlier pass; then its values are taken."""
        size = sum(_count(self.documents, rows) for rows in batches)
        end = self.position + size
        if end > len(self.known):
            return False
        self._put(batches, self.known[self.position : end])
        self.position = end
        return True

    def give(self, batches: list[Rows], numbers: Numbers) -> None:
        """The values of the next turn. They are looked at when the device has its next work."""
        if self.position < len(self.known):
            raise UserError(f"{self.blocks.folder} has values that do not fit the data; remove it")
        self.late.append((batches, numbers))
        if len(self.late) > 1:
            self._take()

    def end(self) -> np.ndarray:
        """All values; those that no turn has are not numbers."""
        while self.late:
            self._take()
        return self.values

    def _take(self) -> None:
        batches, numbers = self.late.popleft()
        values = np.array(numbers.read(), np.float32)
        self._put(batches, values)
        self.blocks.add(values)

    def _put(self, batches: list[Rows], values: np.ndarray) -> None:
        self.finite &= bool(np.isfinite(values).all())
        units = [i for rows in batches for row in rows for i in row]
        if units:
            places = [np.arange(self.starts[i], self.starts[i] + self.sizes[i]) for i in units]
            self.values[np.concatenate(places)] = values


def _count(documents: Preferences, rows: Rows) -> int:
    """Trained tokens of these rows."""
    return int(sum(documents.target_counts[i] for row in rows for i in row))
