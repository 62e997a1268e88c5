"""The settings of a pass as the model takes them: chunks and dtypes."""

from __future__ import annotations

import torch

from ..common.device import PRECISIONS
from ..config import Config
from .batch_loss import Chunks


def chunks_of(config: Config) -> Chunks:
    """Return the chunks in which rows are run."""
    return Chunks(config.chunk_ctx, config.truncate_ctx, config.state_cp)


def dtype_of(config: Config) -> torch.dtype | None:
    """Return the dtype that full training computes in, on parameters in fp32. None for an adapter: the
    base's.

    It is the model's `computes_in`. There is no torch.autocast: it would decide for each operator, and return
    fp32 from some on a GPU, so that all after them is fp32.
    """
    return PRECISIONS[config.precision] if config.peft == "none" else None


def dtype_of_base(config: Config, dtype: torch.dtype) -> torch.dtype | None:
    """Choose the dtype in which a base is read: full training keeps fp32, because everything is trained.

    None: the file's dtype, as quantise() converts the other tensors.
    """
    if config.quant != "none":
        return None
    return dtype if config.adapter else torch.float32
