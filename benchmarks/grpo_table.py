"""What benchmarks.grpo found: a table, a plot, and which targets were met."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

from src.common.formatting import counted

from .common import as_flags
from .paper.results import Table
from .trainings import mean, share

GREEDY, DRAWN = "greedy", "drawn"
# of every seed of `rewards`: the share of right greedy answers, CPU seconds, the share of time for drawing
RIGHT, CPU_SECONDS, DRAWING = 0.8, 120, 0.5


@dataclasses.dataclass(frozen=True)
class Case:
    """A kind of training: what it is rewarded for (nothing: it is supervised), its method and its rate."""

    name: str
    rewards: str = "exact=1,partial=1"
    method: str = "miss"
    rate: float | None = 3e-3  # None: the run finds one
    all_seeds: bool = False

    @property
    def flags(self) -> list[str]:
        flags = as_flags(loss="grpo", rewards=self.rewards) if self.rewards else as_flags(packing=0)
        return flags + (as_flags(lr_init=self.rate) if self.rate else [])


CASES = {
    case.name: case
    for case in (
        Case("rewards", all_seeds=True),
        Case("exact", "exact=1", all_seeds=True),
        Case("supervised", "", all_seeds=True),
        Case("supervised, found rate", "", rate=None),
        Case("too high", rate=3e-2),
        Case("rate 0.0015", rate=1.5e-3),
        Case("rate 0.005", rate=5e-3),
        Case("rate 0.01", rate=1e-2),
        Case("lora", method="lora"),
    )
}
COLOURS = {"rewards": "tab:blue", "exact": "tab:green", "supervised": "tab:orange", "too high": "tab:red"}


def groups(lines: Sequence[dict]) -> dict[str, list[dict]]:
    """The lines of the seeds by their case, in their order."""
    found: dict[str, list[dict]] = {}
    for line in lines:
        found.setdefault(line["case"], []).append(line)
    return found


def summary(lines: Sequence[dict]) -> dict[str, list[str]]:
    """Which targets of `rewards` were met by every seed that was measured, and which were missed."""
    found: dict[str, list[str]] = {"met": [], "missed": []}
    own = groups(lines).get("rewards", [])
    for name, reached in (
        ("right answers", [line[GREEDY] >= RIGHT for line in own]),
        ("CPU time", [line["cpu_seconds"] <= CPU_SECONDS for line in own]),
        ("drawing", [line["drawing"] <= DRAWING for line in own]),
    ):
        if own:
            kind = "met" if all(reached) else "missed"
            found[kind].append(f"{name} (by {sum(reached)} of {counted(len(own), 'seed')})")
    return found


def table(lines: Sequence[dict]) -> Table:
    """A row for each case: the mean of its seeds."""
    columns = ["case", "method", "rate", "seeds", "greedy", "drawn", "CPU s", "drawing", "dead groups"]
    columns += ["entropy", "largest gap"]
    rows = []
    for name, own in groups(lines).items():
        method = CASES[name].method if name in CASES else ""
        rate = f"{statistics.fmean(line['rate'] for line in own):.2g}" if "rate" in own[0] else ""
        seconds = f"{mean(own, 'cpu_seconds'):.0f}" if "cpu_seconds" in own[0] else ""
        last = [line["curves"] for line in own if "curves" in line]
        of_steps = ["", "", "", ""]
        if last:
            ends = {key: statistics.fmean(c[key][-1] for c in last) for key in ("dead_groups", "entropy")}
            gap = max(point for c in last for point in c["engine_gap_max"] if point is not None)
            of_steps = [f"{100 * mean(own, 'drawing'):.0f} %", f"{100 * ends['dead_groups']:.0f} %"]
            of_steps += [f"{ends['entropy']:.3f}", f"{gap:.0e}"]
        right = [share(own, GREEDY), share(own, DRAWN)]
        rows.append((name, method, rate, str(len(own)), *right, seconds, *of_steps))
    return Table(
        "The mean of the seeds; in brackets the lowest and the highest. Greedy, drawn: right answers."
        " Drawing: its share of the steps' time. Of the last ten steps: dead groups, of equal rewards, and"
        " entropy in nats a token. Largest gap: of ln p between the engine that draws and the training.",
        columns,
        rows,
    )


def draw(lines: Sequence[dict]):
    """A function that fills a figure: right answers of each case, and the curves of the steps."""
    found = groups(lines)

    def fill(figure) -> None:
        bars, *curves = figure.subplots(2, 2).flat
        for at, (name, own) in enumerate(found.items()):
            bars.bar(at, 100 * mean(own, GREEDY), 0.7, color=COLOURS.get(name, "tab:grey"), alpha=0.6)
            bars.plot([at] * len(own), [100 * line[GREEDY] for line in own], ".", color="black", markersize=4)
        bars.axhline(100 * RIGHT, linestyle=":", color="grey")
        bars.set(title="right greedy answers", ylim=(0, 104), ylabel="%")
        bars.set_xticks(range(len(found)), [name.replace(" ", "\n") for name in found], fontsize="x-small")
        shown = (
            ("reward_exact", "right drawn answers of a step"),
            ("entropy", "entropy, nats a token"),
            ("dead_groups", "share of dead groups"),
        )
        for axes, (key, title) in zip(curves, shown, strict=True):
            for name, colour in COLOURS.items():
                for number, line in enumerate(found.get(name, [])):
                    if key in line.get("curves", {}):
                        points = line["curves"][key]
                        steps = [(i + 0.5) * line["steps"] / len(points) for i in range(len(points))]
                        axes.plot(steps, points, color=colour, linewidth=1, label=None if number else name)
            axes.set(title=title, xlabel="step")
            axes.set_ylim(bottom=0)
        curves[0].legend(fontsize="small")

    return fill
