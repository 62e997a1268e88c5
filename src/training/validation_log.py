"""Validation log: a run's evaluations in validation.jsonl, the best one, and when to stop."""

from __future__ import annotations

import math
import os

from ..common.files import read_lines
from ..config import Settled
from ..losses.metrics import LossMetrics
from .run_folder import METRICS

VALIDATION, BEST = "validation.jsonl", "best.pth"
FLAT = 1e-3  # a loss that falls by a smaller share falls no further
BY_HEART = 1 / 100  # share of the first step's loss that is left when the data are known by heart


def best(history: list[dict]) -> dict | None:
    """Return the evaluation with the most right answers, of equal ones the one with the lowest loss, and the
    first of these. The one before training counts.

    None where no loss is finite.
    """
    finite = (line for line in history if line["loss"] is not None)
    return min(finite, key=lambda line: (-right_answers(line), line["loss"]), default=None)


def right_answers(line: dict) -> float:
    """Return the share of right answers of an evaluation; 0 where none are counted, or rewards decide."""
    return 0.0 if "reward" in line else line.get("right_answers", 0.0)


def best_trained(history: list[dict]) -> dict | None:
    """Return the evaluation of the state in best.pth; None where no state beats that before the training."""
    top = best(history)
    return top if top and top["step"] else None


def base_wins(history: list[dict]) -> bool:
    """Tell whether the training made the model worse: there is no best.pth, and the last state is worse.

    A reward that is not known says nothing of a state.
    """
    top = best(history)
    if top is None or top["step"]:
        return False
    last = history[-1]
    not_known = "reward" in last and last["reward"] is None
    return not not_known and is_worse(top, last)


def is_worse(before: dict, after: dict) -> bool:
    """Tell whether the held-out loss rose, or is not finite."""
    if after["loss"] is None:
        return True
    return before["loss"] is not None and after["loss"] > before["loss"]


def no_better(history: list[dict]) -> list[bool]:
    """Tell of each evaluation whether it was no better than one before.

    Better is a loss that is lower by more than FLAT of the one before the training, or more right answers.
    """
    lowest, most, found = math.inf, 0.0, []
    for line in history:
        loss, right = math.inf if line["loss"] is None else line["loss"], right_answers(line)
        is_lower = line["step"] == 0 or loss < lowest - FLAT * abs(history[0]["loss"] or 0.0)
        found.append(not (is_lower or right > most))
        lowest, most = loss if is_lower else lowest, max(most, right)
    return found


def is_over(history: list[dict], early_stop: int) -> bool:
    """Tell whether the last `early_stop` evaluations were no better than one before (0: never)."""
    return 0 < early_stop <= len(history) and all(no_better(history)[-early_stop:])


def learns_by_heart(config: Settled) -> bool:
    """Tell whether the training loss ends a run early, because nothing is held out."""
    is_blind = not config.eval_file and not config.eval_split
    return is_blind and config.early_stop > 0


def may_know_by_heart(config: Settled, step: int, total: int) -> bool:
    """Tell whether a step is the end of a pass, after which the training loss may end the run early."""
    return learns_by_heart(config) and step % (total // config.epoch_count) == 0


def is_known_by_heart(config: Settled, step: int, total: int) -> bool:
    """Tell whether a run of at most `total` steps knew its data by heart in the pass that this step ends."""
    if not may_know_by_heart(config, step, total):
        return False
    losses = [line["loss"] for line in read_lines(os.path.join(config.proj_dir, METRICS), step)]
    last = [loss for loss in losses[-(total // config.epoch_count) :] if loss is not None]
    return bool(last) and losses[0] is not None and sum(last) <= BY_HEART * len(last) * losses[0]


def evaluation_at(history: list[dict], step: int) -> dict | None:
    """Find the evaluation of the state of a step; None if it was not evaluated."""
    return next((line for line in history if line["step"] == step), None)


def any_right(line: dict) -> bool:
    """Tell whether one of an evaluation's sample answers is right."""
    return any(sample["answer"] == sample["right"] for sample in line["samples"])


def describe(history: list[dict], total: int, metrics: LossMetrics) -> list[str]:
    """Describe the newest evaluation: its score, the best score, and the samples, a line each."""
    line, top = history[-1], best(history)
    unit = f" per {metrics.loss_of}" if metrics.by_loss else ""
    said = [f"validation {metrics.score} {metrics.score_text(line)}{unit}"]
    if top is line and line["step"]:
        said.append("the best so far")
    elif top and top is not line:
        when = f"at step {top['step']}" if top["step"] else "before training"
        said.append(f"best {metrics.score_text(top)} {when}")
    said.append(metrics.evaluation_text(line, with_score=False))
    return [
        f"step {line['step']}/{total} {', '.join(filter(None, said))}",
        *map(_sample_text, line["samples"]),
    ]


def _sample_text(sample: dict) -> str:
    reward = "" if sample.get("reward") is None else f", reward {sample['reward']:.3g}"
    return f"    | {_end(sample['prompt'])!r} -> {sample['answer'][:100]!r}{reward}"


def _end(text: str, length: int = 60) -> str:
    return text if len(text) <= length else f"...{text[-length:]}"
