"""An experiment: what do adapters in the last layers alone cost in loss?

    python -m benchmarks.last_layers [--data ../shared/data] [--tasks shakespeare ...] [--seeds 0 1 2]
    [--out out/last-layers] [--report docs/results]

MiSS is trained in all 12 layers, in the last 6 and in the last 3, on tasks of benchmarks.first_run, in runs
of train.py of 100 steps. Each has a rate of its own: with the first seed rates are tried from a middle one to
the better side, until the best has a worse one on both sides. The other seeds train at that rate.

What counts is the loss on texts that are not in the training data. A finished training is kept in --out, and
is not repeated. --report FOLDER gets last-layers.md. The last line is JSON.
"""

from __future__ import annotations

import itertools
import statistics

from . import experiment
from .first_run import TASKS, Trainings, best_rate
from .paper.results import Table

LAYERS = ("", "last:6", "last:3")
NAMES = ("shakespeare", "gsm8k", "capitals")  # bases of 12 layers


def main() -> None:
    parser = experiment.parser(__doc__, "last-layers", tasks={name: TASKS[name] for name in NAMES})
    args = experiment.parsed(parser)
    rows, figures, lines = [], {}, []
    for name, layers in itertools.product(args.tasks, LAYERS):
        trainings = Trainings(name, "miss", args, layers)
        rate = best_rate(trainings, args.seeds[0])
        base = trainings.at("base", args.seeds[0])["figure"]
        reached = [trainings.at(rate, seed)["figure"] for seed in args.seeds]
        fallen = base - statistics.fmean(reached)
        figures[f"{name} {layers}".strip()] = {"rate": rate, "base": base, "losses": reached}
        whole = base - statistics.fmean(figures[name]["losses"])
        spread = f"{statistics.fmean(reached):.4f} ({min(reached):.4f} to {max(reached):.4f})"
        share = f"{100 * fallen / whole:.0f} %"
        rows.append((name, trainings.rows, layers or "all 12", f"{base:.4f}", f"{rate:g}", spread, share))
        lines += trainings.lines.done.values()
        print(*rows[-1], flush=True)
    columns = ["task", "rows", "layers", "loss before", "best rate", "loss after", "share of the fall"]
    note = f"Nats a token, less is better; the mean of {len(args.seeds)} seeds, and their range."
    parts = [
        "# Adapters in the last layers alone",
        "What `--layers last:6` and `last:3` cost in loss on bases of 12 layers, each at a rate of its own.",
        "{table}",
        "Each rate is the best of those tried with the first seed; it has a worse one on both sides.",
        experiment.cpu_minutes(lines),
        f"Again: `python -m benchmarks.last_layers --report docs/results`, {experiment.NEEDS_DATA}.",
    ]
    experiment.publish("last-layers", args.report, parts, Table(note, columns, rows), cases=figures)


if __name__ == "__main__":
    main()
