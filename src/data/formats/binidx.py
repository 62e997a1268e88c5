"""Tokenised data as RWKV-LM has it (Megatron's MMapIndexedDataset).

PREFIX.bin has the token ids in pieces. PREFIX.idx says where each piece lies, little endian:

    magic               "MMIDIDX\\0\\0"
    version             uint64  1
    type of the ids     uint8   8: uint16, 4: int32
    number of pieces    uint64
    number of document boundaries  uint64
    size of each piece  int32   in ids
    place of each piece int64   in bytes of PREFIX.bin
    boundaries          int64   document i is the pieces from boundary i to boundary i + 1

json2binidx_tool and make_data.py write a piece for each document, with its end of document in it.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator, Sequence

import numpy as np

from rwkv_miss.errors import UserError

from .text import Position

MAGIC, VERSION = b"MMIDIDX\x00\x00", 1
HEADER = struct.Struct("<9sQBQQ")
TYPES = {8: np.dtype("<u2"), 4: np.dtype("<i4")}
IDS_AT_ONCE = 1 << 24  # ids that are searched for the end of document at a time


def prefix_of(path: str) -> str | None:
    """Return the PREFIX of a binidx data set that `path` names with a suffix or without; None without one."""
    prefix = path[:-4] if path.endswith((".bin", ".idx")) else path
    return prefix if os.path.isfile(prefix + ".bin") and os.path.isfile(prefix + ".idx") else None


class BinIdx:
    """PREFIX.bin and PREFIX.idx, memory mapped.

    ids: all of them. sizes, starts: of the pieces, in ids. boundaries: of documents, in pieces. Raises
    UserError for files that are damaged, of another kind, or do not belong together.
    """

    def __init__(self, prefix: str):
        self.prefix = prefix
        try:
            size = os.path.getsize(prefix + ".bin")
            index = _mapped(prefix + ".idx", np.dtype(np.uint8), os.path.getsize(prefix + ".idx"))
        except OSError as error:
            raise UserError(
                f"data file {error.filename or prefix + '.idx'} can't be read: {error.strerror}"
            ) from None
        self.type, pieces = self._header(index)
        sizes, places, boundaries = np.split(index[HEADER.size :], [4 * pieces, 12 * pieces])
        self.sizes, places, self.boundaries = sizes.view("<i4"), places.view("<i8"), boundaries.view("<i8")
        self._check(places, size)
        self.starts = places // self.type.itemsize
        self.ids = _mapped(prefix + ".bin", self.type, size // self.type.itemsize)

    def _check(self, places: np.ndarray, size: int) -> None:
        """Raise UserError for pieces or boundaries that do not fit; PREFIX.bin has `size` bytes."""
        pieces, width = len(self.sizes), self.type.itemsize
        ends = places + self.sizes.astype(np.int64) * width
        if pieces and (
            self.sizes.min() < 0
            or places.min() < 0
            or (places % width).any()
            or ends.max() > size
            or (ends < places).any()
        ):
            raise UserError(
                f"{self.prefix}.idx points outside of {self.prefix}.bin, which has {size} bytes; they do not"
                " belong together, or one is truncated"
            )
        bounds = self.boundaries
        if len(bounds) and (bounds[0] < 0 or bounds[-1] > pieces or (np.diff(bounds) < 0).any()):
            raise UserError(
                f"{self.prefix}.idx is damaged: its document boundaries are not ascending numbers of pieces,"
                f" up to {pieces}"
            )

    def _header(self, index: np.ndarray) -> tuple[np.dtype, int]:
        """Read (type of the ids, number of pieces)."""
        path = self.prefix + ".idx"
        if len(index) < HEADER.size or index[:9].tobytes() != MAGIC:
            raise UserError(
                f"{path} is no index of RWKV-LM's binidx data: it begins with {index[:9].tobytes()!r},"
                f" expected {MAGIC!r}"
            )
        _, version, code, pieces, documents = HEADER.unpack(index[: HEADER.size].tobytes())
        if version != VERSION or code not in TYPES:
            raise UserError(
                f"{path} has version {version} and type code {code}; expected version 1 and code 8 (uint16)"
                " or 4 (int32)"
            )
        size = HEADER.size + 12 * pieces + 8 * documents
        if len(index) != size:
            raise UserError(
                f"{path} has {len(index)} bytes, expected {size} for {pieces} pieces and {documents}"
                " boundaries; is it truncated?"
            )
        return TYPES[code], pieces

    def spans(self) -> Iterator[np.ndarray]:
        """Yield the ids of each document: the pieces between two boundaries, or one piece without them."""
        bounds = self.boundaries if len(self.boundaries) > 1 else np.arange(len(self.sizes) + 1)
        if bounds[0] > 0 or bounds[-1] < len(self.sizes):
            # pieces outside of all documents are data too
            bounds = np.concatenate([[0], bounds, [len(self.sizes)]])
        for first, last in zip(bounds[:-1], bounds[1:]):
            pieces = [self.ids[self.starts[i] : self.starts[i] + self.sizes[i]] for i in range(first, last)]
            if len(pieces) == 1:
                yield pieces[0]
            elif pieces:
                yield np.concatenate(pieces)


def _mapped(path: str, kind: np.dtype, count: int) -> np.ndarray:
    """Map `count` items of a file; an empty file can't be mapped."""
    return np.memmap(path, kind, "r", shape=(count,)) if count else np.zeros(0, kind)


def documents(prefix: str, eod: Sequence[int], position: Position) -> Iterator[tuple[str, dict | UserError]]:
    """Yield (place, {"ids": int32 array}) of every document that is not empty.

    `eod` are the ids that end a document. They end one wherever they stand, and are left out: the encoder
    puts them back, as for any other record.
    """
    number = read = 0
    data = BinIdx(prefix)
    position.share = lambda: read / max(len(data.ids), 1)
    for span in data.spans():
        read += len(span)
        for part in split(span, eod):
            number += 1
            where = f"{prefix}.bin, document {number}"
            ids = part.astype(np.int32)
            yield where, {"ids": ids} if ids.min() >= 0 else UserError(f"an id is negative, {ids.min()}")


def split(ids: np.ndarray, eod: Sequence[int]) -> Iterator[np.ndarray]:
    """Split `ids` at ends of document, without empty parts.

    An end of several ids stands at a multiple of its length.
    """
    size, begin = len(eod), 0
    for start in range(0, len(ids), IDS_AT_ONCE * size):
        chunk = ids[start : start + IDS_AT_ONCE * size]
        units = chunk[: len(chunk) // size * size].reshape(-1, size)
        for unit in np.flatnonzero((units == np.asarray(eod)).all(1)).tolist():
            end = start + unit * size
            if end > begin:
                yield ids[begin:end]
            begin = end + size
    if begin < len(ids):
        yield ids[begin:]


class BinidxWriter:
    """Writer of PREFIX.bin and PREFIX.idx: add() for each document, then close().

    Until then both have temporary names; discard() removes them.
    """

    def __init__(self, prefix: str, vocab_size: int):
        self.prefix, self.code = prefix, 8 if vocab_size <= 1 << 16 else 4
        self.sizes: list[int] = []
        self.paths = [prefix + suffix for suffix in (".bin", ".idx")]
        self.file = open(self.paths[0] + ".tmp", "wb")

    def add(self, ids: Sequence[int]) -> None:
        """Add a document, with its end."""
        self.file.write(np.asarray(ids, TYPES[self.code]).tobytes())
        self.sizes.append(len(ids))

    def close(self) -> None:
        sizes = np.asarray(self.sizes, "<i4")
        places = (np.cumsum(sizes, dtype=np.int64) - sizes) * TYPES[self.code].itemsize
        with self.file:
            os.fsync(self.file.fileno())
        with open(self.paths[1] + ".tmp", "wb") as file:
            file.write(HEADER.pack(MAGIC, VERSION, self.code, len(sizes), len(sizes) + 1))
            for array, kind in ((sizes, "<i4"), (places, "<i8"), (np.arange(len(sizes) + 1), "<i8")):
                file.write(array.astype(kind).tobytes())
            file.flush()
            os.fsync(file.fileno())
        for path in self.paths:
            os.replace(path + ".tmp", path)

    def discard(self) -> None:
        self.file.close()
        for path in self.paths:
            with contextlib.suppress(FileNotFoundError):
                os.remove(path + ".tmp")
