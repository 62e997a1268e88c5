"""KL divergence of one model's predictions from another's on the same tokens.

forgetting.txt is a fixed text in four sections to compare them on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from rwkv_miss.errors import UserError

from ..model import RWKV

TOKENS_AT_ONCE = 16  # tokens whose logits are compared at once
TEXT = pathlib.Path(__file__).with_name("forgetting.txt")


def sections(tokenizer) -> dict[str, list[int]]:
    """Encode the fixed text's sections by name, without those that the tokenizer has no tokens for."""
    parts = re.split(r"^=== (.+) ===\n", TEXT.read_text(encoding="utf-8"), flags=re.M)[1:]
    encoded = {}
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        with contextlib.suppress(UserError):
            encoded[name] = tokenizer.encode(text)
    return encoded


def divergence(base: Tensor, tuned: Tensor) -> Tensor:
    """Compute the KL divergence KL(base || tuned) at each token, in nats: logits (T, V) -> (T,).

    It is computed in fp32, or in fp64 for such logits.
    """
    base, tuned = _log_probabilities(base), _log_probabilities(tuned)
    return (base.exp() * (base - tuned)).sum(-1)


def _log_probabilities(logits: Tensor) -> Tensor:
    if logits.dtype != torch.float64:
        logits = logits.float()
    return torch.log_softmax(logits, -1)


@dataclasses.dataclass(frozen=True)
class Distance:
    """Distance of logits from those of a reference."""

    max_logit_difference: float
    max_logit: float  # the largest |logit| of the reference
    mean_kl: float  # mean over the tokens of KL(reference || the other model), in nats
    max_kl: float
    top1_agreement: float  # share of tokens with the same likeliest next token


@torch.no_grad()
def logits_of(model: RWKV, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Compute the logits (T, V) of each text, fp32."""
    device = model.emb.weight.device
    return [model(torch.tensor([list(ids)], device=device))[0][0].float() for ids in texts]


def distance(reference: Sequence[Tensor], logits: Sequence[Tensor]) -> Distance:
    """Compute the distance of logits (T, V) from those of the reference, over all texts.

    It is computed in float64, because in fp32 rounding hides small divergences.
    """
    max_difference = max_logit = 0.0
    kl, same = [], []
    for expected, found in zip(reference, logits, strict=True):
        for a, b in zip(expected.split(TOKENS_AT_ONCE), found.split(TOKENS_AT_ONCE)):
            a, b = a.double(), b.double()
            max_difference = max(max_difference, float((a - b).abs().max()))
            max_logit = max(max_logit, float(a.abs().max()))
            kl.append(divergence(a, b))
            same.append(a.argmax(-1) == b.argmax(-1))
    kls = torch.cat(kl)
    return Distance(
        max_logit_difference=max_difference,
        max_logit=max_logit,
        # rounding makes a divergence of 0 slightly negative
        mean_kl=float(kls.mean().clamp(min=0)),
        max_kl=float(kls.max().clamp(min=0)),
        top1_agreement=float(torch.cat(same).double().mean()),
    )
