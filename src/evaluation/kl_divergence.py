"""Two models on the same tokens: a fixed text in four kinds, and how far the one's predictions are from the
other's.
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

BLOCK = 16  # tokens whose logits are looked at together
TEXT = pathlib.Path(__file__).with_name("forgetting.txt")


def sections(tokenizer) -> dict[str, list[int]]:
    """Name -> tokens of the fixed text's sections, without those that the tokenizer has no tokens for."""
    parts = re.split(r"^=== (.+) ===\n", TEXT.read_text(encoding="utf-8"), flags=re.M)[1:]
    found = {}
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        with contextlib.suppress(UserError):
            found[name] = tokenizer.encode(text)
    return found


def divergence(base: Tensor, tuned: Tensor) -> Tensor:
    """Kullback-Leibler divergence KL(base || tuned) at each token, nats: logits (T, V) -> (T,) fp32, or fp64
    for such logits.
    """
    base, tuned = (
        torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)
        for logits in (base, tuned)
    )
    return (base.exp() * (base - tuned)).sum(-1)


@dataclasses.dataclass(frozen=True)
class Distance:
    """How far logits are from others: the largest |difference|, beside the largest |logit|; KL(others ||
    these), nats, mean and largest over the tokens; and the share of tokens with the same likeliest next one.
    """

    max_logit_difference: float
    max_logit: float
    mean_kl: float
    max_kl: float
    top1_agreement: float


@torch.no_grad()
def logits_of(model: RWKV, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """The logits (T, V) of each text, fp32."""
    device = model.emb.weight.device
    return [model(torch.tensor([list(ids)], device=device))[0][0].float() for ids in texts]


def distance(reference: Sequence[Tensor], logits: Sequence[Tensor]) -> Distance:
    """That of logits (T, V) from those of the reference, over all texts; in float64, in which small
    divergences do not drown.
    """
    largest = size = 0.0
    kl, same = [], []
    for expected, found in zip(reference, logits, strict=True):
        for a, b in zip(expected.split(BLOCK), found.split(BLOCK)):
            a, b = a.double(), b.double()
            largest, size = max(largest, float((a - b).abs().max())), max(size, float(a.abs().max()))
            kl.append(divergence(a, b))
            same.append(a.argmax(-1) == b.argmax(-1))
    kls = torch.cat(kl)
    return Distance(
        largest,
        size,
        float(kls.mean().clamp(min=0)),
        float(kls.max().clamp(min=0)),
        float(torch.cat(same).double().mean()),
    )
