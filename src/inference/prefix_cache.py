"""Prefix cache: states of prompts that were read, for prompts that begin alike.

An RNN's state is all that is left of a prompt, of one size whatever the prompt's length. A prompt that goes
on from a kept state has the same bits as without it, if both are read in the same chunks (engine.py). The
states after answers are kept apart: they have the bits of single tokens.
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
    """Cached result of reading some tokens."""

    state: State
    logits: Tensor | None  # (1, V) after a whole prompt; None for the beginning of others
    start: State | None  # the state before the tokens: kept, so that no other one gets its id()
    size: int  # bytes


class StateKind(NamedTuple):
    """Kind of a state; only states of one kind can replace each other.

    Two start states are the same if they are one object; None is the adapter's, or the model's own.
    """

    applied: Applied
    start: State | None
    after_answer: bool = False  # some of the tokens were read one by one


class Key(NamedTuple):
    """Key of an entry: kind, and a number of tokens. The tokens themselves are not kept."""

    applied: Applied
    start: int | None
    after_answer: bool
    whole: bool  # a prompt with the logits after it, not the beginning of others
    length: int
    digest: bytes


class PrefixCache:
    """Cache of kind and tokens -> state, in at most `limit` bytes: the last used ones stay."""

    def __init__(self, limit: int):
        self.limit, self.size = limit, 0
        self.entries: OrderedDict[Key, Read] = OrderedDict()  # the one used last is at the end

    def longest(
        self, kind: StateKind, tokens: Sequence[int], lengths: Iterable[int]
    ) -> tuple[int, Read | None]:
        """Find (number of tokens, cached result) of the longest beginning; (0, None) without one.

        Only the given lengths are looked up; after answers, the lengths that the cache has.
        """
        if kind.after_answer:
            lengths = {key.length for key in self.entries if key.after_answer and key.length <= len(tokens)}
        for key in reversed(_keys(kind, tokens, lengths)):
            key = key._replace(whole=key.length == len(tokens))
            if key in self.entries:
                self.entries.move_to_end(key)
                return key.length, self.entries[key]
        return 0, None

    def add(self, kind: StateKind, tokens: Sequence[int], state: State, logits: Tensor | None) -> None:
        """Keep the state after all these tokens; entries unused for longest are dropped to make room."""
        tensors = [part for layer in state for part in layer] + ([] if logits is None else [logits])
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if size > self.limit:
            return
        (key,) = _keys(kind, tokens, [len(tokens)])
        key = key._replace(whole=logits is not None)
        self._drop(key)
        self.entries[key] = Read(state, logits, kind.start, size)
        self.size += size
        while self.size > self.limit:
            self._drop(next(iter(self.entries)))

    def forget(self, start: State) -> None:
        """Drop the entries that begin with this state."""
        for key in [key for key, entry in self.entries.items() if entry.start is start]:
            self._drop(key)

    def clear(self) -> None:
        """Forget all entries, as when the weights change."""
        self.entries.clear()
        self.size = 0

    def _drop(self, key: Key) -> None:
        if (entry := self.entries.pop(key, None)) is not None:
            self.size -= entry.size


def _keys(kind: StateKind, tokens: Sequence[int], lengths: Iterable[int]) -> list[Key]:
    """Return the keys of the first `lengths` tokens, the shortest first."""
    start = None if kind.start is None else id(kind.start)
    keys, digest, before = [], hashlib.blake2b(digest_size=32), 0
    for length in sorted(lengths):
        digest.update(array.array("q", tokens[before:length]).tobytes())
        keys.append(Key(kind.applied, start, kind.after_answer, False, length, digest.digest()))
        before = length
    return keys
