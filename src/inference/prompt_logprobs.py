"""Log-probabilities of a prompt's tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..model import RWKV
from ..model.loss import LOGITS_AT_ONCE
from .sampling import overflow

EachLogits = Callable[[Tensor], None]


class ScoredToken(NamedTuple):
    """Token of a prompt: ln p after the tokens before it, and its rank by p from 1 on; the first has none.

    `likeliest` holds (token, ln p), the likeliest first.
    """

    token: int
    logprob: float | None = None
    rank: int = 0
    likeliest: list[tuple[int, float]] = []


class PromptLogprobs:
    """Log-probabilities of a prompt's tokens: `scores`.

    Each comes with `count` of the likeliest tokens, which are below `vocab_size`. p is a share of all ids
    that the model has.
    """

    def __init__(self, tokens: Sequence[int], count: int, vocab_size: int):
        self.tokens, self.count, self.vocab_size = tokens, min(count, vocab_size), vocab_size
        self.scores = [ScoredToken(tokens[0])]

    def add(self, logits: Tensor) -> None:
        """Score the next tokens by the logits (n, V) before them. Raises UserError if they are not finite."""
        place = len(self.scores)
        tokens = self.tokens[place : place + len(logits)]
        of_token = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None])
        total = logits.logsumexp(1, keepdim=True)
        if not bool(total.isfinite().all()):
            raise overflow(logits.max().item())
        ranks = (logits >= of_token).sum(1).tolist()
        top = logits[:, : self.vocab_size].topk(self.count, 1)
        total = total.double()
        values, ids = (top.values - total).tolist(), top.indices.tolist()
        logprobs = (of_token - total)[:, 0].tolist()
        for token, logprob, rank, *likeliest in zip(tokens, logprobs, ranks, ids, values, strict=True):
            self.scores.append(ScoredToken(token, logprob, rank, list(zip(*likeliest))))


def give_logits(model: RWKV, x: Tensor, each: EachLogits) -> None:
    """Call each(logits (n, V)) for features x (T, C), some tokens at a time: not all logits are ever held.

    They are at least fp32. For x in bf16 a CPU rounds them.
    """
    for part in x.split(max(1, LOGITS_AT_ONCE // model.arch.vocab_size)):
        logits = model.head(part)
        each(logits.to(torch.promote_types(logits.dtype, torch.float32)))
