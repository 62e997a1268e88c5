"""Collation: rows of documents become the tensors of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..common.batch import Batch
from .file_documents import Document
from .reference_values import unpacked


def collate(
    rows: list[list[Document]], step_weight: float, chunk: int = 0, reference: np.dtype | None = None
) -> Batch:
    """Make the batch of these rows, padded on the right to the longest.

    Trained tokens are those of chunks of `chunk` tokens. `step_weight` is the sum of the weights of the whole
    step. Without rows, as in a short step, it is one row without loss: every rank runs the same operations.
    With a reference's values, of this dtype, it has `teacher`: their numbers for trained tokens.
    """
    width = max([sum(len(document.ids) - 1 for document in row) for row in rows] + [1])
    ids = np.zeros((max(len(rows), 1), width), dtype=np.int64)
    targets = np.zeros_like(ids)
    weights = np.zeros(ids.shape, dtype=np.float32)
    reset = np.zeros(ids.shape, dtype=bool)
    for i, row in enumerate(rows):
        start = 0
        for document in row:
            part = slice(start, start := start + len(document.ids) - 1)
            ids[i, part] = document.ids[:-1]
            targets[i, part] = document.ids[1:]
            weights[i, part] = document.weights[1:]
            reset[i, part][:1] = part.start > 0
    batch = Batch(
        ids=torch.from_numpy(ids),
        reset=torch.from_numpy(reset) if reset.any() else None,
        **trained_tokens(targets, weights, chunk),
        step_weight=step_weight,
    )
    if reference is None:
        return batch
    references = [document.reference for row in rows for document in row]
    numbers = unpacked(np.concatenate([np.empty(0, reference), *references]))
    return batch.having(teacher=torch.from_numpy(numbers)[np.argsort(row_by_row(batch))])


def padded_left(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Pad B rows of tokens on the left: (ids (B, T) int64; (B, T) bool, true where a padded row begins,
    None if none is). T is at least 1."""
    ids = np.zeros((len(rows), max([*map(len, rows), 1])), np.int64)
    begins = np.zeros(ids.shape, bool)
    for i, row in enumerate(rows):
        begin = ids.shape[1] - len(row)
        ids[i, begin:] = row
        begins[i, begin : begin + 1] = begin > 0
    return torch.from_numpy(ids), torch.from_numpy(begins) if begins.any() else None


def trained_tokens(
    targets: np.ndarray, weights: np.ndarray, chunk: int = 0, more: dict[str, np.ndarray] | None = None
) -> dict[str, Any]:
    """Make a batch's entries for the trained tokens, from targets (B, T) int64 and weights (B, T), 0 for no
    loss.

    They are indices that are known before the device has the batch: a mask there would make the CPU wait for
    the number of its tokens. Order: chunk by chunk of `chunk` tokens (0: the rows are whole); within a chunk,
    row by row.

    `more` has further values by name, (B, T), of which the batch gets those of the trained tokens.
    """
    rows, columns = weights.nonzero()
    width = weights.shape[1]
    size = chunk or width
    parts = columns // size
    order = np.argsort(parts, kind="stable")
    rows, columns, parts = rows[order], columns[order], parts[order]
    trained = weights[rows, columns].astype(np.float32)
    where = rows * np.minimum(size, width - parts * size) + columns % size
    return {
        "where": torch.from_numpy(where),
        "targets": torch.from_numpy(targets[rows, columns]),
        "weights": None if (trained == 1).all() else torch.from_numpy(trained),
        "ends": tuple(np.bincount(parts, minlength=-(-width // size)).cumsum().tolist()),
        "chunk": chunk,
        **{name: torch.from_numpy(values[rows, columns]) for name, values in (more or {}).items()},
    }


def row_by_row(batch: Batch) -> np.ndarray:
    """Order the trained tokens of a batch row by row, (n,) int64; those of chunks are not in this order."""
    where, ends, chunk = batch.where.numpy(), np.asarray(batch.ends), batch.chunk
    if not chunk:
        return np.arange(len(where))
    parts = np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))
    rows = where // np.minimum(chunk, batch.ids.shape[1] - parts * chunk)
    return np.lexsort((parts, rows))
