"""What benchmarks.preferences found: a table, a plot, and which targets were met."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from src.common.formatting import counted

from .paper.results import Table
from .trainings import mean, share

ACCURACY = 0.95  # of rewards, in every seed
COLOURS = {"miss": "tab:blue", "lora": "tab:orange"}


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is trained for.

    `target` is the share of right answers that the task sort asks for, beside ACCURACY.
    """

    name: str
    flags: list[str]
    steps_factor: int  # times the steps of the task
    on_pairs: bool  # else on the chosen answers alone
    target: float | None = None


OBJECTIVES = {
    one.name: one
    for one in (
        Objective("dpo", ["--loss", "dpo"], 1, True, 0.7),
        Objective("dpo-without-nll", ["--loss", "dpo", "--sft_weight", "0"], 1, True),
        Objective("supervised", [], 1, False),
        Objective("orpo", ["--loss", "orpo"], 2, True, 0.8),
        Objective("supervised-twice", [], 2, False),
    )
}


def groups(lines: Sequence[dict]) -> dict[tuple[str, str, str], list[dict]]:
    """The lines of the seeds by (task, objective, method), in their order; bases have no method."""
    found: dict[tuple[str, str, str], list[dict]] = {}
    for line in lines:
        found.setdefault((line["task"], line["objective"], line["method"]), []).append(line)
    return found


def reached(task: str, objective: str, own: Sequence[dict]) -> int | None:
    """How many of the seeds reach the target; None where there is none."""
    target = OBJECTIVES[objective].target if objective in OBJECTIVES and task == "sort" else None
    if target is None:
        return None
    return sum(line["reward accuracy"] >= ACCURACY and line["right answers"] >= target for line in own)


def summary(lines: Sequence[dict]) -> dict[str, list[str]]:
    """Which targets were met by every seed that was measured, and which were missed."""
    found = {"met": [], "missed": []}
    for (task, objective, method), own in groups(lines).items():
        count = reached(task, objective, own)
        if count is not None:
            name = "met" if count == len(own) else "missed"
            found[name].append(f"{task} {objective} {method} ({count} of {counted(len(own), 'seed')})")
    return found


def table(lines: Sequence[dict]) -> Table:
    """A row for each task, objective and method: the mean of its seeds."""
    columns = ["task", "objective", "steps", "method", "found rates", "reward accuracy", "raw accuracy"]
    columns += ["chosen gained", "rejected gained", "right answers", "characters", "met by seeds"]
    rows = []
    for (task, objective, method), own in groups(lines).items():
        if objective == "base":
            start, rewards = ["base", "", "", ""], ["", share(own, "raw accuracy"), "", ""]
        else:
            rates = " ".join(f"{line['rate']:g}" for line in own)
            start = [objective, str(own[0]["steps"]), method, rates]
            gained = [f"{mean(own, f'gained by the {which}'):+.1f}" for which in ("chosen", "rejected")]
            rewards = [share(own, "reward accuracy"), share(own, "raw accuracy"), *gained]
        count = reached(task, objective, own)
        target = "" if count is None else f"{count} of {len(own)}"
        length = f"{mean(own, 'characters'):.1f}"
        rows.append((task, *start, *rewards, share(own, "right answers"), length, target))
    return Table(
        "The mean of the seeds, each with a rate; in brackets the lowest and the highest. Characters: of"
        " a greedy answer.",
        columns,
        rows,
    )


def draw(lines: Sequence[dict]):
    """A function that fills a figure: for each task a bar of right answers and a line of reward accuracy."""
    found = groups(lines)
    tasks = list(dict.fromkeys(task for task, _, _ in found))

    def fill(figure) -> None:
        for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
            names = [name for name in OBJECTIVES if any((task, name, method) in found for method in COLOURS)]
            for at, name in enumerate(names):
                for shift, (method, colour) in zip((-0.2, 0.2), COLOURS.items(), strict=True):
                    own = found.get((task, name, method), [])
                    if not own:
                        continue
                    axes.bar(at + shift, 100 * mean(own, "right answers"), 0.36, color=colour, alpha=0.6)
                    places = [at + shift] * len(own)
                    rights = [100 * line["right answers"] for line in own]
                    rewards = [100 * line["reward accuracy"] for line in own]
                    axes.plot(places, rights, ".", color="black", markersize=4)
                    axes.plot(places, rewards, "_", color=colour, markersize=16, markeredgewidth=2)
                target = OBJECTIVES[name].target
                if target is not None and task == "sort":
                    axes.plot([at - 0.42, at + 0.42], [100 * target] * 2, ":", color="grey")
            axes.set(title=task, ylim=(-3, 104), ylabel="%")
            axes.set_xticks(range(len(names)), [name.replace("-", "\n") for name in names], fontsize="small")
        for method, colour in COLOURS.items():
            axes.bar(0, 0, color=colour, alpha=0.6, label=f"{method}: right answers, a dot for each seed")
            axes.plot([], [], "_", color=colour, markersize=16, label=f"{method}: reward accuracy")
        axes.plot([], [], ":", color="grey", label="asked for: right answers")
        figure.legend(
            *axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small"
        )

    return fill
