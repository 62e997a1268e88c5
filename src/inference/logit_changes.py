"""Changes of an answer's logits that a request asks for, before its token is drawn (sampling.py)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from rwkv_miss.errors import UserError


@dataclasses.dataclass(frozen=True)
class LogitChanges:
    """Changes of an answer's logits, in the order in which they are made. The defaults change nothing.

    `bias` is added to the logits of its tokens. The end of document is not drawn among the first `min_tokens`
    tokens, and with `ignore_eos` never. `repetition_penalty` r divides the logit of a token in the prompt or
    the answer by r if it is positive, and multiplies it otherwise. Then the sampling's penalties are taken
    off. At last, tokens with less than `min_p` times the probability of the likeliest are not drawn.
    """

    bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    min_tokens: int = 0
    ignore_eos: bool = False
    repetition_penalty: float = 1.0
    min_p: float = 0.0

    def check(self, vocab_size: int) -> None:
        """Raise UserError for a number that is out of its range."""
        for token, bias in self.bias.items():
            if not 0 <= token < vocab_size or not math.isfinite(bias):
                raise UserError(
                    f"bias {bias} of token {token}: expected a finite number, and a token of the vocabulary"
                    f" of {vocab_size:,}"
                )
        for name, fits, expected in (
            ("min_tokens", self.min_tokens >= 0, "0 or more"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "more than 0"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
        ):
            if not fits:
                raise UserError(f"{name} {getattr(self, name)}: expected {expected}")


NO_CHANGES = LogitChanges()


class ChangedLogits:
    """Logits of one answer with its changes. `answer` are its tokens, which grow."""

    def __init__(
        self,
        changes: LogitChanges,
        prompt: Sequence[int],
        answer: Sequence[int],
        vocab_size: int,
        eod: tuple[int, ...],
    ):
        self.changes, self.answer, self.eod = changes, answer, eod
        self.ids = np.fromiter(changes.bias, np.int64)
        self.bias = np.fromiter(changes.bias.values(), np.float32)
        self.seen, self.noted = np.zeros(vocab_size, bool), 0  # tokens of the answer that are in `seen`
        # a padded model has ids that no text stands for
        self.seen[[token for token in {*prompt} if token < vocab_size]] = True

    def apply(self, logits: np.ndarray, may_hold: bool = True) -> np.ndarray:
        """Return the changed logits (V,), before min_p, as a copy. `may_hold`: whether to hold the end."""
        changes, values = self.changes, logits.copy()
        values[self.ids] += self.bias
        if may_hold and self._may_not_end():
            values[self.eod[-1]] = -np.inf
        if changes.repetition_penalty != 1:
            self.seen[self.answer[self.noted :]] = True
            self.noted = len(self.answer)
            seen, r = values[self.seen], np.float32(changes.repetition_penalty)
            values[self.seen] = np.where(seen > 0, seen / r, seen * r)
        return values

    def _may_not_end(self) -> bool:
        """Tell whether the next token must not be the last one of an end of document."""
        changes, before = self.changes, len(self.eod) - 1
        length = len(self.answer)
        held = changes.ignore_eos or length < changes.min_tokens
        ends = (length + 1) % len(self.eod) == 0 and (
            tuple(self.answer[length - before :]) == self.eod[:before]
        )
        return held and ends

    def drop_unlikely(self, values: np.ndarray) -> np.ndarray:
        """Apply min_p to logits (n,) in place: those that are too unlikely become -inf."""
        if self.changes.min_p:
            values[values < values.max() + np.float32(math.log(self.changes.min_p))] = -np.inf
        return values
