"""Optimizer: which tensors are trained at which learning rate, and its schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

import rwkv_miss
from rwkv_miss.options import most_specific

from ..common.moments import adamw_of_8_bits
from ..config import Settled
from .validation_log import no_better

PLATEAU = 0.5  # factor of the rate for each evaluation that is no better than one before
# --lr_schedule -> factor of the rate at a share of the steps after the warm-up; at their end it is `final`
SHAPES = {
    "cos": lambda share, final: final + (1 - final) * 0.5 * (1 + math.cos(math.pi * share)),
    "linear": lambda share, final: 1 - (1 - final) * share,
    "exp": lambda share, final: final**share,
    "wsd": lambda share, final: 1 - (1 - final) * max(share - 0.8, 0.0) / 0.2,
    "constant": lambda share, final: 1.0,
}


def learning_rate_factor(config: Settled, rate: float, total: int, history: Sequence[dict] = ()):
    """Return a function of the optimizer step, counted from 0: the factor of `rate`.

    It is a linear warm-up, then --lr_schedule. `plateau` is a function of the evaluations in `history` before
    the step's predecessor, so that a run that goes on after an evaluation has the rates of one that never
    stopped.
    """
    warmup, shape = config.warmup_steps, config.lr_schedule
    final = 0.1 if config.lr_final < 0 else config.lr_final / rate

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if shape == "plateau":
            known = [line for line in history if line["step"] < step]
            return max(final, PLATEAU ** sum(no_better(known)))
        return SHAPES[shape](min((step - warmup) / max(total - 1 - warmup, 1), 1.0), final)

    return factor


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    state_lr: float | None = None,
    lr_map: dict[str, float] | None = None,
) -> list[dict]:
    """Make RWKV-LM's groups of the optimizer, as rwkv_miss.parameter_groups() does.

    Rates: the base decay (v7 `att.w0`, v6 `att.time_decay`) learns at twice the rate, initial states at
    `state_lr` if it is given. `lr_map` multiplies the rates by parts of names: {"ffn": 0.5, "blocks.0": 2}.
    """

    def rate(name: str) -> float:
        own = 2 * lr if name.endswith(("att.w0", "att.time_decay")) else lr
        if state_lr is not None and name.endswith("att.time_state"):
            own = state_lr
        return own * most_specific(lr_map or {}, name, 1.0)

    return rwkv_miss.parameter_groups(model, rate, weight_decay)


def adamw(groups: list[dict], config: Settled, rate: float) -> torch.optim.Optimizer:
    """Make AdamW over the groups of parameter_groups(), with moments in fp32 or in 8 bits.

    On a GPU all tensors take one launch, not a dozen for each few. ZeRO has one flat tensor for a group, and
    offloaded it is on the CPU, where fused sums round differently from plain ones.
    """
    settings: dict = {"lr": rate, "betas": (config.beta1, config.beta2), "eps": config.adam_eps}
    if config.optimizer == "adamw8bit":
        return adamw_of_8_bits()(groups, **settings)
    fused = config.accelerator == "gpu" and not config.strategy.startswith("deepspeed")
    return torch.optim.AdamW(groups, fused=fused or None, **settings)
