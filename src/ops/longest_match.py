"""Greedy longest match: bytes as the longest pieces of a table {id: piece}, one after another.

PlainMatch is the definition and needs no compiler. NativeMatch does the same in cuda/tokenizer_cpu.cpp. Both
return the ids of bytes, and end early where no piece fits.
"""

from __future__ import annotations

import ctypes
import weakref

import numpy as np

from . import native

LARGEST_TABLE = 1 << 24  # the native code takes fewer bytes than this in all pieces
LARGEST_ID = (1 << 31) - 1
_first = ctypes.c_int32.from_buffer


class PlainMatch:
    """Greedy longest match in plain Python. No piece is empty, and none is there twice."""

    def __init__(self, table: dict[int, bytes]):
        self.ids = {piece: token for token, piece in table.items()}
        sizes: dict[bytes, set[int]] = {}
        for piece in self.ids:
            sizes.setdefault(piece[:2], {1}).add(len(piece))
        # the first two bytes -> the sizes to try, the largest first
        self.sizes = {start: sorted(of_start, reverse=True) for start, of_start in sizes.items()}

    def __call__(self, data: bytes) -> list[int]:
        ids, place = [], 0
        while place < len(data):
            for size in self.sizes.get(data[place : place + 2], (1,)):
                piece = data[place : place + size]
                if piece in self.ids:
                    break
            else:
                break
            ids.append(self.ids[piece])
            place += len(piece)
        return ids


class NativeMatch:
    """Greedy longest match by a trie in C++, for any number of threads and for forks.

    Raises BuildError where the native code cannot be built, and ValueError for a table that it does not take.
    """

    def __init__(self, table: dict[int, bytes]):
        order = sorted(table, key=lambda token: len(table[token]))
        ends = np.cumsum([len(table[token]) for token in order], dtype=np.int64)
        if len(ends) and (ends[-1] >= LARGEST_TABLE or not 0 <= min(table) <= max(table) <= LARGEST_ID):
            raise ValueError(
                f"a table has {ends[-1]} bytes and ids from {min(table)} to {max(table)}; expected fewer than"
                f" {LARGEST_TABLE} bytes and ids from 0 to {LARGEST_ID}"
            )
        ids = np.array(order, dtype=np.int32)
        library = native.library("cpu")
        library.trie_new.restype = ctypes.c_void_p
        self.trie = library.trie_new(
            b"".join(map(table.__getitem__, order)),
            ctypes.c_void_p(ends.ctypes.data),
            ctypes.c_void_p(ids.ctypes.data),
            ctypes.c_int64(len(order)),
        )
        # not at the end of the program, when other threads may still use it
        weakref.finalize(self, library.trie_free, ctypes.c_void_p(self.trie)).atexit = False
        self.match = library.trie_match
        self.match.restype = ctypes.c_int64
        self.match.argtypes = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64, ctypes.c_void_p

    def __call__(self, data: bytes) -> list[int]:
        ids = np.empty(len(data) + 1, dtype=np.int32)  # one more, because an empty array has no first place
        count = self.match(self.trie, data, len(data), ctypes.byref(_first(ids)))
        return ids[:count].tolist()
