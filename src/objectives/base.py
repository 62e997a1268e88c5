"""What a training makes small: the one place that the steps, the evaluations and the trials ask for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..model import RWKV
from ..model.batch_loss import Chunks, batch_loss
from ..model.grpo_loss import GrpoLoss
from ..model.log_probs import token_log_probs
from ..model.preference_loss import PreferenceLoss

AnswersLoss = PreferenceLoss | GrpoLoss  # of ln p of the tokens of answers, and a batch of them
NO_METRICS = torch.zeros(0, dtype=torch.float64)


def objective(
    model: RWKV,
    batch: dict,
    chunks: Chunks,
    answers_loss: AnswersLoss | None,
    keep: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss of a batch, summed over what its step's weight counts; sums of the metrics beside it).

    Without `answers_loss` it is the weighted cross entropy over the trained tokens, and there are no
    metrics. With it the sums are float64, as its means() takes them, and `keep` gets ln p of the trained
    tokens, (n,). The batch's `width` is the length of the longest row that any rank has in its batch.
    """
    if answers_loss is None:
        return batch_loss(model, batch, chunks, batch["width"]), NO_METRICS
    log_probs = token_log_probs(model, batch, chunks, batch["width"])
    if keep:
        keep(log_probs.detach())
    return answers_loss(log_probs, batch)


class Evaluated(NamedTuple):
    """What an evaluation found."""

    loss: float  # lower is better; it may be not finite
    metrics: dict[str, float]  # beside it, by the names of LossMetrics
    units: float  # that it is the mean of
    tokens: int  # that were predicted or drawn
    samples: list[dict[str, Any]]  # prompt, answer, right, and of a training on rewards reward
