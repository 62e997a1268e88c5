"""Warning about a model that predicts a text worse than a guess over the tokenizer's ids.

Most often the model was trained with another tokenizer.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ..data.tokenizer import Tokenizer
from ..model import RWKV
from .likelihood import log_likelihoods

MARGIN = 0.5  # nats
ENOUGH = 32  # tokens that are enough to tell


def worse_than_guessing(loss: float, tokenizer: Tokenizer, name: str = "the loss") -> str | None:
    """Warn about a trained model whose loss, in nats a token, is above that of guessing; else None.

    Guessing has ln(vocabulary). The loss may be above it by MARGIN. `name` is the loss's name.
    """
    guess = math.log(tokenizer.vocab_size)
    if loss <= guess + MARGIN:
        return None
    return (
        f"WARNING: {name} is {loss:.2f}, worse than guessing: any of the tokenizer's"
        f" {tokenizer.vocab_size:,} ids alike gives {guess:.2f}.\nWas the model trained with another"
        f" tokenizer than {tokenizer.name} (--tokenizer)? Is it the right model? If it knows one task"
        " only, as the demo's does, this is usual with other data."
    )


@torch.no_grad()
def doubt_of_text(model: RWKV, tokenizer: Tokenizer, ids: list[int]) -> str | None:
    """Warn about a text that the model reads; None for one that is too short to tell."""
    if len(ids) < ENOUGH:
        return None
    ids = torch.tensor([ids], device=model.emb.weight.device)
    logits, _ = model(ids)
    return worse_than_guessing(F.cross_entropy(logits[0, :-1].float(), ids[0, 1:]).item(), tokenizer)


def doubt_of_answers(
    model: RWKV, tokenizer: Tokenizer, pairs: list[tuple[list[int], list[int]]]
) -> str | None:
    """Warn about reference answers after their prompts, as ids; None if they are too short to tell."""
    tokens = sum(len(answer) for _, answer in pairs)
    if tokens < ENOUGH:
        return None
    return worse_than_guessing(-sum(total for total, _ in log_likelihoods(model, pairs)) / tokens, tokenizer)
