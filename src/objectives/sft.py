"""Supervised fine-tuning: the weighted cross entropy over the trained tokens of documents."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..model import RWKV
from ..model.batch_loss import batch_loss
from .base import Objective
from .held_out_loss import HeldOutLoss

NO_METRICS = torch.zeros(0, dtype=torch.float64)


class Supervised(Objective):
    """--loss sft."""

    loss = None  # is part of the model's pass over a batch

    def __call__(
        self, model: RWKV, batch: dict, keep: Callable[[Tensor], None] | None = None
    ) -> tuple[Tensor, Tensor]:
        return batch_loss(model, batch, self.chunks, batch.get("width", 0)), NO_METRICS

    def evaluation(self, module) -> HeldOutLoss:
        return HeldOutLoss(module)
