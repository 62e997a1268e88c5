"""Choice of a run's kind of training."""

from __future__ import annotations

from ..config import Config
from .base import Objective
from .distillation import Distilled
from .on_policy.objective import OnOwnAnswers
from .preferences.objective import OnPreferences
from .rewards.objective import OnRewards
from .sft import Supervised


def objective_of(config: Config) -> Objective:
    """Return the objective of --loss."""
    if config.on_rewards:
        return OnRewards(config)
    if config.draws_answers:
        return OnOwnAnswers(config)
    if config.on_preferences:
        return OnPreferences(config)
    return Distilled(config) if config.has_teacher else Supervised(config)
