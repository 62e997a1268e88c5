"""Streaming an answer, token by token, from a model or its decoder (cpu_decoder.py), which are asked
alike.
"""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from ..data.rwkv_template import DEFAULT
from ..model import RWKV, State
from ..ops.native import nan_passes
from .cpu_decoder import Decoder
from .sampling import Sampling, sample


@torch.no_grad()
def stream(
    model: RWKV | Decoder,
    tokenizer,
    ids: list[int],
    state: State | None,
    sampling: Sampling,
    max_tokens: int,
    stop: str = DEFAULT.stop,
    generator: torch.Generator | None = None,
) -> Generator[str, None, State]:
    """Feed `ids`, then yield the answer in pieces of whole characters; the generator's return value is the
    state after it.

    The answer ends before the end of document, before the text `stop`, or after max_tokens. What is not
    yielded, be it half a character, is not left in the state either.
    """
    device = model.emb.weight.device

    def feed(tokens: list[int], before: State | None) -> tuple[Tensor, State]:
        with nan_passes():  # a model that overflows is named by its logits
            logits, after = model.next_logits(torch.tensor([tokens], device=device), before)
        return logits[0, : tokenizer.vocab_size], after  # a padded model has ids that no text stands for

    logits, state = feed(ids, state)
    decoder, seen = tokenizer.decoder(), {}
    text, emitted = "", 0
    produced: list[int] = []
    states = {0: state}  # characters -> the state right after them: what the end of the answer goes back to

    for _ in range(max_tokens):
        token = sample(logits, sampling, seen, generator)
        produced.append(token)
        end = len(tokenizer.eod)
        if len(produced) % end == 0 and tuple(produced[-end:]) == tokenizer.eod:
            break
        seen = {i: count * sampling.penalty_decay for i, count in seen.items()}
        seen[token] = seen.get(token, 0.0) + 1
        text += decoder.push(token)
        place = text.find(stop) if stop else -1
        if place >= 0:
            text = text[:place]
            break
        safe = len(text) - _overlap(text, stop)
        if safe > emitted:
            yield text[emitted:safe]
            emitted = safe
        logits, state = feed([token], state)
        if not decoder.pending:
            states[len(text)] = state
        oldest = max(length for length in states if length <= emitted)
        states = {length: kept for length, kept in states.items() if length >= oldest}
    if emitted < len(text):
        yield text[emitted:]
    start = max(length for length in states if length <= len(text))
    rest = tokenizer.encode(text[start:])
    return feed(rest, states[start])[1] if rest else states[start]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`: what must be held back."""
    return next((n for n in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:n])), 0)
