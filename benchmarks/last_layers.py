"""An experiment: what do adapters in the last layers alone cost in loss?

    python -m benchmarks.last_layers [--data ../shared/data] [--tasks shakespeare ...] [--seeds 0 1 2]
    [--out out/last-layers] [--report docs/results]

MiSS is trained in all layers and in the last ones alone, on tasks of benchmarks.first_run, in whole runs of
train.py of 100 steps. Each case has its own rate: with the first seed rates are tried from a middle one to
the better side, until the best has a worse one on both sides. The other seeds train at that rate.

A training is judged by its loss on texts that are not in the training data, or its right answers to such
questions. A finished training is kept in --out, and is not repeated. --report FOLDER gets last-layers.md. The
last line is JSON.
"""

from __future__ import annotations

import statistics

from . import experiment
from .first_run import Trainings, best_rate
from .paper.results import Table

DEEP, FLAT = (
    ("", "last:6", "last:3"),
    ("", "last:2", "last:1"),
)  # --layers for bases with 12 layers, and with 3
LAYERS = {"capitals": DEEP, "shakespeare": DEEP, "sort": FLAT, "gsm8k": DEEP}


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def main() -> None:
    parser = experiment.parser(__doc__, "last-layers", tasks=LAYERS)
    args = experiment.parsed(parser)
    rows, figures, lines = [], {}, []
    for name, layers in ((task, layers) for task in args.tasks for layers in LAYERS[task]):
        trainings = Trainings(name, "miss", args, layers)
        rate = best_rate(trainings, args.seeds[0])
        base = trainings.at("base", args.seeds[0])["figure"]
        reached = [trainings.at(rate, seed)["figure"] for seed in args.seeds]
        figures[f"{name} {layers}".strip()] = {"rate": rate, "base": base, "reached": reached}
        gain, whole = (statistics.fmean(values) - base for values in (reached, figures[name]["reached"]))
        text = percent if trainings.task.counted else "{:.4f}".format
        spread = f"{text(statistics.fmean(reached))} ({text(min(reached))} to {text(max(reached))})"
        where = layers or "all"
        rows.append(
            (name, trainings.rows, where, text(base), f"{rate:g}", spread, f"{percent(gain / whole)}")
        )
        lines += trainings.lines.done.values()
        print(*rows[-1], flush=True)
    columns = ["task", "rows", "layers", "before", "best rate", "after", "share of the gain"]
    note = (
        "Nats a token, of which less is better, or right answers; the mean of"
        f" {len(args.seeds)} seeds, and their range. The share is of the gain of all layers."
    )
    parts = [
        "# Adapters in the last layers alone",
        "What fewer layers with adapters cost on bases of 12 layers, and of 3 (sort), each at its own rate.",
        "{table}",
        "Each rate is the best of those tried with the first seed; it has a worse one on both sides.",
        experiment.cpu_minutes(lines),
        f"Again: `python -m benchmarks.last_layers --report docs/results`, {experiment.NEEDS_DATA}.",
    ]
    experiment.publish("last-layers", args.report, parts, Table(note, columns, rows), cases=figures)


if __name__ == "__main__":
    main()
