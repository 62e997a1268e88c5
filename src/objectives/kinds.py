"""Choice of the source of a run's examples."""

from __future__ import annotations

from ..config import Config
from ..losses import LOSSES
from .base import Objective
from .distillation import Distilled
from .on_policy.objective import OnOwnAnswers
from .preferences.objective import OnPreferences
from .rewards.objective import OnRewards
from .sft import Supervised

# (source of the loss, whether it needs a teacher) -> class that reads or draws its examples
KINDS = {
    ("documents", False): Supervised,
    ("documents", True): Distilled,
    ("pairs", False): OnPreferences,
    ("labels", False): OnPreferences,
    ("questions", False): OnRewards,
    ("questions", True): OnOwnAnswers,
}


def objective_of(config: Config) -> Objective:
    """Return the objective of --loss."""
    loss = LOSSES[config.loss]
    return KINDS[loss.source, loss.needs_teacher](config)
