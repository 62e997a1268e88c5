"""Stop texts of a request: which of them the text so far may have begun, and the tokens that go on with them.

Each byte of each stop has a bit, and the set of begun stops is one integer, as in the algorithm Shift-And. So
the work of a token does not grow with the number of places where a stop may have begun.

Bit b * S + s stands for byte b of stop s, of S stops: the highest bit is the longest beginning.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np


class TokenBytes:
    """Bytes of a tokenizer's tokens, for finding the tokens with which a text begins."""

    def __init__(self, pieces: Mapping[int, bytes]):
        self.pieces = pieces
        self.ids = {piece: token for token, piece in pieces.items()}
        lengths: dict[bytes, set[int]] = {}
        for piece in self.ids:
            lengths.setdefault(piece[:2], set()).add(len(piece))
        # by the first two bytes of a token
        self.lengths = {start: sorted(of_start) for start, of_start in lengths.items()}
        self.longest = max(map(len, self.ids), default=0)

    def beginnings(self, text: bytes) -> list[int]:
        """Return the tokens with which a text begins."""
        lengths = {length for start in (text[:1], text[:2]) for length in self.lengths.get(start, ())}
        tokens = [self.ids.get(text[:length]) for length in sorted(lengths) if length <= len(text)]
        return [token for token in tokens if token is not None]


class StopTexts:
    """Stops of one request. In a set of begun stops, bit b * S + s says that the text ends with the bytes of
    stop s up to byte b.
    """

    def __init__(self, vocabulary: TokenBytes, stops: Sequence[str]):
        self.vocabulary, self.stops = vocabulary, [stop.encode() for stop in stops]
        self.count = len(self.stops)
        self.first_bytes = {stop[0] for stop in self.stops}
        self.starts = (1 << self.count) - 1  # the first byte of each
        grid = np.full((max(map(len, self.stops), default=0), self.count), -1, np.int16)
        for s, stop in enumerate(self.stops):
            grid[: len(stop), s] = list(stop)
        self.size = grid.size
        self.places = {int(byte): _integer(grid == byte) for byte in np.unique(grid) if byte >= 0}
        self.ends = sum(1 << ((len(stop) - 1) * self.count + s) for s, stop in enumerate(self.stops))

    def after(self, begun: int, piece: bytes, may_begin: bool) -> tuple[int, bytes]:
        """Return (stops begun after this piece, the longest end of the text that begins with a stop, or b"").

        A stop may begin with the piece if `may_begin`, and nowhere inside it.
        """
        ended = b""
        for place, byte in enumerate(piece):
            starts = self.starts if may_begin and not place else 0
            begun = (begun << self.count | starts) & self.places.get(byte, 0)
            if came := begun & self.ends:
                text = self.stops[(came.bit_length() - 1) % self.count] + piece[place + 1 :]
                ended = max(ended, text, key=len)
        return begun, ended

    def longest(self, begun: int) -> bytes:
        """Return the longest beginning of a stop in the set; b"" if it is empty."""
        if not begun:
            return b""
        byte, s = divmod(begun.bit_length() - 1, self.count)
        return self.stops[s][: byte + 1]

    def next_tokens(self, begun: int, may_begin: bool) -> np.ndarray:
        """Return the tokens that go on with a stop of the set, or begin one if `may_begin`."""
        bits = begun << self.count | (self.starts if may_begin else 0)
        if not bits:
            return np.empty(0, np.int64)
        raw = np.frombuffer(bits.to_bytes((self.size + 7) // 8, "little"), np.uint8)
        kinds, fitting_kinds, fitting_tokens = self._fitting
        reached = np.zeros(len(kinds) + 1, bool)
        reached[kinds[np.unpackbits(raw, count=self.size, bitorder="little").view(bool)]] = True
        return fitting_tokens[reached[fitting_kinds]]

    @functools.cached_property
    def _fitting(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Kind of each bit, then pairs of a kind and a token that fits there.

        Bits where the same tokens fit are of one kind: 20 stops of 500 blanks have few.
        """
        kinds = np.zeros(self.size, np.int64)
        beginnings: dict[bytes, tuple[int, ...]] = {}  # rest of a stop -> tokens that begin it
        by_tokens: dict[tuple[int, ...], int] = {(): 0}
        for s, stop in enumerate(self.stops):
            for byte in range(len(stop)):
                text = stop[byte : byte + self.vocabulary.longest]
                if (tokens := beginnings.get(text)) is None:
                    tokens = beginnings[text] = tuple(self.vocabulary.beginnings(text))
                kinds[byte * self.count + s] = by_tokens.setdefault(tokens, len(by_tokens))
        pairs = [(kind, token) for tokens, kind in by_tokens.items() for token in tokens]
        fitting_kinds, fitting_tokens = np.array(pairs, np.int64).reshape(-1, 2).T
        return kinds, fitting_kinds, fitting_tokens


def _integer(bits: np.ndarray) -> int:
    """Return the integer of these bits, the lowest first."""
    return int.from_bytes(np.packbits(bits, bitorder="little").tobytes(), "little")
