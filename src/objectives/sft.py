"""Supervised fine-tuning: the weighted cross entropy over the trained tokens of documents."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from rwkv_miss.files.checkpoint import Arch

from ..common.batch import Batch
from ..data.batches import Schedule
from ..data.examples import Examples
from ..model import RWKV
from ..model.batch_loss import batch_loss
from .base import Objective
from .estimates import BatchSizes, fullest_rows
from .held_out_answers import BITS, RIGHT, SHOWN
from .held_out_loss import HeldOutLoss
from .loss_metrics import LossMetrics, Shown

SUPERVISED = LossMetrics(
    RIGHT | BITS,
    shares=(*RIGHT,),
    line=(SHOWN, Shown((*BITS,), lambda bits: f"{bits:.3f} bits a byte")),
    nats=("loss", "the loss"),
)
NO_METRICS = torch.zeros(0, dtype=torch.float64)


class Supervised(Objective):
    """Objective of --loss sft."""

    loss = None  # is part of the model's pass over a batch
    metrics = SUPERVISED

    def largest_batch(self, schedule: Schedule, documents: Examples | None, arch: Arch) -> BatchSizes:
        found = super().largest_batch(schedule, documents, arch)
        if documents is None:
            return found
        return dataclasses.replace(found, documents=fullest_rows(documents, schedule, self.config.micro_bsz))

    def __call__(
        self, model: RWKV, batch: Batch, keep: Callable[[Tensor], None] | None = None
    ) -> tuple[Tensor, Tensor]:
        return batch_loss(model, batch, self.chunks), NO_METRICS

    def trained_text(self, documents: Examples) -> str:
        config = self.config
        what = mask_text(config.loss_mask, config.think_weight, config.prompt_weight)
        return f", {documents.targets:,} of them trained{weighing(documents)}: {what}"

    def evaluation(self, module) -> HeldOutLoss:
        return HeldOutLoss(module)


def weighing(documents: Examples) -> str:
    """Say the sum of the trained tokens' weights, if it is not their number."""
    if documents.weight == documents.targets:
        return ""
    return f" (with weights that add up to {documents.weight:,.1f}, by which a loss is divided)"


def mask_text(loss_mask: str, think_weight: float, prompt_weight: float) -> str:
    """Name the trained tokens."""
    names = {"assistant": "the assistant's turns and plain text", "all": "everything"}
    thoughts = f", thoughts times {think_weight:g}" if think_weight != 1 else ""
    prompts = f", prompts times {prompt_weight:g}" if prompt_weight else ""
    return names.get(loss_mask, f"what follows {loss_mask!r}") + thoughts + prompts
