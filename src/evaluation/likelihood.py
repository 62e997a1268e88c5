"""Log-likelihoods of given continuations, many at once.

Padding reaches no state, and logits are computed only where they are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..model import RWKV

TOKENS = 1 << 14  # tokens in one pass, padding included
LOGITS = 1 << 26  # logits at once: 256 MiB in fp32

# the ids of a text, and the number of its last tokens whose features are needed
Request = tuple[tuple[int, ...], int]


@torch.no_grad()
def log_likelihoods(model: RWKV, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """Compute ln p(continuation | context) of each pair, and whether greedy decoding gives the continuation.

    Both are lists of ids. Pairs that read the same tokens are computed once, such as the choices of a
    question with answers of one token.

    Raises ValueError for an empty context. The first token of a text needs one before it, such as the end of
    a document.
    """
    if not all(context for context, _ in pairs):
        raise ValueError("log_likelihoods: a context is empty; begin it with the end of document")
    inputs = [(*context, *continuation[:-1]) for context, continuation in pairs]
    pairs_of: dict[Request, list[int]] = {}
    for i, (row, (_, continuation)) in enumerate(zip(inputs, pairs, strict=True)):
        pairs_of.setdefault((row, len(continuation)), []).append(i)
    results: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    for batch in _batches(sorted(pairs_of, key=lambda request: len(request[0]))):
        features = _features(model, batch)
        for request, x in zip(batch, features, strict=True):
            for i in pairs_of[request]:
                results[i] = _score(model, x, pairs[i][1])
    return results


def _batches(requests: list[Request]) -> list[list[Request]]:
    """Cut requests of ascending length into batches of at most TOKENS tokens, padded to their longest."""
    batches: list[list[Request]] = []
    for request in requests:
        length = len(request[0])
        if not batches or (len(batches[-1]) + 1) * length > TOKENS:
            batches.append([])
        batches[-1].append(request)
    return batches


def _features(model: RWKV, batch: list[Request]) -> list[Tensor]:
    """Compute the input of the head (n, C) at the last n tokens of each request (ids, n).

    The padding comes after them and reaches nothing.
    """
    longest = len(batch[-1][0])
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    wanted = []
    for i, (row, n) in enumerate(batch):
        ids[i, : len(row)] = torch.tensor(row)
        end = i * longest + len(row)
        wanted += range(end - n, end)
    device = model.emb.weight.device
    x, _ = model.features(ids.to(device), wanted=torch.tensor(wanted, dtype=torch.int64).to(device))
    return list(x.split([n for _, n in batch]))


def _score(model: RWKV, x: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """Return sum ln p of the tokens after features x (n, C), in fp64; tell whether each is the likeliest."""
    targets = torch.tensor(continuation, device=x.device)
    total, greedy = 0.0, True
    rows = max(1, LOGITS // model.arch.vocab_size)
    for part, ids in zip(x.split(rows), targets.split(rows), strict=True):
        logits = model.head(part).float()
        total += float((logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(1)).double().sum())
        greedy = greedy and bool((logits.argmax(1) == ids).all())
    return total, greedy
