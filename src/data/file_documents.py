"""Documents: tokens and their weights in the loss, each by itself, or as parts of flat arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from .encode import Tokens


@dataclasses.dataclass
class Document:
    """The tokens of a document; token i is a target where weights[i] is not 0.

    Token 0 is never one, because nothing stands before it.
    """

    ids: np.ndarray  # (n,) int32
    weights: np.ndarray  # (n,) float32

    @property
    def inputs(self) -> int:
        """Tokens that it takes of a row."""
        return len(self.ids) - 1

    @property
    def targets(self) -> int:
        return int(np.count_nonzero(self.weights[1:]))

    @property
    def weight(self) -> float:
        """The sum of its targets' weights."""
        return float(self.weights[1:].sum(dtype=np.float64))

    @property
    def content(self) -> np.ndarray:
        """What tells it from others, (n,) int32."""
        return self.ids

    @property
    def held_out_by(self) -> np.ndarray:
        """Documents with equal ones of these are held out together."""
        return self.ids


class FileDocuments(Sequence):
    """Documents that are parts of flat arrays.

    Document i is lengths[i] tokens of files[of[i]], from starts[i] on. of: (n,) integers. starts: (n,) int64.
    lengths: (n,) integers. There may be 10^8 documents, so that numbers have the bytes they need and are no
    objects.
    """

    def __init__(self, files: list[Tokens], of: np.ndarray, starts: np.ndarray, lengths: np.ndarray):
        self.files, self.of, self.starts, self.lengths = files, of, starts, lengths

    def __len__(self) -> int:
        return len(self.of)

    def __getitem__(self, i: int) -> Document:
        start = int(self.starts[i])
        tokens, part = self.files[self.of[i]], slice(start, start + int(self.lengths[i]))
        return Document(tokens.ids[part], tokens.weights[part])

    def take(self, chosen: np.ndarray) -> FileDocuments:
        return FileDocuments(self.files, self.of[chosen], self.starts[chosen], self.lengths[chosen])


def joined(files: list[Tokens], chosen: list[np.ndarray]) -> FileDocuments:
    """The chosen documents of each file, one after another."""
    numbers = np.arange(len(files), dtype=np.min_scalar_type(len(files)))
    of = np.repeat(numbers, [len(documents) for documents in chosen])
    ends = np.concatenate([tokens.ends[documents] for tokens, documents in zip(files, chosen)])
    starts = np.concatenate(
        [np.append(0, tokens.ends[:-1])[documents] for tokens, documents in zip(files, chosen)]
    )
    return FileDocuments(files, of, starts, ends - starts)
