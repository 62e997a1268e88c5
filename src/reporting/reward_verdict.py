"""What came of a training on rewards: what got better, and what to worry about. Functions of logs alone."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import Config
from ..objectives.loss_metrics import metrics_of, percent
from ..training.validation_log import base_wins, evaluation_at
from .collapse import again, bounds, course_of, findings
from .verdict import Doubt

JUDGES = ("exact", "number", "boxed", "math_verify")  # rewards that are 1 for a right answer, 0 for others
LITTLE = 0.02  # a reward that rises by a smaller share of its range has not risen


def what_came_of_it(config: Config, step: int, metrics: Sequence[dict], history: list[dict]) -> list[str]:
    """The changes of a run, a sentence each. `step` is that of the state which the run recommends."""
    first, last = metrics_of(config).first_and_last(metrics)
    said = []
    if words := held_out_words(config, step, history):
        said.append(f"greedy answers: {words}")
    parts = {"reward": "reward of drawn answers", "entropy": "entropy per token"}
    parts |= {"length": "tokens of an answer", "dead_groups": "share of groups that teach nothing"}
    for name, words in parts.items():
        if name in first and name in last:
            ends = [metrics_of(config).value_text(name, values[name]) for values in (first, last)]
            said.append(f"{words}: {' to '.join(ends)}")
    if "kl" in last:
        said.append(f"KL to the reference at the end: {last['kl']:.3g} per token")
    return said


def held_out_words(config: Config, step: int, history: list[dict]) -> str:
    """What became of the held-out questions up to the state of a step; "" if it is not known.

    "right 38.5 % to 98.5 % of 200 held-out questions; reward 1.19 to 1.98 of at most 2"
    """
    if not (change := held_out_change(step, history)):
        return ""
    before, after = evaluation_at(history, 0), evaluation_at(history, step)
    ends, count = bounds(config), f"{before['units']:,} held-out questions"
    reward = f"reward {_moved(*change)}" + (f" of at most {ends[1]:g}" if ends else "")
    for name in JUDGES:
        shares = [line.get(f"reward_{name}") for line in (before, after)]
        if name in config.rewards and None not in shares:
            return f"right {' to '.join(map(percent, shares))} of {count}; {reward}"
    return f"{reward}, on {count}"


def reward_doubt(config: Config, step: int, metrics: Sequence[dict], history: list[dict]) -> Doubt | None:
    """What speaks against a run, now or in the end of its training; None where nothing does."""
    course = course_of(config, metrics)
    found = findings(config, course) if course else []
    known, tries = [], []
    risen = has_risen(config, step, metrics, history)
    if not risen:
        known.append(_not_risen(config, step, metrics, history))
    for finding in found:
        # a set that is learnt speaks for a run, unless it was known before
        if not (finding.good and risen):
            known.append(finding.known)
            tries += finding.tries
    if not known:
        return None
    if base_wins(history):
        known.append("nothing that this run wrote is better than its base")
        tries.insert(0, again(config))
    # many findings have the same remedy, alone or within another
    others = [one for one in dict.fromkeys(tries) if not any(one in more and one != more for more in tries)]
    return Doubt(known, ", or ".join(others) or _other_settings(config))


def held_out_change(step: int, history: list[dict]) -> tuple[float, float] | None:
    """(reward before the training, that of the state of a step) on held-out questions; None if not known."""
    before, after = evaluation_at(history, 0), evaluation_at(history, step)
    if not (before and after) or before["reward"] is None or after["reward"] is None:
        return None
    return before["reward"], after["reward"]


def has_risen(config: Config, step: int, metrics: Sequence[dict], history: list[dict]) -> bool:
    """Whether the reward is higher than before; that of the drawn answers where nothing was held out."""
    before, after = _change(config, step, metrics, history)
    ends = bounds(config)
    return after - before > LITTLE * (ends[1] - ends[0] if ends else abs(before))


def _change(config: Config, step: int, metrics: Sequence[dict], history: list[dict]) -> tuple[float, float]:
    if change := held_out_change(step, history):
        return change
    first, last = metrics_of(config).first_and_last(metrics)
    return first.get("reward", 0.0), last.get("reward", 0.0)


def _not_risen(config: Config, step: int, metrics: Sequence[dict], history: list[dict]) -> str:
    before, after = _change(config, step, metrics, history)
    answers = "held-out questions" if held_out_change(step, history) else "the training's own questions"
    word = "has not learnt: the reward on" if after <= before else "has learnt next to nothing: the reward on"
    verb = "fell" if after < before else "went"
    return f"the run {word} {answers} {verb} from {before:.4g} to {after:.4g}"


def _other_settings(config: Config) -> str:
    return (
        f"more steps (--epoch_count above {config.epoch_count}), another --lr_init than {config.lr_init:g},"
        f" a larger --group_size than {config.group_size}, or a reward that gives a part (partial)"
    )


def _moved(before: float, after: float) -> str:
    return f"{before:.4g} to {after:.4g}"
