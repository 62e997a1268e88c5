"""What the lines of metrics.jsonl and validation.jsonl have beside the loss where a preference is trained."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

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


def bar_text(line: dict) -> str:
    """For a bar: "loss 0.52 acc 94% margin 1.2"."""
    share, margin = accuracy(line), line.get("margin")
    said = "no loss" if line["loss"] is None else f"loss {line['loss']:.2g}"
    said += "" if share is None else f" acc {share:.0%}"
    return said if margin is None else f"{said} margin {margin:.2g}"


def metrics_text(line: dict) -> str:
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


def metrics_of(line: dict) -> dict[str, float]:
    """The metrics of one line."""
    return {name: line[name] for name in NAMES if line.get(name) is not None}
