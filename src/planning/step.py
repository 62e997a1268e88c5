"""The settings of a step as the model takes them: rows in chunks, and the dtype of autocast."""

from __future__ import annotations

import torch

from ..common.device import PRECISIONS
from ..config import Config
from ..model.batch_loss import Chunks


def chunks_of(config: Config) -> Chunks:
    """How rows are cut into chunks."""
    return Chunks(config.chunk_ctx, config.truncate_ctx, config.state_cp)


def half_of(config: Config) -> torch.dtype | None:
    """The dtype of autocast in full training; None: compute in the parameters' dtypes."""
    autocast = config.peft == "none" and config.precision in ("bf16", "fp16")
    return PRECISIONS[config.precision] if autocast else None
