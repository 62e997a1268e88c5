"""Fig. 4 left: losses of full fine-tuning, LoRA, PiSSA, DoRA, MiSS and balanced MiSS on real small models, at
the paper's and at its own best rate.

Equal parameters: MiSS has twice LoRA's rank, balanced MiSS one shard less than that for its row of the mean.
DoRA's magnitudes come on top.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from rwkv_miss import UserError

from .methods import LINEAR
from .results import Claim, PaperResult, Table
from .settings import option
from .training import PAPER_LR, WORDS, Outcome, Runs, Spread, below, rate, untouched
from .training import Settings as Training


@dataclasses.dataclass(frozen=True)
class Settings(Training):
    rank: tuple[int, ...] = option((8, 4), "LoRA's rank")
    systems: tuple[str, ...] = option(
        ("full", "lora", "pissa", "dora", "miss", "miss, balanced"), "what is compared"
    )


FULL = Settings()
TINY = Settings(
    tasks=("letters",), seeds=(0, 1), steps=(2,), rows=(4,), train=(50,), held_out=(10,), rank=(4,), runs=""
)


def system(name: str, rank: int) -> tuple[str, dict[str, Any]]:
    """Return (method, options) with the parameters of LoRA of this rank, but for full fine-tuning."""
    if name == "full":
        return "none", {}
    if name == "miss, balanced":
        return "miss", {"rank": 2 * rank - 1, "shards": "balanced"}
    return name, {"rank": 2 * rank if name == "miss" else rank}


@dataclasses.dataclass(frozen=True)
class Measured:
    """A system on a task: trainings at the paper's rate and at the best one, one for each seed."""

    paper: list[Outcome]
    best_lr: float
    best: list[Outcome]


def measure(runs: Runs, task: str) -> tuple[dict[str, Measured], dict[str, str]]:
    """Return (system -> measured trainings, system -> reason why it does not fit the task's model)."""
    found, unfit = {}, {}
    for name in runs.settings.systems:
        method, options = system(name, runs.own(runs.settings.rank, task))
        try:
            exponent, best = runs.at_best_rate(task, method, options)
        except UserError as error:  # such as DoRA's for a weight with rows of zeros
            unfit[name] = str(error).partition(";")[0]
            continue
        found[name] = Measured(runs.at_rate(task, method, options, PAPER_LR), rate(exponent), best)
    return found, unfit


def table(
    task: str, before: list[float | None], systems: dict[str, Measured], unfit: dict[str, str], answers: bool
) -> Table:
    """Tabulate held-out losses, and for tasks with answers the shares of right tokens and right answers at
    the best rate.
    """
    columns = [
        "system",
        "parameters",
        f"at lr {PAPER_LR:g}",
        "best lr",
        "at the best lr",
        *(("right tokens", "right answers") if answers else ()),
    ]
    rows: list[list[Any]] = [
        [
            "untouched",
            0,
            f"{before[0]:.4f}",
            None,
            None,
            *(f"{share:.1%}" for share in before[1:] if share is not None),
        ]
    ]
    for name, m in systems.items():
        shares = [
            f"{spread.mean:.1%} ± {spread.sd:.1%}"
            for spread in (Spread.of(m.best, f"{kind}_right") for kind in ("tokens", "answers"))
        ]
        losses = [str(Spread.of(outcomes, "held_out")) for outcomes in (m.paper, m.best)]
        rows.append(
            [name, m.best[0].parameters, losses[0], f"{m.best_lr:g}", losses[1], *(shares if answers else ())]
        )
    without = "".join(f". Not {name}: {reason}" for name, reason in unfit.items())
    return Table(
        f"{task}: held-out loss, nats per token, mean ± standard deviation over the seeds{without}",
        columns,
        rows,
    )


def claims(found: dict[str, dict[str, Measured]]) -> list[Claim]:
    """Compare MiSS with every peer that was measured, task by task, and the balanced form with it."""

    def versus(name: str, peer: str, when: str) -> tuple[str, list[bool | None]]:
        both = {task: systems for task, systems in found.items() if {name, peer} <= systems.keys()}
        verdicts = [
            below(getattr(systems[name], when), getattr(systems[peer], when)) for systems in both.values()
        ]
        return (
            f"{peer}: "
            + ", ".join(
                f"{WORDS[verdict]} it on {task}" for task, verdict in zip(both, verdicts, strict=True)
            ),
            verdicts,
        )

    said = []
    names = {name for systems in found.values() for name in systems}
    peers = [name for name in ("lora", "pissa", "dora") if name in names and "miss" in names]
    for when, paper in (
        (
            "paper",
            f"LoRA and its variants converge slowly; MiSS's loss falls faster (all at lr {PAPER_LR:g})",
        ),
        ("best", "the same, each at its own best rate, which the paper does not look at"),
    ):
        texts, verdicts = (
            zip(*(versus("miss", peer, when) for peer in peers), strict=True) if peers else ((), ())
        )
        if peers:
            said.append(
                Claim(
                    paper,
                    "MiSS's held-out loss against " + "; ".join(texts),
                    all(v is True for each in verdicts for v in each),
                )
            )
    if {"miss", "miss, balanced"} <= set(names):
        text, verdicts = versus("miss, balanced", "miss", "best")
        said.append(
            Claim(
                "not the paper's: balanced shards make MiSS better",
                f"their held-out loss at the best rates against {text}",
                all(v is True for v in verdicts),
            )
        )
    return said


def draw(found: dict[str, dict[str, Measured]], figure) -> None:
    """Draw a row of plots at the paper's rate, and one at the best rates: running means of the training loss
    over the seeds.
    """
    figure.set_size_inches(4.2 * len(found), 7.5)
    grid = figure.subplots(2, len(found), squeeze=False)
    # a system has the same color in all plots, even if others are missing
    names = list(dict.fromkeys(name for systems in found.values() for name in systems))
    for column, (task, systems) in enumerate(found.items()):
        for row, when in enumerate(("paper", "best")):
            axis = grid[row][column]
            curves = {name: smoothed([o.losses for o in getattr(m, when)]) for name, m in systems.items()}
            for name, curve in curves.items():
                label = name if when == "paper" else f"{name}, {systems[name].best_lr:g}"
                axis.plot(curve, label=label, color=f"C{names.index(name)}", linewidth=1.2)
            if max(map(max, curves.values())) > 20 * min(map(min, curves.values())):
                axis.set_yscale("log")
            axis.set(
                title=f"{task}, {f'lr {PAPER_LR:g}' if when == 'paper' else 'each at its best lr'}",
                xlabel="step",
                ylabel="training loss",
            )
            axis.legend(fontsize="x-small")


def smoothed(curves: list[list[float | None]]) -> list[float]:
    """Average several curves; each value is a running mean over a tenth of the steps."""
    length = min(len(curve) for curve in curves)
    mean = [
        sum(curve[i] for curve in curves) / len(curves)
        for i in range(length)
        if all(curve[i] is not None for curve in curves)
    ]
    window = max(1, len(mean) // 10)
    return [sum(mean[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(mean))]


def figures_of(m: Measured) -> dict[str, Any]:
    """Return, for the JSON file, every training's outcome, and at most 101 points of the plotted curves."""
    described: dict[str, Any] = {"best_lr": m.best_lr}
    for when in ("paper", "best"):
        outcomes = getattr(m, when)
        curve = smoothed([o.losses for o in outcomes])
        described[when] = [dataclasses.asdict(dataclasses.replace(o, losses=[])) for o in outcomes]
        described[f"{when}_curve"] = [round(loss, 4) for loss in curve[:: -(-len(curve) // 100)]]
    return described


def run(settings: Settings) -> PaperResult:
    known = ("full", "miss, balanced", *LINEAR)
    if not {*settings.systems} <= {*known}:
        raise UserError(f"--systems takes any of: {'; '.join(known)}; got {'; '.join(settings.systems)}")
    runs = Runs(settings)
    measured = {task: measure(runs, task) for task in settings.tasks}
    found = {task: systems for task, (systems, _) in measured.items()}
    tables = [
        table(task, untouched(runs.tasks[task]), *measured[task], runs.tasks[task].answers)
        for task in settings.tasks
    ]
    figures = {task: {name: figures_of(m) for name, m in systems.items()} for task, systems in found.items()}
    return PaperResult(
        "Loss curves of six ways to fine-tune real small models (Fig. 4 left)",
        "shakespeare and gsm8k: English text, two tokens a character, to a 3M-parameter RWKV-6 trained on"
        " English; digits: a changed task to an RWKV-7 that reverses digits; letters: sorting to one that"
        " reverses letters (benchmarks/paper/training_tasks.py). AdamW, cosine to a tenth, no warm-up, clip"
        " 1, the same rows in the same order for all. The best rate is found by half decades on the held-out"
        " loss of the first seed; means within two standard errors count as level. Right tokens: share of"
        " answer tokens that are the likeliest after the right ones; right answers: greedy, as a whole.",
        claims(found),
        tables,
        lambda figure: draw(found, figure),
        {"trainings": figures},
    )
