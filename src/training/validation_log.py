"""The evaluations of a run, as validation.jsonl has them: which is the best, and when to stop."""

from __future__ import annotations

from typing import Any, NamedTuple

from .loss_metrics import LossMetrics

VALIDATION, BEST = "validation.jsonl", "best.pth"


class Evaluated(NamedTuple):
    """What an evaluation found."""

    loss: float  # lower is better; it may be not finite
    metrics: dict[str, float]  # beside it, by the names of LossMetrics
    units: float  # that it is the mean of
    tokens: int  # that were predicted or drawn
    samples: list[dict[str, Any]]  # prompt, answer, right, and of a training on rewards reward


def best(history: list[dict]) -> dict | None:
    """The evaluation of a trained state with the lowest loss, of equal ones the first.

    None before a trained state was evaluated.
    """
    return min(
        (line for line in history if line["step"] and line["loss"] is not None),
        key=lambda line: line["loss"],
        default=None,
    )


def is_over(history: list[dict], early_stop: int) -> bool:
    """Whether the last `early_stop` evaluations were no better than the best one before (0: never)."""
    top = best(history)
    since = sum(line["step"] > (top["step"] if top else 0) for line in history)
    return 0 < early_stop <= since


def evaluation_at(history: list[dict], step: int) -> dict | None:
    """The evaluation of the state of a step; None where that was not evaluated."""
    return next((line for line in history if line["step"] == step), None)


def answers_as_before(before: dict, after: dict) -> bool:
    """Whether the sample answers of two evaluations are the same word for word, and not all of them right."""
    answers = [[sample["answer"] for sample in line["samples"]] for line in (before, after)]
    return bool(answers[0]) and answers[0] == answers[1] and not all_right(before)


def all_right(line: dict) -> bool:
    """Whether an evaluation has sample answers, and all of them are right."""
    return bool(line["samples"]) and all(sample["answer"] == sample["right"] for sample in line["samples"])


def describe(history: list[dict], total: int, metrics: LossMetrics) -> list[str]:
    """The newest evaluation for the user: the score beside the best one, and the samples, a line each."""
    line, top = history[-1], best(history)
    unit = f" per {metrics.loss_of}" if metrics.by_loss else ""
    said = [f"validation {metrics.score} {metrics.score_text(line)}{unit}"]
    before = evaluation_at(history, 0)
    if top is line and before and before["loss"] is not None and line["loss"] > before["loss"]:
        side = "above" if metrics.by_loss else "below"
        said.append(f"{side} the {metrics.score_text(before)} before training")
    elif top is line:
        said.append("the best so far")
    elif top is not None:
        said.append(f"best {metrics.score_text(top)} at step {top['step']}")
    said.append(metrics.evaluation_text(line, with_score=False))
    return [
        f"step {line['step']}/{total} {', '.join(filter(None, said))}",
        *map(_sample_text, line["samples"]),
    ]


def _sample_text(sample: dict) -> str:
    reward = "" if sample.get("reward") is None else f", reward {sample['reward']:.3g}"
    return f"    | {_end(sample['prompt'])!r} -> {sample['answer'][:100]!r}{reward}"


def both_ends(text: str, characters: int) -> str:
    """A text of at most so many characters; of a longer one its begin and its end, where results stand."""
    if len(text) <= characters:
        return text
    half = (characters - 3) // 2
    return f"{text[:half]} … {text[-half:]}"


def _end(text: str, length: int = 60) -> str:
    return text if len(text) <= length else f"...{text[-length:]}"
