"""What the lines of metrics.jsonl and validation.jsonl have beside the loss, and how it is told.

Each objective has one description: LossMetrics. The bar, the printed lines, the pictures, the
cards, run.json and the writers all follow it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple


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
