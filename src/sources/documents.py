"""Documents, whose trained tokens a loss takes one by one."""

from __future__ import annotations

import dataclasses

from rwkv_miss.files.checkpoint import Arch

from ..data.batches import Schedule
from ..data.examples import Examples
from .base import Source, SourceCost
from .estimates import BatchSizes, fullest_rows
from .held_out_loss import HeldOutLoss


class DocumentCost(SourceCost):
    """Cost of documents."""

    def largest_batch(self, schedule: Schedule, documents: Examples | None, arch: Arch) -> BatchSizes:
        found = super().largest_batch(schedule, documents, arch)
        if documents is None:
            return found
        return dataclasses.replace(found, documents=fullest_rows(documents, schedule, self.config.micro_bsz))


class DocumentSource(Source):
    """Documents of --data_file."""

    cost_type = DocumentCost

    def trained_text(self, documents: Examples) -> str:
        config = self.config
        what = mask_text(config.loss_mask, config.think_weight, config.prompt_weight)
        return f", {documents.targets:,} of them trained{weighing(documents)}: {what}"

    def evaluation(self, module) -> HeldOutLoss:
        return HeldOutLoss(module)


SOURCE = DocumentSource


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
