"""What the lines of metrics.jsonl and validation.jsonl have beside the loss where a preference is trained."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ..config import Config

# the names in the files, and what they are called in a table
NAMES = {
    "reward_accuracy": "reward accuracy",
    "raw_accuracy": "raw accuracy",
    "margin": "margin of the rewards",
    "reward_chosen": "reward of the chosen answer",
    "reward_rejected": "reward of the rejected answer",
    "logp_chosen": "log p of the chosen answer, nats",
    "logp_rejected": "log p of the rejected answer, nats",
    "nll": "NLL of the chosen answer, nats per token",
    "kl": "KL to the reference on the answers, nats per token, estimated",
    "baseline": "KTO's baseline, nats",
}
ACCURACIES = ("reward_accuracy", "raw_accuracy")
# The warning about the right answers looks at so many steps at a time. Log p has to fall by more than the
# nats and by more than chance, as standard errors tell, and the accuracy has to be above a half by the share.
WINDOW, NATS, ERRORS, RISE = 10, 1.0, 3.0, 0.05


def fields(units: float, metrics: dict[str, float]) -> dict[str, float | None]:
    """What a line gets: how many pairs (under KTO answers) it is about, and their metrics.

    Nothing without metrics, which supervised training does not have. What is not finite is None.
    """
    if not metrics:
        return {}
    finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    return {"units": round(units), **finite}


def numbers(kind: str, line: dict) -> dict[str, float]:
    """The metrics of a line that are known, as a Writer takes them: {"train/margin": 0.3}."""
    return {f"{kind}/{name}": line[name] for name in NAMES if line.get(name) is not None}


def is_preference(line: dict) -> bool:
    """Whether a line has more than a loss."""
    return any(name in line for name in NAMES)


def accuracy(line: dict) -> float | None:
    """That against the reference, the raw one for a loss without one; None where it is not known."""
    return next((line[name] for name in ACCURACIES if line.get(name) is not None), None)


def short(line: dict) -> str:
    """For a bar: "loss 0.52 acc 94% margin 1.2"."""
    share, margin = accuracy(line), line.get("margin")
    said = "no loss" if line["loss"] is None else f"loss {line['loss']:.2g}"
    said += "" if share is None else f" acc {share:.0%}"
    return said if margin is None else f"{said} margin {margin:.2g}"


def words(line: dict) -> str:
    """For a line: ", accuracy 94 %, margin 1.20, log p of the chosen -23.1"; "" in supervised training."""
    share, margin, chosen = accuracy(line), line.get("margin"), line.get("logp_chosen")
    said = "" if share is None else f", accuracy {percent(share)}"
    said += "" if margin is None else f", margin {margin:.3g}"
    return said if chosen is None else f"{said}, log p of the chosen {chosen:.1f}"


def value_text(name: str, value: float | None) -> str:
    """A metric in a table."""
    if value is None:
        return "not known"
    return percent(value) if name in ACCURACIES else f"{value:.4g}"


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def mean(lines: Iterable[dict]) -> dict[str, float]:
    """The mean of each metric over the lines that have it."""
    found: dict[str, list[float]] = {}
    for line in lines:
        for name in NAMES:
            if line.get(name) is not None:
                found.setdefault(name, []).append(line[name])
    return {name: math.fsum(values) / len(values) for name, values in found.items()}


def first_and_last(metrics: Sequence[dict]) -> tuple[dict[str, float], dict[str, float]]:
    """The mean of each metric over the first tenth of the steps, and over the last one."""
    part = max(1, len(metrics) // 10)
    return mean(metrics[:part]), mean(metrics[-part:])


def of_line(line: dict) -> dict[str, float]:
    """The metrics of one line."""
    return {name: line[name] for name in NAMES if line.get(name) is not None}


def unlearning(config: Config, metrics: Sequence[dict]) -> str | None:
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
    if not (fell > max(NATS, ERRORS * by_chance) and share >= 0.5 + RISE):
        return None
    begin = "before the training" if own_start else f"in steps {first[0]['step']} to {first[-1]['step']}"
    return (
        f"log p of the chosen answers is {fell:.1f} nats an answer lower in steps {last[0]['step']} to"
        f" {last[-1]['step']} than {begin}, while the accuracy is {percent(share)}: the right answers get"
        " lost with the wrong ones"
    )


def is_own_start(config: Config) -> bool:
    """Whether the reference of a run is the model that it starts from."""
    return config.loss in ("dpo", "ipo", "kto") and not config.reference


class UnlearningWatch:
    """unlearning() after every step of a run, said once. `before`: the lines of a run that goes on."""

    def __init__(self, config: Config, before: Iterable[dict]):
        self.config = config
        self.lines: list[dict] = []
        self.said = False
        for line in before:
            self.after(line)

    def after(self, line: dict) -> str | None:
        """The warning with what to do, if it is to be said after this step."""
        if not is_preference(line) or "rolled_back_to" in line:
            return None
        self.lines.append(line)
        del self.lines[WINDOW:-WINDOW]  # what is between the windows tells nothing
        known = None if self.said else unlearning(self.config, self.lines)
        self.said = self.said or known is not None
        return None if known is None else f"WARNING: {known}.\nTry {against_unlearning(self.config)}."


def held_out_unlearning(before: dict, after: dict) -> str | None:
    """The same of two evaluations, which are of the same documents."""
    share, start, end = accuracy(after), before.get("logp_chosen"), after.get("logp_chosen")
    if share is None or start is None or end is None:
        return None
    if start - end <= NATS or share < 0.5 + RISE:
        return None
    return (
        f"log p of the chosen answers fell on held-out data, from {start:.1f} to {end:.1f} nats an answer,"
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
    if line.get("kl") is None or line.get("reward_chosen") is None:
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
