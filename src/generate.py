"""Sampling, streaming and the state of a conversation, by a model or its decoder (src/decode.py), which are
asked alike.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Generator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rwkv_miss.errors import UserError

from .data.chat_template import Template
from .data.rwkv_template import DEFAULT
from .decode import ADVICE, Decoder
from .model import RWKV, State
from .ops.native import nan_passes


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0 (below 1e-5) is greedy; top_k 0 and top_p 1 leave the
    distribution whole.

    The penalties lower the logit of a token that the answer holds already: presence once, frequency per
    occurrence; an occurrence fades by `penalty_decay` with every token.
    """

    temperature: float = 1.0
    top_p: float = 0.7
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_decay: float = 0.996

    def check(self) -> None:
        """UserError for a number that is out of its range."""
        for name, fits, expected in (
            ("temperature", 0 <= self.temperature < math.inf, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "a finite number"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "a finite number"),
        ):
            if not fits:
                raise UserError(f"{name} {getattr(self, name)}: expected {expected}")


def sample(
    logits: Tensor, sampling: Sampling, seen: dict[int, float], generator: torch.Generator | None = None
) -> int:
    """One token id from logits (V,); `seen` holds the faded number of occurrences of each token of the
    answer. UserError if a logit is NaN or infinite upwards.

    It is NumPy's work, which stays in the calling thread: torch's other threads, once woken, spin for a while
    on the cores that the decoder needs.
    """
    values = logits.detach().float().cpu().numpy()
    if seen and (sampling.presence_penalty or sampling.frequency_penalty):
        values = values.copy()
        values[list(seen)] -= sampling.presence_penalty + sampling.frequency_penalty * np.array(
            list(seen.values()), dtype=np.float32
        )
    if not np.isfinite(values.max()):
        raise UserError(
            f"the largest logit is {values.max()}, expected a finite number: the model overflows{ADVICE}"
        )
    if sampling.temperature < 1e-5:
        return int(values.argmax())
    order, probabilities = _likeliest(values, sampling)
    # the smallest set of tokens whose probability reaches top_p; the first one always stays
    kept = order[
        : max(1, int((probabilities.cumsum(dtype=np.float64) - probabilities < sampling.top_p).sum()))
    ]
    shares = np.exp((values[kept] - values[kept[0]]).astype(np.float64) / sampling.temperature).cumsum()
    drawn = torch.rand((), dtype=torch.float64, generator=generator).item() * shares[-1]
    return int(kept[np.searchsorted(shares, drawn, side="right")])


def _likeliest(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Ids and probabilities of the likeliest tokens in their order: top_k of them, else enough to reach
    top_p. Of 65536 tokens 256 are most often enough, and sorting them all takes longer than making the logits
    of a small model.
    """
    if sampling.top_k:
        order = _largest(logits, sampling.top_k)
        weights = np.exp(logits[order] - logits[order[0]])
        return order, weights / weights.sum(dtype=np.float64)
    weights = np.exp(logits - logits.max())
    total = weights.sum(dtype=np.float64)
    for count in (256, 4096, len(logits)):
        order = _largest(logits, count)
        probabilities = weights[order] / total
        if probabilities.sum() >= sampling.top_p:
            break
    return order, probabilities


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest values, or of all, the largest first."""
    found = np.argpartition(values, -count)[-count:] if count < len(values) else np.arange(len(values))
    return found[np.argsort(-values[found])]


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


class Turn(NamedTuple):
    """A user's words with the answer to them."""

    messages: list[dict]
    pieces: list[str]  # what is read of them, each tokenised on its own
    # whether the pieces are the conversation from its beginning, which the first turn's are, and those that a
    # template wrote anew
    whole: bool


class Conversation:
    """A chat whose state is kept between turns, so that every turn costs only its own tokens.

    `state` is the one after the first `read` of the `turns`; what is not in it yet is read before the next
    answer.
    """

    def __init__(
        self,
        model: RWKV | Decoder,
        tokenizer,
        sampling: Sampling,
        seed: int = 0,
        system: str = "",
        template: Template = DEFAULT,
    ):
        self.model, self.tokenizer, self.sampling, self.template = model, tokenizer, sampling, template
        self.generator = torch.Generator().manual_seed(seed)
        self.system = system
        self.reset()

    def reset(self) -> None:
        """As at the beginning, but for the random numbers."""
        self.turns: list[Turn] = []
        self.read_again()

    def read_again(self) -> None:
        """Forget the state, as of a model with other weights: all turns are read again before the next
        answer.
        """
        self.state: State | None = None
        self.read = 0
        self.earlier: tuple[State | None, int] = None, 0  # state and read of before the last answer

    @property
    def messages(self) -> list[dict]:
        """The conversation so far, as {"role", "content"}."""
        opening = [{"role": "system", "content": self.system}] if self.system else []
        return opening + [message for turn in self.turns for message in turn.messages]

    def undo(self) -> None:
        """Take back the last turn. UserError if there is none."""
        if not self.turns:
            raise UserError("there is no turn to take back")
        self.turns.pop()
        if self.read > len(self.turns):
            self.state, self.read = self.earlier
            self.earlier = None, 0

    def twin(self, seed: int) -> Conversation:
        """The same conversation with random numbers of its own; what is said in it is not said here."""
        other = copy.copy(self)
        other.turns, other.generator = list(self.turns), torch.Generator().manual_seed(seed)
        return other

    def unread(self) -> tuple[State | None, list[str]]:
        """(the state to go on from, the pieces of the turns that it does not hold)."""
        first = max((i for i, turn in enumerate(self.turns) if turn.whole), default=0)
        state, start = (self.state, self.read) if self.read > first else (None, first)
        return state, [piece for turn in self.turns[start:] for piece in turn.pieces]

    def answer(self, text: str, max_tokens: int = 512) -> Generator[str, None, None]:
        """The model's answer to a user turn, in pieces. If it is interrupted or closed, what was said until
        then is the answer.
        """
        new = [{"role": "user", "content": text}]
        pieces = self.template.next_turn(self.messages, new) if self.turns else None
        whole = pieces is None
        before, unread = (None, []) if whole else self.unread()
        if whole:
            pieces = [piece for piece, _ in self.template.segments([*self.messages, *new], ask=True)]
        ids = [token for piece in [*unread, *pieces] for token in self.tokenizer.encode(piece)]
        said: list[str] = []
        answers = stream(
            self.model,
            self.tokenizer,
            ids,
            before,
            self.sampling,
            max_tokens,
            self.template.stop,
            self.generator,
        )
        try:
            state = yield from _noted(answers, said)
        except (KeyboardInterrupt, GeneratorExit):
            if said:
                self._add(new, pieces, whole, "".join(said))
            raise
        self._add(new, pieces, whole, "".join(said))
        self.earlier = self.state, self.read
        self.state, self.read = state, len(self.turns)

    def _add(self, new: list[dict], pieces: list[str], whole: bool, said: str) -> None:
        message = {"role": "assistant", "content": (self.template.opening + said).strip()}
        self.turns.append(Turn([*new, message], [*pieces, said], whole))


def _noted(pieces: Generator[str, None, State], into: list[str]) -> Generator[str, None, State]:
    """The same pieces and the same return value, with a copy of each piece."""
    while True:
        try:
            into.append(next(pieces))
        except StopIteration as end:
            return end.value
        yield into[-1]
