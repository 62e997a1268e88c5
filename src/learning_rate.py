"""Learning rates: the method's own, and how one changes over a run."""

from __future__ import annotations

import math

from rwkv_miss.adapter import METHODS
from rwkv_miss.methods.whole_tensors import split_parts

from .config import Config


def state_learning_rate(config: Config) -> float | None:
    """The rate of an initial state beside an adapter; None where it is not trained, or is all that is, at
    lr_init.
    """
    if "state" not in split_parts(config.train_parts):
        return None
    return config.state_lr or METHODS["state"].default_lr


def learning_rate_factor(config: Config, total: int):
    """Factor of lr_init at optimizer step `step` (0-based): linear warm-up, then cos, constant or wsd down to
    lr_final.
    """
    final = 0.1 if config.lr_final < 0 else config.lr_final / config.lr_init

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        progress = min((step - config.warmup_steps) / max(total - 1 - config.warmup_steps, 1), 1.0)
        if config.lr_schedule == "cos":
            return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
        if config.lr_schedule == "wsd":
            return 1 - (1 - final) * max(progress - 0.8, 0.0) / 0.2
        return 1.0

    return factor
