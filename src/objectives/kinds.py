"""Choice of a run's kind of training."""

from __future__ import annotations

from ..config import Config
from .base import Objective
from .preferences.objective import OnPreferences
from .rewards.objective import OnRewards
from .sft import Supervised


def objective_of(config: Config) -> Objective:
    """Return the objective of --loss."""
    if config.on_rewards:
        return OnRewards(config)
    return OnPreferences(config) if config.on_preferences else Supervised(config)
