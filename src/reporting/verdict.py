"""Whether a run has learnt, and what to try where it has not: pure functions of its logs and settings."""

from __future__ import annotations

import math
from typing import NamedTuple

from ..config import Config
from ..config.schema import PUBLISHED
from ..objectives.loss_metrics import loss_text, percent
from ..planning.draft import CHOSEN
from ..training.validation_log import all_right, answers_as_before, evaluation_at, is_worse
from .preference_text import held_out_units
from .unlearning import accuracy, against_unlearning, held_out_unlearning, unlearning_warning

LITTLE = 0.02  # a loss that falls by a smaller share has not fallen
CLEARLY = 0.1  # a loss above others by this share has risen, whatever rows it is from
FAR = 0.5  # by which share it is above that of the first step alone, which is of a few rows


class Doubt(NamedTuple):
    """Why a run counts as one that has not learnt."""

    known: list[str]  # a sentence each
    advice: str  # what to try next


def doubt(
    config: Config, origin: str, searched: bool, step: int, metrics: list[dict], history: list[dict]
) -> Doubt | None:
    """What speaks against a run; None for one that has learnt.

    `origin` is that of the learning rate, and `searched` whether the run searched for it. `step` is that of
    the state which the run recommends.
    """
    improving, too_fast = True, False
    if history:
        before, after = evaluation_at(history, 0), evaluation_at(history, step)
        if not (before and after):
            return None
        known = of_evaluations(before, after, held_out_units(config))
        improving = step == history[-1]["step"] and not is_worse(before, after)
        if is_worse(before, after):
            too_fast = has_risen(metrics, before)
            known += of_unhelpful(metrics, too_fast)
        lost = held_out_unlearning(before, after)
    else:
        too_fast = first_and_last(metrics)[1] > (1 + FAR) * metrics[0]["loss"]
        known = of_training(metrics, too_fast)
        lost = unlearning_warning(config, metrics)
    if not (known or lost):
        return None
    tries = [against_unlearning(config)] if lost else []
    if known and too_fast:
        tries.append(f"a lower --lr_init than {config.lr_init:g}")
    elif known:
        tries.append(other_settings(config, improving) if searched else other_rate(config, origin, improving))
    known += [lost] if lost else []
    advice = "; or ".join(tries)
    if not history:
        advice += "; --eval_split 0.1 holds documents out, which tell more"
    return Doubt(known, advice)


def of_evaluations(before: dict, after: dict, documents: str) -> list[str]:
    """What two evaluations of these documents say against a run: the loss, accuracy and sample answers."""
    said = []
    losses = f"from {loss_text(before)} to {loss_text(after)}"
    fell = _fall(before["loss"], after["loss"]) if before["loss"] and after["loss"] else 0.0
    if after["loss"] is None:
        said.append(f"the run has not learnt: the loss on {documents} is not finite")
    elif is_worse(before, after):
        said.append(f"the run has not learnt: the loss on {documents} rose {losses}")
    elif before["loss"] is not None and fell < LITTLE:
        said.append(
            f"the run has learnt next to nothing: the loss on {documents} fell by {_percent(fell)}, {losses}"
        )
    said += of_accuracy(after, documents)
    if answers_as_before(before, after):
        loss = f", although the loss on {documents} fell by {_percent(fell)}" if fell >= LITTLE else ""
        said.append(f"the sample answers are those of before the training{loss}")
    elif said and all_right(before):
        said.append(
            "the sample answers were right before the training, so the base may know the task already"
        )
    return said


def of_unhelpful(metrics: list[dict], too_fast: bool) -> list[str]:
    """Say how the training loss moved, where the held-out loss did not fall."""
    begin, (first, last) = metrics[0]["loss"], first_and_last(metrics)
    if too_fast:
        return [f"the training loss rose, too: from {begin:.4f} in the first step to {last:.4f} in the last"]
    # a loss that only comes back from what the first steps did has not fallen
    if last >= begin or (fell := _fall(first, last)) < LITTLE:
        return []
    return [f"only the training loss fell, by {_percent(fell)}: what was learnt does not help elsewhere"]


def has_risen(metrics: list[dict], before: dict) -> bool:
    """Tell whether the training loss ends clearly above both losses of the base.

    These are the loss of the first step, before a weight moved, and that on held-out documents. One of them
    alone may be of easier rows.
    """
    return first_and_last(metrics)[1] > (1 + CLEARLY) * max(metrics[0]["loss"], before["loss"] or 0.0)


def of_accuracy(line: dict, documents: str) -> list[str]:
    """What the accuracy of an evaluation says against a run: it is no more than that of a coin.

    Two standard errors are left to chance.
    """
    share = accuracy(line)
    if share is None or share > 0.5 + (chance := 1 / math.sqrt(line["units"])):
        return []
    count, may_be = f"{line['units']:,} {documents}", ", which may be chance"
    if share < 0.5 - chance:
        may_be = ": more steps or a higher rate may turn that round"
    if "baseline" in line:  # of kto
        return [f"{percent(share)} of {count} are on their side of the baseline{may_be}"]
    return [f"the chosen answer wins in {percent(share)} of {count}{may_be}"]


def of_training(metrics: list[dict], too_fast: bool) -> list[str]:
    """Say what the losses of the steps tell against a run of which nothing was held out.

    Their rows differ, so it is less than held-out documents would say. `too_fast`: the loss ends far above
    that of the first step, before a weight moved.
    """
    begin, (first, last) = metrics[0]["loss"], first_and_last(metrics)
    if too_fast:
        return [
            f"the run has made the model worse: the training loss rose from {begin:.4f} in the first step to"
            f" {last:.4f} in the last"
        ]
    if len(metrics) == 1:
        return ["one step is too few to tell whether the run has learnt"]
    fell = _fall(first, last)
    if fell >= LITTLE:
        return []
    part = max(1, len(metrics) // 10)
    steps = f"{part} steps" if part > 1 else "step"
    change = f"fell by {_percent(fell)}" if fell >= 0 else f"rose by {_percent(-fell)}"
    return [
        f"the run may have learnt nothing: the training loss {change}, from {first:.4f} in the first {steps}"
        f" to {last:.4f} in the last; no documents were held out, so no more is known"
    ]


def first_and_last(metrics: list[dict]) -> tuple[float, float]:
    """The mean training loss of the first tenth of the steps and of the last one."""
    part = max(1, len(metrics) // 10)
    losses = [line["loss"] for line in metrics]
    return sum(losses[:part]) / part, sum(losses[-part:]) / part


def other_rate(config: Config, origin: str, improving: bool) -> str:
    """What may help a run that did not search for its learning rate.

    `improving`: the run's end was its best, as far as is known.
    """
    rate = f"{config.lr_init:g}"
    if PUBLISHED in origin:
        return (
            f"--lr_init auto, which searches for the learning rate; {rate} is the published one of --peft"
            f" {config.peft}, and small models need more"
        )
    if origin.startswith(CHOSEN):
        why = origin.removeprefix(f"{CHOSEN}: ")
        passes = f"more passes (--epoch_count above {config.epoch_count}), or " if improving else ""
        return f"{passes}another --lr_init, which python -m scripts.lr_sweep finds; {rate} was chosen: {why}"
    return f"--lr_init auto, which searches for the learning rate; {rate} was given"


def other_settings(config: Config, improving: bool) -> str:
    """What may help a run that did; `improving` as above."""
    tries = [f"more passes (--epoch_count above {config.epoch_count})"] if improving else []
    tries.append("more data")
    if config.peft == "none":
        tries.append("an adapter (--peft miss)")
    elif config.adapter.gives_rank:
        tries.append("another rank (--peft_config) or method (--peft)")
    else:
        tries.append("another method (--peft)")
    if config.load_model:
        tries.append("a base that knows more of the task")
    return f"{', or '.join(tries)}; the learning rate was searched for already"


def _fall(first: float, last: float) -> float:
    """By which share of itself a loss fell; negative where it rose."""
    return (first - last) / first if first else 0.0


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
