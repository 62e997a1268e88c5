"""Text of an answer from its tokens: whole characters, the end of document, texts that end an answer."""

from __future__ import annotations

from collections.abc import Sequence

from ..data.chat_template import before_stops
from ..data.tokenizer import Tokenizer
from .constraint import Constraint


class AnswerText:
    """Text of an answer that grows token by token.

    `shown` is the text so far, in whole characters. A possible beginning of a stop is in `held`, until it
    turns out to be none. `is_whole` tells whether the tokens end where a character ends. With a constraint,
    that one tells the end, and knows the stops. Without one, a stop counts if it begins after the first
    `min_tokens` tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        constraint: Constraint | None = None,
        min_tokens: int = 0,
    ):
        self.eod, self.decoder, self.stops = tokenizer.eod, tokenizer.decoder(), stops
        self.min_tokens = min_tokens
        self.constraint = constraint
        self.tokens: list[int] = []
        self.shown, self.held = "", ""
        self.ended = ""  # the end that came: document, stop, or nothing so far
        self.stop = ""  # the stop that came

    @property
    def length(self) -> int:
        """Characters, with those that are held back."""
        return len(self.shown) + len(self.held)

    @property
    def is_whole(self) -> bool:
        return not self.decoder.pending

    def push(self, token: int) -> None:
        """Add one token. An end of document, or a stop, is not in the text."""
        self.tokens.append(token)
        if ends_document(self.tokens, self.eod):
            self.ended = "document"
            return self.close()
        text = self.held + self.decoder.push(token)
        before, held, ended = self._cut(token, text)
        safe = len(before) - held
        self.shown, self.held = self.shown + before[:safe], before[safe:]
        if ended:
            self.ended = "stop"
            self.stop = next((stop for stop in self.stops if text.startswith(stop, len(before))), "")
            self.close()

    def _cut(self, token: int, text: str) -> tuple[str, int, bool]:
        """Return (the text before a stop, characters at its end that may begin one, whether it has ended)."""
        if constraint := self.constraint:
            constraint.accept(token)
            before = text[: len(text) - constraint.held] if constraint.ended else text
            return before, 0 if constraint.ended else constraint.held, constraint.ended
        stops = self.stops if len(self.tokens) > self.min_tokens else ()
        before = before_stops(text, stops)
        return before, overlap(before, stops), len(before) < len(text)

    def close(self) -> None:
        """End the answer: held text is shown."""
        self.shown, self.held = self.shown + self.held, ""


def ends_document(tokens: list[int], eod: tuple[int, ...]) -> bool:
    """Tell whether the last tokens are the end of document, which begins at a multiple of its length."""
    return len(tokens) % len(eod) == 0 and tuple(tokens[-len(eod) :]) == eod


def overlap(text: str, stops: Sequence[str]) -> int:
    """Return the length of the longest end of `text` that begins a stop: it must be held back."""
    longest = min(len(text), max(map(len, stops), default=0))
    return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in stops)), 0)
