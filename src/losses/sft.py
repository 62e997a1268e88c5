"""Cross entropy of the trained tokens: --loss sft."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..common.batch import Batch
from .base import DocumentLoss, Keep, register

if TYPE_CHECKING:
    from ..model.batch_loss import Chunks
    from ..model.rwkv import RWKV


@register
class Sft(DocumentLoss):
    name = "sft"
    about = "the cross entropy of the trained tokens"

    def __call__(self, model: RWKV, batch: Batch, chunks: Chunks, keep: Keep = None) -> tuple[Tensor, Tensor]:
        return self.held_out(model, batch, chunks)
