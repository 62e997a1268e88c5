"""Table 4: the effect of a higher rank of MiSS on trained and on unseen rows, compared with LoRA of as many
parameters.

Few rows are trained on several times, so that seen and unseen rows can differ. LoRA has half of MiSS's rank,
and so as many parameters.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from rwkv_miss import UserError

from .loss_curves import system
from .results import Claim, PaperResult, Table
from .settings import option
from .training import PAPER_LR, START, Outcome, Runs, Spread, below, rate
from .training import Settings as Training

PAPER = "GSM8K rises with the rank: 45.90, 46.18, 48.16, 53.49 for r = 16, 32, 64, 128 (Llama2-7B, one rate)"


@dataclasses.dataclass(frozen=True)
class Settings(Training):
    ranks: tuple[int, ...] = option(
        (4, 8, 16, 32, 64, 128), "MiSS's ranks; those above a model's width are left out"
    )


FULL = Settings(tasks=("gsm8k", "digits"), steps=(100, 300), train=(200, 1000))
TINY = Settings(
    tasks=("letters",),
    seeds=(0, 1),
    steps=(2,),
    rows=(4,),
    train=(12,),
    held_out=(10,),
    runs="",
    ranks=(2, 8),
)


@dataclasses.dataclass(frozen=True)
class Measured:
    """A method at a rank: trainings at its best rate, and for MiSS the first seed's at the paper's rate."""

    rank: int
    best_lr: float
    best: list[Outcome]
    paper: Outcome | None


def measure(runs: Runs, task: str, method: str) -> list[Measured]:
    """Measure a method at MiSS's ranks, rising. The search of a rate starts at the previous rank's best."""
    found, exponent = [], START
    for rank in runs.settings.ranks:
        if rank <= runs.tasks[task].arch.n_embd:
            _, options = system(method, rank // 2)
            exponent, best = runs.at_best_rate(task, method, options, exponent)
            paper = (
                runs.train(task, method, options, PAPER_LR, runs.settings.seeds[0])
                if method == "miss"
                else None
            )
            found.append(Measured(rank, rate(exponent), best, paper))
    return found


def table(task: str, miss: list[Measured], lora: list[Measured], answers: bool) -> Table:
    names = ["best lr", "seen", "unseen", *(["right answers"] if answers else [])]
    columns = [
        "r",
        "parameters",
        f"MiSS, unseen at lr {PAPER_LR:g}",
        *(f"{method}: {name}" for method in ("MiSS", "LoRA r/2") for name in names),
    ]
    rows = [
        [
            a.rank,
            a.best[0].parameters,
            "not finite" if a.paper.held_out is None else f"{a.paper.held_out:.4f}",
            *_cells(a, answers),
            *_cells(b, answers),
        ]
        for a, b in zip(miss, lora, strict=True)
    ]
    return Table(
        f"{task}: loss in nats per token on rows that were trained on and on held-out ones, mean ± standard"
        " deviation over the seeds",
        columns,
        rows,
    )


def _cells(m: Measured, answers: bool) -> list[Any]:
    shares = [f"{Spread.of(m.best, 'answers_right').mean:.1%}"] if answers else []
    return [f"{m.best_lr:g}", *(str(Spread.of(m.best, name)) for name in ("seen", "held_out")), *shares]


def claims(found: dict[str, dict[str, list[Measured]]]) -> list[Claim]:
    """Tell whether the held-out loss falls at every doubling of the rank, or rises at none, and the effect of
    more rank for MiSS and for LoRA.
    """
    said = []
    for task, methods in found.items():
        miss, lora = methods["miss"], methods["lora"]
        falls = [below(b.best, a.best) for a, b in zip(miss, miss[1:])]
        losses = ", ".join(f"{Spread.of(m.best, 'held_out').mean:.4f}" for m in miss)
        said.append(
            Claim(
                PAPER,
                f"{task}, each at its best rate: unseen loss {losses} for r ="
                f" {', '.join(str(m.rank) for m in miss)}; from one to the next it falls {falls.count(True)},"
                f" is level {falls.count(None)} and rises {falls.count(False)} times",
                below(miss[-1].best, miss[0].best) is True and False not in falls,
            )
        )
        fixed = [m.paper.held_out for m in miss]
        if None not in fixed:
            said.append(
                Claim(
                    PAPER,
                    f"{task}, all at lr {PAPER_LR:g}: {', '.join(f'{loss:.4f}' for loss in fixed)}",
                    fixed == sorted(fixed)[::-1],
                )
            )
        wins = [below(a.best, b.best) for a, b in zip(miss, lora, strict=True)]
        said.append(
            Claim(
                "MiSS is better than LoRA with as many parameters (Table 3)",
                f"{task}, each at its best rate: its unseen loss is lower at {wins.count(True)}, level at"
                f" {wins.count(None)}, higher at {wins.count(False)} of {len(wins)} ranks",
                all(wins),
            )
        )
    return said


def draw(found: dict[str, dict[str, list[Measured]]], figure) -> None:
    """Draw loss over rank for each task: seen dashed, unseen with its spread."""
    for axis, (task, methods) in zip(
        figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True
    ):
        for color, (method, measured) in zip(("C0", "C1"), methods.items(), strict=True):
            seen, unseen = ([Spread.of(m.best, name) for m in measured] for name in ("seen", "held_out"))
            x = [m.rank for m in measured]
            axis.errorbar(
                x,
                [s.mean for s in unseen],
                [0 if len(m.best) < 2 else s.sd for m, s in zip(measured, unseen)],
                marker="o",
                color=color,
                label=f"{method}, unseen",
            )
            axis.plot(x, [s.mean for s in seen], "--", color=color, label=f"{method}, seen")
        axis.set(xscale="log", xlabel="MiSS's rank (LoRA: half)", ylabel="loss (nats per token)", title=task)
        axis.set_xticks(x, map(str, x))
        axis.minorticks_off()
        axis.legend(fontsize="small")


def figures_of(m: Measured) -> dict[str, Any]:
    """Return all figures but the losses of the steps, for the JSON file."""
    return {
        "rank": m.rank,
        "best_lr": m.best_lr,
        "best": [{**dataclasses.asdict(o), "losses": []} for o in m.best],
    }


def run(settings: Settings) -> PaperResult:
    runs = Runs(settings)
    width = min(task.arch.n_embd for task in runs.tasks.values())
    if any(rank < 2 or rank % 2 for rank in settings.ranks) or min(settings.ranks) > width:
        raise UserError(
            f"--ranks {' '.join(map(str, settings.ranks))}: must be even, as LoRA gets half of each, and one"
            f" at least {width} or less, the width of the smallest model"
        )
    found = {
        task: {method: measure(runs, task, method) for method in ("miss", "lora")} for task in settings.tasks
    }
    figures = {
        task: {method: [figures_of(m) for m in measured] for method, measured in methods.items()}
        for task, methods in found.items()
    }
    return PaperResult(
        "What a higher rank brings, seen and unseen (Table 4)",
        "gsm8k: GSM8K's questions and answers as text to a 3M-parameter RWKV-6; digits: a changed task to an"
        " RWKV-7 that reverses digits (benchmarks/paper/training_tasks.py). Each method and rank at its own"
        " best rate, found by half decades on the unseen loss of the first seed, from that of the rank before"
        " on. A loss is no accuracy on GSM8K, which models of this size do not have.",
        claims(found),
        [
            table(task, methods["miss"], methods["lora"], runs.tasks[task].answers)
            for task, methods in found.items()
        ],
        lambda figure: draw(found, figure),
        {"trainings": figures},
    )
