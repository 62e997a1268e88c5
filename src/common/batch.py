"""Batch: the tensors of a micro-batch. Every entry is declared once, with its axes and its dtype.

data/collate.py and data/answer_batches.py fill a batch. By the axes of its entries it is moved to a device,
cut into chunks, and made of zeros for the memory plan. A new entry is one line here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

# axes of entries
ROWS, WIDTH = "rows", "width"  # rows of tokens, padded on the right to the longest
TRAINED = "trained"  # tokens with a loss: chunk by chunk, within a chunk row by row
ANSWERS = "answers"  # answers of pairs and groups, one example after another
PROMPTS, PROMPT = "prompts", "prompt"  # prompts that are read once, padded on the left
TEACHER, VOCABULARY = "teacher", "vocabulary"  # a teacher's numbers for one token; rows of its head


def entry(*axes: str, dtype: torch.dtype = torch.float32, on_cpu: bool = False) -> Any:
    """Declare an optional tensor. `on_cpu`: on a device it keeps its values for the CPU, as `.on_cpu`."""
    return dataclasses.field(default=None, metadata={"axes": axes, "dtype": dtype, "on_cpu": on_cpu})


@dataclasses.dataclass(eq=False)
class Batch:
    """Micro-batch. An entry that it lacks is None."""

    ids: Tensor | None = entry(ROWS, WIDTH, dtype=torch.int64)
    # true where a document starts inside a row; ops.per_document needs it before the GPU has its work
    reset: Tensor | None = entry(ROWS, WIDTH, dtype=torch.bool, on_cpu=True)
    where: Tensor | None = entry(TRAINED, dtype=torch.int64)  # place in its chunk, rows x `chunk` tokens
    targets: Tensor | None = entry(TRAINED, dtype=torch.int64)
    weights: Tensor | None = entry(TRAINED)  # None: all are 1
    ends: tuple[int, ...] = ()  # the number of trained tokens up to the end of each chunk
    chunk: int = 0  # tokens; 0: rows are whole
    step_weight: float = 0.0  # divisor of the whole step's loss
    width: int = 0  # inputs of the longest row that any rank has in its batch; 0: all have this one's
    # answers, alone or compared with each other
    answer: Tensor | None = entry(TRAINED, dtype=torch.int64)  # the answer of each token
    chosen: Tensor | None = entry(ANSWERS, dtype=torch.bool)  # a pair is the answers 2p, chosen, and 2p + 1
    advantage: Tensor | None = entry(ANSWERS)
    # ln p of tokens: by the reference; when they were drawn; before the first step on this draw
    reference: Tensor | None = entry(TRAINED)
    drawn: Tensor | None = entry(TRAINED)
    old: Tensor | None = entry(TRAINED)
    baseline: Tensor | float = 0.0  # kto's, one for a step
    # a teacher: numbers for each token, or the inputs of its head, and the head
    teacher: Tensor | None = entry(TRAINED, TEACHER)
    teacher_head: Tensor | None = entry(VOCABULARY, TEACHER)
    # prompts that are read once: row i goes on from the state after prompt prompt_of[i]
    prompts: Tensor | None = entry(PROMPTS, PROMPT, dtype=torch.int64)
    # true where a padded prompt begins
    prompt_reset: Tensor | None = entry(PROMPTS, PROMPT, dtype=torch.bool, on_cpu=True)
    prompt_of: Tensor | None = entry(ROWS, dtype=torch.int64)

    def having(self, **entries: Any) -> Batch:
        """Return the batch with these entries. Raises TypeError for an unknown one."""
        return dataclasses.replace(self, **entries)

    def tensors(self) -> dict[str, Tensor]:
        """Return the declared entries that it has, by name."""
        return {name: getattr(self, name) for name in ENTRIES if getattr(self, name) is not None}

    def to(self, device: torch.device) -> Batch:
        """Move the batch to a device. A GPU copies what it lacks from pinned memory, without waiting."""
        moved = {}
        for name, value in self.tensors().items():
            if value.device.type != device.type:
                pinned = value.pin_memory() if device.type == "cuda" else value
                moved[name] = pinned.to(device, non_blocking=True)
                if ENTRIES[name]["on_cpu"]:
                    moved[name].on_cpu = value
        return self.having(**moved)

    def trained_of(self, chunk: int) -> slice:
        """Find the trained tokens of a chunk among the batch's."""
        return slice(*((0, *self.ends)[min(i, len(self.ends))] for i in (chunk, chunk + 1)))

    def part(self, chunk: int) -> Batch:
        """Cut chunk number `chunk` out of every row.

        If these rows have ended and those of another rank have not, the part is one token without loss.
        """
        tokens, begin = self.trained_of(chunk), chunk * self.chunk
        columns, entries = slice(begin, begin + self.chunk), {}
        if chunk >= len(self.ends):
            columns, entries["reset"] = slice(0, 1), None
        for name, value in self.having(**entries).tensors().items():
            if ENTRIES[name]["axes"][0] == TRAINED:
                entries[name] = value[tokens]
            elif ENTRIES[name]["axes"] == (ROWS, WIDTH):
                entries[name] = value[:, columns]
        return self.having(**entries)

    @classmethod
    def zeros(cls, names: Iterable[str], sizes: Mapping[str, int], reads: Reads, **others: Any) -> Batch:
        """Make a batch of zeros, for the memory plan: these entries, and what a loss reads.

        `sizes` are those of the axes. `others` are entries that are no tensors.
        """
        sizes = {**sizes, TEACHER: reads.teacher, VOCABULARY: reads.vocabulary}
        for name in (*names, *reads.names):
            axes, dtype = ENTRIES[name]["axes"], ENTRIES[name]["dtype"]
            dtype = reads.dtype if TEACHER in axes else dtype
            others[name] = torch.zeros([sizes[axis] for axis in axes], dtype=dtype)
        return cls(**others)


ENTRIES: dict[str, Mapping[str, Any]] = {f.name: f.metadata for f in dataclasses.fields(Batch) if f.metadata}


@dataclasses.dataclass(frozen=True)
class Reads:
    """Entries of a batch that a loss reads in addition to the tokens, and the sizes of their axes."""

    names: tuple[str, ...] = ()
    answers: int = 0  # answers of an example
    teacher: int = 0  # numbers of a teacher for a token
    vocabulary: int = 0  # ids of the teacher
    dtype: torch.dtype = torch.float32  # dtype of the teacher's numbers
