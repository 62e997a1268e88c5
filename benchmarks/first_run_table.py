"""What benchmarks.first_run found: the best given rate beside the one that was searched for."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from .paper.results import Table

POINTS, SHARE = 0.02, 0.03  # by which a case may be worse than the best: right answers, loss
Done = Mapping[tuple[int, float | str], dict]  # trainings by (seed, rate)


@dataclasses.dataclass(frozen=True)
class Case:
    """A task and a method. Figures are shares of right answers where `counted`, else losses.

    NaN is the figure of a run that diverged.
    """

    task: str
    method: str
    counted: bool
    seeds: list[int]
    best_rate: float
    best: float  # mean over the seeds
    found_rates: list[float]  # of each seed
    found: float  # mean over the seeds
    best_first: float  # with the first seed, as the next two
    guess_rate: float
    guess: float
    published: float
    found_first: float

    def gap(self, figure: float, best: float) -> float:
        """How much worse than the best a figure is, as a part of what is allowed; above 1 it is a miss."""
        gap = (best - figure) / POINTS if self.counted else (figure / best - 1) / SHARE
        return round(gap, 6)  # 0.995 - 0.975 is above 0.02

    @property
    def is_missed(self) -> bool:
        return not self.gap(self.found, self.best) <= 1  # so that NaN is a miss

    @property
    def is_worse_than_published(self) -> bool:
        if math.isnan(self.published):
            return False
        return not self.gap(self.found_first, self.published) <= 0


def case(task: str, method: str, counted: bool, seeds: Sequence[int], done: Done, best_rate: float) -> Case:
    """The case of these trainings."""

    def figure(rate: float | str, seed: int) -> float:
        found = done[seed, rate]["figure"]
        return math.nan if found is None else found

    first, own = seeds[0], [done[seed, "auto"] for seed in seeds]
    guess = own[0]["guess"]
    return Case(
        task,
        method,
        counted,
        list(seeds),
        best_rate,
        statistics.mean(figure(best_rate, seed) for seed in seeds),
        [line["found"] for line in own],
        statistics.mean(figure("auto", seed) for seed in seeds),
        figure(best_rate, first),
        guess,
        figure(guess, first),
        figure("paper", first),
        figure("auto", first),
    )


def table(cases: Sequence[Case]) -> Table:
    """A row for each case."""
    columns = ["task", "method", "best rate", "result", "found rates", "result ", "gap", "first guess"]
    columns += ["result  ", "published rate"]
    rows = []
    for one in cases:
        gap = one.gap(one.found, one.best) * (POINTS if one.counted else SHARE)
        missed = ", **missed**" if one.is_missed else ""
        rows.append(
            (
                one.task,
                one.method,
                f"{one.best_rate:g}",
                text(one, one.best),
                " ".join(f"{rate:g}" for rate in one.found_rates),
                text(one, one.found),
                f"{100 * gap:+.1f} {'points' if one.counted else '%'}{missed}",
                f"{one.guess_rate:.2g}",
                f"{text(one, one.guess)} ({text(one, one.best_first)})",
                text(one, one.published),
            )
        )
    return Table(
        "Results are right answers, or the loss in nats a token. Gap: how much worse the found rate is than"
        " the best. The first guess and the published rate have one seed; in brackets is what the best rate"
        " has with it.",
        columns,
        rows,
    )


def text(one: Case, figure: float) -> str:
    """A figure as it is printed."""
    return f"{100 * figure:.1f} %" if one.counted else f"{figure:.4f}"


def draw(cases: Sequence[Case]):
    """A function that fills a figure: each case's gap as a part of what is allowed."""

    def fill(figure) -> None:
        axes = figure.subplots()
        places = range(len(cases))
        series = {
            "searched for": [one.gap(one.found, one.best) for one in cases],
            "first guess (one seed)": [one.gap(one.guess, one.best_first) for one in cases],
            "published rate (one seed)": [one.gap(one.published, one.best_first) for one in cases],
        }
        for (name, gaps), mark in zip(series.items(), "ox+", strict=True):
            shown = [min(max(gap, -2.0), 8.0) for gap in gaps]
            axes.plot(places, shown, mark, label=name)
        axes.axhline(1, color="grey", linestyle=":", label="allowed: 2 points, or 3 % of the loss")
        axes.set(ylabel="gap to the best rate, 1: as allowed\n(above 8 shown as 8)")
        names = [f"{one.task} {one.method}" for one in cases]
        axes.set_xticks(list(places), names, rotation=75, fontsize="small")
        axes.legend(fontsize="small")

    return fill
