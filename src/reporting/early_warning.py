"""What a run says while it can still be stopped, of how its kind of loss goes wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..config import Config
from .collapse import CollapseWatch
from .unlearning import UnlearningWatch


def early_warning(config: Config, before: Iterable[dict]) -> Callable[[dict], str | None]:
    """A function of each line of metrics.jsonl in turn: the warning to say after that step, if any.

    `before` are the lines of a run that goes on.
    """
    if config.loss == "sft":
        return lambda line: None
    if config.on_rewards:
        return CollapseWatch(config, before).after
    return UnlearningWatch(config, before).after
