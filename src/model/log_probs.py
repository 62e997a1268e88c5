"""The log-probabilities of a batch's trained tokens, of which preference losses are made.

Rows are run whole or in chunks, by what runs them for the training loss (batch_loss.py).
"""

from __future__ import annotations

from torch import Tensor

from .batch_loss import Chunks, run_rows
from .rwkv import RWKV, State


def token_log_probs(model: RWKV, batch: dict, chunks: Chunks, width: int = 0) -> Tensor:
    """ln p of each trained token, (n,) in at least fp32, in the order of batch["targets"].

    `batch`, `chunks` and `width` are as for batch_loss(). The batch's weights are not read. The result is
    differentiable in the model's trained parameters; a gradient of it costs the second half of a step.
    """
    return run_rows(model, batch, chunks, width, part_log_probs)


def part_log_probs(model: RWKV, part: dict, state: State | None) -> tuple[Tensor, State]:
    """(ln p of the trained tokens of a part of the rows, state after the part).

    `state` is the state before the part, None where the rows begin.
    """
    x, state = model.features(part["ids"], state, part["reset"], part["where"])
    return model.log_probs(x, part["targets"]), state
