"""Streaming an answer, token by token, from a model or its decoder (cpu_decoder.py)."""

from __future__ import annotations

import functools
from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from ..data.chat_template import before_stops
from ..data.rwkv_template import DEFAULT
from ..model import RWKV, State
from ..ops.native import nan_passes
from .cpu_decoder import Decoder
from .sampling import FadedCounts, Row, Sampling, choose


@torch.no_grad()
def stream(
    model: RWKV | Decoder,
    tokenizer,
    ids: list[int],
    state: State | None,
    sampling: Sampling,
    max_tokens: int,
    stops: Sequence[str] = DEFAULT.stops,
    generator: torch.Generator | None = None,
) -> Generator[str, None, State]:
    """Feed `ids`, then yield the answer in pieces of whole characters; return the state after it.

    The answer ends before the end of document, before a text of `stops`, or after max_tokens. What is not
    yielded, such as half a character, is not in the state either.
    """
    feed = functools.partial(_feed, model, tokenizer)
    logits, state = feed(ids, state)
    decoder, states, seen = tokenizer.decoder(), _States(state), FadedCounts(sampling)
    text, emitted = "", 0
    produced: list[int] = []

    for _ in range(max_tokens):
        token, *_, error = choose(logits[None], [Row(sampling, seen, generator)])[0]
        if error:
            raise error
        produced.append(token)
        if _ends_document(produced, tokenizer.eod):
            break
        seen.add(token)
        text += decoder.push(token)
        before = before_stops(text, stops)
        if len(before) < len(text):
            text = before
            break
        safe = len(text) - _overlap(text, stops)
        if safe > emitted:
            yield text[emitted:safe]
            emitted = safe
        logits, state = feed([token], state)
        if not decoder.pending:
            states.after[len(text)] = state
        states.forget_before(emitted)
    if emitted < len(text):
        yield text[emitted:]
    start = states.newest(len(text))
    rest = tokenizer.encode(text[start:])
    return feed(rest, states.after[start])[1] if rest else states.after[start]


def _feed(model: RWKV | Decoder, tokenizer, tokens: list[int], before: State | None) -> tuple[Tensor, State]:
    """(logits of the token after these, the state after them)."""
    ids = torch.tensor([tokens], device=model.emb.weight.device)
    # choose() names a model that overflows, by its logits
    with nan_passes():
        logits, after = model.next_logits(ids, before)
    # a padded model has ids that no text stands for
    return logits[0, : tokenizer.vocab_size], after


class _States:
    """The states that the end of the answer may go back to.

    `after`: number of characters of the answer -> the state right after them.
    """

    def __init__(self, first: State):
        self.after = {0: first}

    def newest(self, length: int) -> int:
        """The most characters, of at most `length`, whose state is known."""
        return max(known for known in self.after if known <= length)

    def forget_before(self, length: int) -> None:
        """Drop what an answer of at least this length does not go back to."""
        oldest = self.newest(length)
        self.after = {known: state for known, state in self.after.items() if known >= oldest}


def _ends_document(tokens: list[int], eod: tuple[int, ...]) -> bool:
    """Whether the last tokens are the end of document, which begins at a multiple of its length."""
    return len(tokens) % len(eod) == 0 and tuple(tokens[-len(eod) :]) == eod


def _overlap(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that is a beginning of a stop: what must be held back."""
    longest = min(len(text), max(map(len, stops), default=0))
    return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in stops)), 0)
