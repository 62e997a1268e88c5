"""State tuning: training of the WKV state that every document starts from, and of nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from .. import adapter
from ..adapter import About, AdapterMethod, register
from ..errors import UserError
from ..targets import Target
from .whole_tensors import add_states, state_names, train_whole


@dataclasses.dataclass(frozen=True)
class Options(adapter.NoOptions):
    """Options of state tuning: none. The model decides the size of a state."""


@register("state")
class StateTuning(AdapterMethod):
    """S_0 of every layer = `blocks.i.att.time_state` (H, N, N), fp32, zero or the base's own at the start."""

    about = About("state", "none: the initial WKV state, (heads, N, N) a layer", start="0")
    Options = Options
    adapts_linears = False
    default_lr = 1e-2

    @classmethod
    def first_rate(cls, layers: int, width: int, options: Any) -> float:
        """Return a constant: the WKV's output is normalised, so the model's sizes do not matter."""
        return 1.0

    @classmethod
    def attach(cls, model: nn.Module, targets: dict[str, Target], options: Any) -> None:
        if not state_names(model):
            raise UserError(
                "no layer of this model takes an initial state; state tuning is for RWKV-6 and RWKV-7"
            )
        add_states(model)
        for name in state_names(model):
            train_whole(model, name)
