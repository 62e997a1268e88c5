"""How the next token is chosen: temperature, top-p, top-k, penalties."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor

from rwkv_miss.errors import UserError

from ..data.chat_template import begins_thoughts
from .cpu_decoder import ADVICE


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    temperature 0 (below 1e-5) is greedy. top_k 0 and top_p 1 leave the distribution whole. The penalties
    lower the logit of a token that the answer holds already: presence once, frequency per occurrence. An
    occurrence fades by `penalty_decay` with every token.
    """

    temperature: float = 1.0
    top_p: float = 0.7
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_decay: float = 0.996

    def __str__(self) -> str:
        return ", ".join(f"{field.name} {getattr(self, field.name):g}" for field in dataclasses.fields(self))

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


# as the releases of the G1 models recommend, for answers that begin with thoughts and with empty ones
OPEN_THINK = Sampling(0.96, 0.76, 32, presence_penalty=1.0, frequency_penalty=0.1, penalty_decay=0.988)
FAKE_THINK = Sampling(1.0, 0.28, 32)


def recommended(opening: str) -> Sampling | None:
    """The recommended sampling for answers after this opening; None where none is known."""
    if begins_thoughts(opening):
        return OPEN_THINK
    return FAKE_THINK if opening else None


def sample(
    logits: Tensor, sampling: Sampling, seen: dict[int, float], generator: torch.Generator | None = None
) -> int:
    """One token id from logits (V,); UserError if a logit is NaN or +inf.

    `seen` holds the faded number of occurrences of each token of the answer. NumPy is used, because it stays
    in the calling thread: torch's other threads, once woken, spin for a while on the cores that the decoder
    needs.
    """
    values = logits.detach().float().cpu().numpy()
    if seen and (sampling.presence_penalty or sampling.frequency_penalty):
        counts = np.array(list(seen.values()), dtype=np.float32)
        values = values.copy()
        values[list(seen)] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    if not np.isfinite(values.max()):
        raise UserError(
            f"the largest logit is {values.max()}, expected a finite number: the model overflows{ADVICE}"
        )
    if sampling.temperature < 1e-5:
        return int(values.argmax())
    order, probabilities = _likeliest(values, sampling)
    # the smallest set of tokens whose probability reaches top_p; the first one always stays
    before = probabilities.cumsum(dtype=np.float64) - probabilities
    kept = order[: max(1, int((before < sampling.top_p).sum()))]
    shares = np.exp((values[kept] - values[kept[0]]).astype(np.float64) / sampling.temperature).cumsum()
    drawn = torch.rand((), dtype=torch.float64, generator=generator).item() * shares[-1]
    return int(kept[np.searchsorted(shares, drawn, side="right")])


def _likeliest(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Ids and probabilities of the likeliest tokens in their order: top_k, or enough to reach top_p.

    Of 65536 tokens 256 are most often enough. Sorting all takes longer than computing a small model's logits.
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
    found = np.arange(len(values))
    if count < len(values):
        found = np.argpartition(values, -count)[-count:]
    return found[np.argsort(-values[found])]
