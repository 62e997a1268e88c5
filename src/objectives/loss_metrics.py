"""What the lines of metrics.jsonl and validation.jsonl have beside the loss, and how it is told.

There is one description for each kind of loss: LossMetrics. The bar, the printed lines, the pictures, the
cards, run.json and the writers all follow it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from ..config import Config
from ..planning.step import unit_of


class Shown(NamedTuple):
    """A number in a bar or in a printed line: the first of `names` that a line has, in words."""

    names: tuple[str, ...]
    text: Callable[[float], str]  # "" where there is nothing to say
    of: str = ""  # the name of the number that this one is a part of


class Panel(NamedTuple):
    """A part of the picture."""

    title: str
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class LossMetrics:
    """The metrics of a kind of loss, in the order of tables.

    `score` is the number by which evaluations are compared: the loss, or what is trained in its place. Then
    the loss of validation.jsonl is minus the score.
    """

    titles: dict[str, str]  # name in the files -> what it is called in a table
    shares: tuple[str, ...] = ()  # metrics that are told in percent
    faults: tuple[str, ...] = ()  # counts that a table leaves out where they are 0
    bar: tuple[Shown, ...] = ()  # the first ones are there also in a narrow terminal
    line: tuple[Shown, ...] = ()
    score: str = "loss"
    loss_of: str = "token"  # what the loss is the mean of
    nats: tuple[str, ...] = ()  # which number, if any, is a cross entropy per token; and its name
    picture: str = ""  # the file with the panels; "": none
    panels: tuple[Panel, ...] = ()
    caption: str = ""  # of the picture
    heading: str = ""  # of the table of the training data in the run card
    explanation: str = ""  # below that table

    @property
    def by_loss(self) -> bool:
        """Whether the loss tells what a state is worth."""
        return self.score == "loss"

    def fields(self, units: float, metrics: dict[str, float]) -> dict[str, float | None]:
        """What a line gets: how many units it is about, and their metrics. What is not finite is None.

        Nothing without metrics, which supervised training does not have.
        """
        if not metrics:
            return {}
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        return {"units": round(units), **finite}

    def known(self, line: dict) -> dict[str, float]:
        """The metrics that a line has a number for."""
        return {name: line[name] for name in self.titles if line.get(name) is not None}

    def numbers(self, kind: str, line: dict) -> dict[str, float]:
        """The same as a Writer takes them: {"train/margin": 0.3}."""
        return {f"{kind}/{name}": value for name, value in self.known(line).items()}

    def rows(self, lines: Sequence[dict]) -> list[tuple[str, str, list[str]]]:
        """(name, title, values) of what a table tells of these lines: each metric that one of them has."""
        found = []
        for name, title in self.titles.items():
            values = [line.get(name) for line in lines]
            has_it = any(name in line for line in lines)
            if has_it and (name not in self.faults or any(values)):
                texts = [self.value_text(name, value) for value in values]
                if name in self.faults:
                    texts = [text + _of(line, "units") for text, line in zip(texts, lines, strict=True)]
                found.append((name, title, texts))
        return found

    def bar_text(self, line: dict) -> str:
        """For a bar: "loss 0.523, accuracy 94%, margin 1.2"."""
        loss = "no loss" if line["loss"] is None else f"loss {line['loss']:.3f}"
        return ", ".join([loss] * self.by_loss + _said(self.bar, line))

    def evaluation_text(self, line: dict, with_score: bool = True) -> str:
        """For a printed line: "accuracy 94 %, margin 1.2"; "" in supervised training."""
        shown = [one for one in self.line if with_score or one.names != (self.score,)]
        return ", ".join(_said(shown, line))

    def step_text(self, line: dict, loss: float) -> str:
        """What a printed line tells of a step; `loss` may be NaN, which the line has not."""
        told = f"loss {loss:.4f} per {self.loss_of}" if line["trained_tokens"] else "no loss"
        shown = [told] * self.by_loss
        return ", ".join(shown + _said(self.line, line))

    def value_text(self, name: str, value: float | None) -> str:
        """A metric in a table."""
        if value is None:
            return "not measured"
        return percent(value) if name in self.shares else f"{value:.4g}"

    def score_text(self, line: dict) -> str:
        """The score of an evaluation."""
        if self.by_loss:
            return loss_text(line)
        return "not known" if line[self.score] is None else f"{line[self.score]:.4f}"

    def score_of(self, loss: float | None) -> float | None:
        """Return the score of an evaluation of this loss, which is None where it is not finite."""
        return loss if self.by_loss or loss is None else -loss

    @property
    def in_summary(self) -> str:
        """Name the score of evaluations in run.json, as in validation_first or validation_reward_first."""
        return "validation" if self.by_loss else f"validation_{self.score}"

    def mean(self, lines: Iterable[dict]) -> dict[str, float]:
        """The mean of each metric over the lines that have it."""
        found: dict[str, list[float]] = {}
        for line in lines:
            for name, value in self.known(line).items():
                found.setdefault(name, []).append(value)
        return {name: math.fsum(values) / len(values) for name, values in found.items()}

    def first_and_last(self, metrics: Sequence[dict]) -> tuple[dict[str, float], dict[str, float]]:
        """The mean of each metric over the first tenth of the steps, and over the last one."""
        part = max(1, len(metrics) // 10)
        return self.mean(metrics[:part]), self.mean(metrics[-part:])


def _said(shown: Iterable[Shown], line: dict) -> list[str]:
    said = []
    for names, text, of in shown:
        values = [line[name] for name in names if line.get(name) is not None]
        said += [words + _of(line, of) for value in values[:1] if (words := text(value))]
    return said


def _of(line: dict, name: str) -> str:
    """ " of 16" where a line has this number."""
    return f" of {line[name]:,}" if line.get(name) is not None else ""


def loss_text(line: dict) -> str:
    return "not finite" if line["loss"] is None else f"{line['loss']:.4f}"


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


SUPERVISED = LossMetrics({}, nats=("loss", "the loss"))

ACCURACIES = ("reward_accuracy", "raw_accuracy")  # the raw one for a loss without a reference

PREFERENCES = LossMetrics(
    {
        "reward_accuracy": "reward accuracy",
        "raw_accuracy": "raw accuracy",
        "margin": "margin of the rewards",
        "reward_chosen": "reward of the chosen answer",
        "reward_rejected": "reward of the rejected answer",
        "logp_chosen": "log p of the chosen answer",
        "logp_rejected": "log p of the rejected answer",
        "nll": "NLL of the chosen answer, per token",
        "kl": "KL to the reference on a few answers, per token",
        "baseline": "KTO's baseline",
    },
    shares=ACCURACIES,
    bar=(
        Shown(ACCURACIES, lambda share: f"accuracy {share:.0%}"),
        Shown(("margin",), lambda margin: f"margin {margin:.2g}"),
    ),
    line=(
        Shown(ACCURACIES, lambda share: f"accuracy {percent(share)}"),
        Shown(("margin",), lambda margin: f"margin {margin:.3g}"),
        Shown(("logp_chosen",), lambda nats: f"log p of a chosen answer {nats:.1f}"),
        Shown(("kl",), lambda nats: f"KL {nats:.3g} per token"),
    ),
    loss_of="pair",
    nats=("nll", "the loss of the chosen answers"),
    picture="preferences.png",
    panels=(
        Panel("rewards", ("reward_chosen", "reward_rejected", "margin")),
        Panel("accuracy", ACCURACIES),
        Panel("log p of an answer", ("logp_chosen", "logp_rejected")),
        Panel("per token", ("nll", "kl")),
    ),
    caption="rewards, accuracies, log p and KL over the steps",
    heading="Preferences, of the training data",
    explanation=(
        "An accuracy is the share of pairs whose chosen answer wins: by its reward, which is against the"
        " reference, or, raw, by its own log p. A high one alone proves nothing: the chosen answers"
        " should not get less likely."
    ),
)


def reward_metrics(names: Iterable[str]) -> LossMetrics:
    """Those of answers that the model draws, and that are scored by these rewards."""
    each = {f"reward_{name}": f"reward: {name}, without its weight" for name in names}
    return LossMetrics(
        {
            "reward": "reward of an answer",
            **(each if len(each) > 1 else {}),
            "reward_std": "its spread in a group",
            "dead_groups": "groups of equal rewards, which teach nothing",
            "failed_groups": "groups whose reward failed",
            "failed": "answers whose reward failed",
            "length": "length of an answer, tokens",
            "cut": "answers cut at --max_tokens",
            "entropy": "entropy per token",
            "kl": "KL to the reference per token, estimated",
            "clip": "tokens that are clipped",
            "engine_gap": "log p of training and engine, mean difference",
            "engine_gap_max": "the same, largest",
            "draw_seconds": "drawing, seconds",
            "draw_tokens_per_second": "drawing, tokens/s",
            "train_tokens_per_second": "training, tokens/s",
        },
        shares=("dead_groups", "cut", "clip"),
        faults=("failed_groups", "failed"),
        bar=(
            Shown(("reward",), lambda reward: f"reward {reward:.2f}"),
            Shown(("dead_groups",), lambda share: f"equal rewards {share:.0%}"),
            Shown(("entropy",), lambda nats: f"entropy {nats:.2f}"),
        ),
        line=(
            Shown(("reward",), lambda reward: f"reward {reward:.3f}"),
            Shown(("dead_groups",), lambda share: f"groups of equal rewards {percent(share)}"),
            Shown(("length",), lambda tokens: f"length {tokens:.4g} tokens"),
            Shown(("cut",), lambda share: f"cut at --max_tokens {percent(share)}"),
            Shown(("entropy",), lambda nats: f"entropy {nats:.3g} per token"),
            Shown(("kl",), lambda nats: f"KL {nats:.3g} per token"),
            Shown(
                ("failed", "failed_groups"),
                lambda count: f"rewards failed {count:.0f}" if count else "",
                of="units",
            ),
        ),
        score="reward",
        picture="rewards.png",
        panels=(
            Panel("reward", ("reward", *(each if len(each) > 1 else ()))),
            Panel("share", ("dead_groups", "cut", "clip")),
            Panel("length of an answer (tokens)", ("length",)),
            Panel("per token", ("entropy", "kl")),
        ),
        caption="reward, groups of equal rewards, length, entropy and KL over the steps",
        heading="Drawn answers, of the training data",
        explanation=(
            "A group is the answers to one question. Where all get the same reward it teaches nothing: they"
            " are all right, or all wrong. So a model that has learnt all and one that is lost look alike"
            " but for their reward. An entropy near 0 means that the model has stopped trying anything else."
        ),
    )


def metrics_of(config: Config) -> LossMetrics:
    """The metrics of a run, once its settings are filled in."""
    if config.on_rewards:
        return reward_metrics(config.rewards)
    if config.loss == "sft":
        return SUPERVISED
    return dataclasses.replace(PREFERENCES, loss_of=unit_of(config))
