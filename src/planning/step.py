"""The settings of a step as the model takes them: rows in chunks, and the dtype of its activations."""

from __future__ import annotations

import torch

from ..common.device import PRECISIONS
from ..config import Config
from ..model.batch_loss import Chunks
from ..model.preference_loss import PreferenceLoss


def chunks_of(config: Config) -> Chunks:
    """How rows are cut into chunks."""
    return Chunks(config.chunk_ctx, config.truncate_ctx, config.state_cp)


def preference_of(config: Config) -> PreferenceLoss | None:
    """The loss on preferences, once its settings are filled in; None with --loss sft."""
    if config.loss == "sft":
        return None
    return PreferenceLoss(
        config.loss,
        beta=config.beta,
        sft_weight=config.sft_weight,
        average=config.loss_average == "mean",
        label_smoothing=config.label_smoothing,
        gamma=config.simpo_gamma,
        orpo_lambda=config.orpo_lambda,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
    )


def dtype_of(config: Config) -> torch.dtype | None:
    """The dtype that full training computes in, on parameters in fp32. None: an adapter's, that of the base.

    It is the model's `computes_in`. There is no torch.autocast: it would decide for each operator, and return
    fp32 from some on a GPU, so that all after them is fp32.
    """
    return PRECISIONS[config.precision] if config.peft == "none" else None
