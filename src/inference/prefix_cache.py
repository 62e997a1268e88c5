"""States of prompts that were read, for prompts that begin alike.

An RNN's state is all that is left of a prompt, of one size whatever the prompt's length. A prompt that goes
on from a kept state has the bits that it has without, where both are read in the same chunks (engine.py).
"""

from __future__ import annotations

import array
import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from ..model import State
from .adapters import Applied


class Read(NamedTuple):
    """What is kept of tokens that were read."""

    state: State
    logits: Tensor  # (1, V) after the last token
    start: State | None  # the state before the tokens: kept, so that no other one gets its id()
    size: int  # bytes


class PrefixCache:
    """(adapters, start, tokens) -> state, in at most `limit` bytes: those that were used last.

    Two start states are the same where they are one object; None is the adapter's, or the model's own. Of the
    tokens a digest of 32 bytes is kept, and nothing of their text.
    """

    def __init__(self, limit: int):
        self.limit, self.size = limit, 0
        self.entries: OrderedDict[tuple, Read] = OrderedDict()  # the one used last is at the end

    def longest(
        self, applied: Applied, start: State | None, tokens: Sequence[int], lengths: Iterable[int]
    ) -> tuple[int, Read | None]:
        """(number of tokens, what is kept of them) of the longest beginning; (0, None) where none is kept.

        Only the given lengths are looked up.
        """
        digests = _digests(tokens, lengths)
        for length in sorted(digests, reverse=True):
            key = _key(applied, start, digests[length])
            if key in self.entries:
                self.entries.move_to_end(key)
                return length, self.entries[key]
        return 0, None

    def add(
        self, applied: Applied, start: State | None, tokens: Sequence[int], state: State, logits: Tensor
    ) -> None:
        """Keep the state after all these tokens; what was not used for longest makes room for it."""
        tensors = [logits, *(part for layer in state for part in layer)]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if size > self.limit:
            return
        key = _key(applied, start, _digests(tokens, [len(tokens)])[len(tokens)])
        self._drop(key)
        self.entries[key] = Read(state, logits, start, size)
        self.size += size
        while self.size > self.limit:
            self._drop(next(iter(self.entries)))

    def clear(self) -> None:
        """Forget all, as when the weights change."""
        self.entries.clear()
        self.size = 0

    def _drop(self, key: tuple) -> None:
        if (entry := self.entries.pop(key, None)) is not None:
            self.size -= entry.size


def _key(applied: Applied, start: State | None, digest: bytes) -> tuple:
    return applied, None if start is None else id(start), digest


def _digests(tokens: Sequence[int], lengths: Iterable[int]) -> dict[int, bytes]:
    """Length -> digest of so many first tokens."""
    found, digest, before = {}, hashlib.blake2b(digest_size=32), 0
    for length in sorted({*lengths}):
        digest.update(array.array("q", tokens[before:length]).tobytes())
        found[length], before = digest.copy().digest(), length
    return found
