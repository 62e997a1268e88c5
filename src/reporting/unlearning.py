"""The warning about a preference whose right answers get less likely while it is learnt."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ..config import Config
from ..model.preference_loss import WITH_REFERENCE
from ..objectives.loss_metrics import ACCURACIES, percent

WINDOW = 10  # steps that are looked at together
LEAST_FALL = 1.0  # nats by which log p of a chosen answer must fall
STANDARD_ERRORS = 3.0  # the fall must be larger than this many standard errors
LEAST_RISE = 0.05  # the accuracy must be above a half by this much


def unlearning_warning(config: Config, metrics: Sequence[dict]) -> str | None:
    """The warning about a run whose right answers get less likely while it prefers them; else None.

    `metrics` are the lines of its steps so far. What fell is smoothed over WINDOW steps. It fell from where
    the training began: the reference is that, unless it is another model or there is none. Then the first
    steps are taken for it, as answers differ by more than a training moves them.
    """
    own_start = is_own_start(config)
    first, last = metrics[:WINDOW], metrics[-WINDOW:]
    if len(metrics) < (WINDOW if own_start else 2 * WINDOW):
        return None
    share = _mean([accuracy(line) for line in last])
    before = [0.0, 0.0] if own_start else [_nats(config, line) for line in first]
    fell, by_chance = _fall(before, [_nats(config, line) for line in last])
    if not (fell > max(LEAST_FALL, STANDARD_ERRORS * by_chance) and share >= 0.5 + LEAST_RISE):
        return None
    begin = "before the training" if own_start else f"in steps {first[0]['step']} to {first[-1]['step']}"
    return (
        f"log p of a chosen answer is {fell:.1f} lower in steps {last[0]['step']} to {last[-1]['step']} than"
        f" {begin}, while the accuracy is {percent(share)}: the right answers get lost with the wrong ones"
    )


def accuracy(line: dict) -> float | None:
    """That against the reference, the raw one for a loss without one; None where it is not known."""
    return next((line[name] for name in ACCURACIES if line.get(name) is not None), None)


def is_own_start(config: Config) -> bool:
    """Tell whether the reference of a run is the model that it starts from."""
    return config.loss in WITH_REFERENCE and not config.reference


class UnlearningWatch:
    """unlearning_warning() after every step, said once. `before` are the lines of a run that goes on."""

    def __init__(self, config: Config, before: Iterable[dict]):
        self.config = config
        self.lines: list[dict] = []
        self.said = False
        for line in before:
            self.after(line)

    def after(self, line: dict) -> str | None:
        """The warning with what to do, if it is to be said after this step."""
        if "rolled_back_to" in line:
            return None
        self.lines.append(line)
        del self.lines[WINDOW:-WINDOW]  # what is between the windows tells nothing
        known = None if self.said else unlearning_warning(self.config, self.lines)
        self.said = self.said or known is not None
        return None if known is None else f"WARNING: {known}.\nTry {against_unlearning(self.config)}."


def held_out_unlearning(before: dict, after: dict) -> str | None:
    """The same of two evaluations, which are of the same documents."""
    share, start, end = accuracy(after), before.get("logp_chosen"), after.get("logp_chosen")
    if share is None or start is None or end is None:
        return None
    if start - end <= LEAST_FALL or share < 0.5 + LEAST_RISE:
        return None
    return (
        f"log p of a chosen answer fell on held-out data, from {start:.1f} to {end:.1f},"
        f" although the accuracy is {percent(share)}: the right answers get lost with the wrong ones"
    )


def against_unlearning(config: Config) -> str:
    """What to do about it."""
    if config.loss == "orpo":
        stronger = f"--orpo_lambda below {config.orpo_lambda:g}"
    else:
        usual = 1 / config.beta if config.loss == "ipo" else 1.0
        weight = f"{usual:.3g}" if config.sft_weight < usual else f"above {config.sft_weight:g}"
        stronger = f"--sft_weight {weight}, or a larger --beta than {config.beta:g}"
    return f"{stronger}, or a lower --lr_init than {config.lr_init:g}"


def _nats(config: Config, line: dict) -> float | None:
    """How likely the chosen answers of a step are, in nats an answer, against a reference, if any."""
    if config.loss not in WITH_REFERENCE or line.get("reward_chosen") is None:
        return None if is_own_start(config) else line.get("logp_chosen")
    nats = line["reward_chosen"] / config.beta
    # an averaged log p is of a token
    averaged = config.loss == "ipo" or config.loss_average == "mean"
    return nats * line["trained_tokens"] / (2 * line["units"]) if averaged else nats


def _fall(first: list[float | None], last: list[float | None]) -> tuple[float, float]:
    """By how much the mean fell, and the standard error of that."""
    means, errors = [], 0.0
    for values in (first, last):
        known = [value for value in values if value is not None]
        if len(known) < 2:
            return 0.0, math.inf
        middle = math.fsum(known) / len(known)
        errors += math.fsum((value - middle) ** 2 for value in known) / (len(known) - 1) / len(known)
        means.append(middle)
    return means[0] - means[1], math.sqrt(errors)


def _mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else 0.0
