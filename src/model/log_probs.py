"""Log-probabilities of a batch's trained tokens, the input of preference losses.

Rows are run whole or in chunks, as for the training loss (batch_loss.py). Or the prompts of
the batch are read once, and the answers go on from the states after them.
"""

from __future__ import annotations

from torch import Tensor

from ..common.batch import Batch
from .batch_loss import Chunks, run_rows
from .rwkv import RWKV, State


def token_log_probs(model: RWKV, batch: Batch, chunks: Chunks) -> Tensor:
    """Compute ln p of each trained token, (n,) in at least fp32, in the order of batch.targets.

    `batch` and `chunks` are as for run_rows(); its weights are not read.

    The result is differentiable in the model's trained parameters, through the states after prompts, too.
    Equal rows give the same numbers with and without shared prompts, except with dropout: answers that share
    a prompt share its dropped entries.
    """
    return run_rows(model, batch, chunks, part_log_probs, each=True)


def token_features(model: RWKV, batch: Batch, chunks: Chunks) -> Tensor:
    """Return the head's input for each trained token, (n, C), in token_log_probs()' order."""
    return run_rows(model, batch, chunks, part_features, each=True)


def top_log_probs(model: RWKV, batch: Batch, chunks: Chunks, count: int, temperature: float) -> Tensor:
    """Compute loss.top_of() for each trained token, (n, 2 count + 1), without gradient, in
    token_log_probs()' order."""

    def top(model: RWKV, part: Batch, state: State | None) -> tuple[Tensor, State]:
        x, state = part_features(model, part, state)
        return model.top_log_probs(x, count, temperature), state

    return run_rows(model, batch, chunks, top, each=True)


def part_log_probs(model: RWKV, part: Batch, state: State | None) -> tuple[Tensor, State]:
    """Return (ln p of the trained tokens of a part of the rows, state after the part).

    `state` is the state before the part, None at the beginning of the rows.
    """
    x, state = part_features(model, part, state)
    return model.log_probs(x, part.targets), state


def part_features(model: RWKV, part: Batch, state: State | None) -> tuple[Tensor, State]:
    """Return the head's input for the part's trained tokens, and the state after the part."""
    return model.features(part.ids, state, part.reset, part.where)
