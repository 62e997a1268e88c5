"""Metrics in metrics.jsonl and validation.jsonl other than the loss, and their text.

Each loss has one description: LossMetrics. The bar, the printed lines, the pictures, the
cards, run.json and the writers all follow it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple


class Shown(NamedTuple):
    """Number in a bar or in a printed line: the first of `names` that a line has."""

    names: tuple[str, ...]
    text: Callable[[float], str]  # "" if there is nothing to say
    of: str = ""  # name of the whole that this number is a part of


class Panel(NamedTuple):
    """Part of the picture."""

    title: str
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class LossMetrics:
    """Metrics of a kind of loss, in the order of tables.

    `score` is the number by which evaluations are compared: the loss, or the training's goal instead. Then
    the loss of validation.jsonl is minus the score.
    """

    titles: dict[str, str]  # name in the files -> name in a table
    shares: tuple[str, ...] = ()  # metrics that are shown in percent
    faults: tuple[str, ...] = ()  # counts that a table leaves out if they are 0
    bar: tuple[Shown, ...] = ()  # a narrow terminal shows the first ones
    line: tuple[Shown, ...] = ()
    score: str = "loss"
    loss_of: str = "token"  # the loss is the mean over these
    nats: tuple[str, ...] = ()  # the number, if any, that is a cross entropy per token; and its name
    picture: str = ""  # the file with the panels; "": none
    panels: tuple[Panel, ...] = ()
    caption: str = ""  # caption of the picture
    heading: str = ""  # heading of the table of the training's metrics in the run card
    explanation: str = ""  # below that table

    @property
    def by_loss(self) -> bool:
        """Tell whether a state is judged by its loss."""
        return self.score == "loss"

    def fields(self, examples: float, metrics: dict[str, float]) -> dict[str, float | None]:
        """Return the entries of a line: the number of examples, and their metrics. A value that is not
        finite is None.

        A loss without metrics, such as sft, gets {}.
        """
        if not metrics:
            return {}
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        return {"units": round(examples), **finite}

    def known(self, line: dict) -> dict[str, float]:
        """Return the metrics that a line has a number for."""
        return {name: line[name] for name in self.titles if line.get(name) is not None}

    def numbers(self, kind: str, line: dict) -> dict[str, float]:
        """Return the metrics of a line as a Writer takes them: {"train/margin": 0.3}."""
        return {f"{kind}/{name}": value for name, value in self.known(line).items()}

    def rows(self, lines: Sequence[dict]) -> list[tuple[str, str, list[str]]]:
        """Return (name, title, values) of a table of these lines: each metric that one of them has."""
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
        """Write for a bar: "loss 0.523, accuracy 94%, margin 1.2"."""
        loss = "no loss" if line["loss"] is None else f"loss {line['loss']:.3f}"
        return ", ".join([loss] * self.by_loss + _said(self.bar, line))

    def evaluation_text(self, line: dict, with_score: bool = True) -> str:
        """Write for a printed line: "accuracy 94 %, margin 1.2"; "" in supervised training."""
        shown = [one for one in self.line if with_score or one.names != (self.score,)]
        return ", ".join(_said(shown, line))

    def step_text(self, line: dict, loss: float) -> str:
        """Write a step for a printed line; `loss` may be NaN, which is not in the line."""
        loss_part = f"loss {loss:.4f} per {self.loss_of}" if line["trained_tokens"] else "no loss"
        shown = [loss_part] * self.by_loss
        return ", ".join(shown + _said(self.line, line))

    def value_text(self, name: str, value: float | None) -> str:
        """Write a metric for a table."""
        if value is None:
            return "not measured"
        return percent(value) if name in self.shares else f"{value:.4g}"

    def score_text(self, line: dict) -> str:
        """Write the score of an evaluation."""
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
        """Compute the mean of each metric over the lines that have it."""
        found: dict[str, list[float]] = {}
        for line in lines:
            for name, value in self.known(line).items():
                found.setdefault(name, []).append(value)
        return {name: math.fsum(values) / len(values) for name, values in found.items()}

    def first_and_last(self, metrics: Sequence[dict]) -> tuple[dict[str, float], dict[str, float]]:
        """Compute the mean of each metric over the first tenth of the steps, and over the last one."""
        part = max(1, len(metrics) // 10)
        return self.mean(metrics[:part]), self.mean(metrics[-part:])


def _said(shown: Iterable[Shown], line: dict) -> list[str]:
    said = []
    for names, text, of in shown:
        values = [line[name] for name in names if line.get(name) is not None]
        said += [words + _of(line, of) for value in values[:1] if (words := text(value))]
    return said


def _of(line: dict, name: str) -> str:
    """Write " of 16" if a line has this number."""
    return f" of {line[name]:,}" if line.get(name) is not None else ""


def loss_text(line: dict) -> str:
    return "not finite" if line["loss"] is None else f"{line['loss']:.4f}"


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


# metric of greedy answers to held-out questions, which every loss has
RIGHT = {"right_answers": "right answers, greedy"}  # title of the share in tables
SHOWN = Shown(("right_answers",), lambda share: f"right answers {percent(share)}", of="asked")
BITS = {"bits_per_byte": "bits a byte"}  # metric of running text; its title in tables
SUPERVISED = LossMetrics(
    RIGHT | BITS,
    shares=(*RIGHT,),
    line=(SHOWN, Shown((*BITS,), lambda bits: f"{bits:.3f} bits a byte")),
    nats=("loss", "the loss"),
)
