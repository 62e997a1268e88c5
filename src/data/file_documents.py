"""Documents: tokens and their weights in the loss, each by itself, or as parts of flat arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from .encode import Tokens

BLOCK = 1 << 16  # documents that are looked at together


@dataclasses.dataclass
class Document:
    """Tokens of a document; token i is a target if weights[i] is not 0.

    Token 0 is never one, because nothing stands before it.
    """

    ids: np.ndarray  # (n,) int32
    weights: np.ndarray  # (n,) float32
    reference: np.ndarray | None = None  # values of a reference for its trained tokens, (targets,)

    @property
    def inputs(self) -> int:
        """Tokens that the document takes of a row."""
        return len(self.ids) - 1

    @property
    def targets(self) -> int:
        return int(np.count_nonzero(self.weights[1:]))

    @property
    def weight(self) -> float:
        """Sum of its targets' weights."""
        return float(self.weights[1:].sum(dtype=np.float64))


class FileDocuments(Sequence):
    """Documents that are parts of flat arrays.

    Document i is lengths[i] tokens of files[of[i]], from starts[i] on. of: (n,) integers. starts: (n,) int64.
    lengths: (n,) integers. There may be 10^8 documents, so they are numbers of few bytes, not objects.
    """

    def __init__(self, files: list[Tokens], of: np.ndarray, starts: np.ndarray, lengths: np.ndarray):
        self.files, self.of, self.starts, self.lengths = files, of, starts, lengths

    def __len__(self) -> int:
        return len(self.of)

    def __getitem__(self, i: int) -> Document:
        start = int(self.starts[i])
        tokens, part = self.files[self.of[i]], slice(start, start + int(self.lengths[i]))
        return Document(tokens.ids[part], tokens.weights[part])

    def __iter__(self) -> Iterator[Document]:
        return (Document(tokens.ids[part], tokens.weights[part]) for tokens, part in self.places())

    def places(self) -> Iterator[tuple[Tokens, slice]]:
        """Yield (the file, the part of its arrays) for each document."""
        for at in range(0, len(self), BLOCK):
            # lists, because a number of an array takes ten times as long
            columns = (column[at : at + BLOCK].tolist() for column in (self.of, self.starts, self.lengths))
            for of, start, length in zip(*columns, strict=True):
                yield self.files[of], slice(start, start + length)

    @property
    def is_mask(self) -> bool:
        """Tell whether all weights in the files are 0 or 1."""
        return all(tokens.is_mask for tokens in self.files)

    def line(self, i: int) -> int:
        """Return the number of the line or row of its file that document i comes from."""
        tokens = self.files[self.of[i]]
        return int(tokens.places[np.searchsorted(tokens.ends, self.starts[i], side="right")])

    def trained(self) -> tuple[np.ndarray, np.ndarray]:
        """Count (the trained tokens of each, the place of the first of them), (n,) int32.

        Token 0 is never one. The place means nothing without a trained token.
        """
        counts, places = np.zeros(len(self), np.int32), np.zeros(len(self), np.int32)
        for number, tokens in enumerate(self.files):
            of_file = np.flatnonzero(self.of == number)
            of_file = of_file[np.argsort(self.starts[of_file], kind="stable")]
            for at in range(0, len(of_file), BLOCK):
                block = of_file[at : at + BLOCK]
                begins, ends = self.starts[block] + 1, self.starts[block] + self.lengths[block]
                first = int(begins[0])
                trained = np.append(np.flatnonzero(tokens.weights[first : int(ends.max())]) + first, first)
                before = np.searchsorted(trained[:-1], begins)
                # an empty document has 0, not -1
                counts[block] = np.maximum(np.searchsorted(trained[:-1], ends) - before, 0)
                places[block] = trained[before] - self.starts[block]
        return counts, places

    def parts(self, begins: np.ndarray, lengths: np.ndarray) -> FileDocuments:
        """Cut document i to lengths[i] tokens, from its token begins[i] on."""
        return FileDocuments(self.files, self.of, self.starts + begins, lengths)

    def take(self, chosen: np.ndarray) -> FileDocuments:
        return FileDocuments(self.files, self.of[chosen], self.starts[chosen], self.lengths[chosen])


def joined(files: list[Tokens], chosen: list[np.ndarray]) -> FileDocuments:
    """Join the chosen documents of each file, one after another."""
    numbers = np.arange(len(files), dtype=np.min_scalar_type(len(files)))
    of = np.repeat(numbers, [len(documents) for documents in chosen])
    ends = np.concatenate([tokens.ends[documents] for tokens, documents in zip(files, chosen)])
    starts = np.concatenate(
        [np.append(0, tokens.ends[:-1])[documents] for tokens, documents in zip(files, chosen)]
    )
    return FileDocuments(files, of, starts, ends - starts)
