"""An experiment: does a model learn from rewards for its own answers as from the right ones?

    python -m benchmarks.grpo [--cases rewards exact ...] [--seeds 0 1 2] [--only_finished]
    [--out out/grpo] [--report docs/results]

The demo's base reverses letters. A few supervised steps teach it to sort them, until a quarter to a third of
the answers drawn at temperature 1 are right. Every training is then a whole run of train.py on this model,
with the same number of prompts: on rewards for 8 drawn answers to each of 16 questions a step, or supervised
on the right answers.

An answer is right if it equals the sorted letters, word for word. Answers to questions that no training has
seen are counted, greedy and drawn at temperature 1. The cases that try rates, and the one whose rate is too
high, have the first seed alone.

A finished training is kept in --out, and is not repeated. --report FOLDER gets grpo.md and grpo.png. The
last line is JSON.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import shutil
import statistics
from collections.abc import Iterable, Sequence

from demo import task as demo_task
from rwkv_miss import merge_file
from rwkv_miss.version import commit
from src.data.templates import recorded_template
from src.inference.load import load
from src.sources.drawn.rollouts import FROM_THE_MODEL

from . import experiment
from .common import as_flags
from .experiment import Lines, Ran, groups, mean, share, train, write_rows
from .paper.results import Table
from .paper.tasks import ROOT

GREEDY, DRAWN = "greedy", "drawn"
# targets for every seed of case "rewards": share of right greedy answers, CPU seconds, share of time to draw
RIGHT, CPU_SECONDS, DRAWING = 0.8, 120, 0.5


@dataclasses.dataclass(frozen=True)
class Case:
    """A kind of training: its rewards (none: it is supervised), its method and its rate."""

    name: str
    rewards: str = "exact=1,partial=1"
    method: str = "miss"
    rate: float | None = 3e-3  # None: train.py chooses the rate
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

BASE = ROOT / "demo/rwkv7-reverse.pth"
START_STEPS, START_ROWS = 25, 32
STEPS, QUESTIONS, GROUP = 300, 16, 8  # steps of a training, questions of a step, answers to a question
LONGEST = 24  # most tokens of a drawn answer; right ones have at most 8
WINDOW = 10  # number of steps whose mean is one point of a curve
SHOWN = ("reward", "reward_exact", "entropy", "dead_groups", "length", "cut", "engine_gap_max")


def letters(count: int, seed: int, excluded: set[str]) -> list[dict]:
    """Make `count` questions with their sorted answers, without the excluded questions."""
    rows = (
        (turn["content"] for turn in row["messages"][:2]) for row in demo_task.rows("sort", 2 * count, seed)
    )
    found = [{"question": question, "answer": answer} for question, answer in rows]
    return [row for row in found if row["question"] not in excluded][:count]


class Trainings:
    """The trainings, each done once: finished ones are in trainings.jsonl of the folder."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.lines = Lines(folder / "trainings.jsonl", "case", "seed")
        self.test = letters(300, 1, set())
        seen = {row["question"] for row in self.test}
        self.valid = letters(100, 2, seen)
        seen |= {row["question"] for row in self.valid}
        self.train = letters(STEPS * QUESTIONS, 3, seen)
        self.start_rows = letters(START_STEPS * START_ROWS, 4, seen)
        files = {name: getattr(self, name) for name in ("valid", "train", "start_rows")}
        self.files = {name: write_rows(folder / f"{name}.jsonl", rows) for name, rows in files.items()}

    @functools.cached_property
    def start(self) -> pathlib.Path:
        """The model that all trainings begin with; it is trained if it does not exist."""
        path = self.folder / "start.pth"
        if not path.exists():
            flags = as_flags(
                load_model=BASE, data_file=self.files["start_rows"], peft="miss", packing=0, eval_samples=0,
                micro_bsz=START_ROWS, epoch_steps=START_STEPS, lr_init=3e-3, lr_final=3e-3, warmup_steps=0,
                random_seed=0,
            )  # fmt: skip
            ran = train(self.folder / "start", flags, self.folder / "log")
            merge_file(BASE, ran.summary["output"], path)
            shutil.rmtree(ran.folder)
        return path

    def of_start(self) -> dict:
        """Measure the model before any training."""
        return self.lines.of({"case": "start", "seed": 0}, lambda: self.measures(None))

    def of(self, case: Case, seed: int) -> dict:
        """Return the line of a training, and do the training first if it is not done."""
        return self.lines.of({"case": case.name, "seed": seed}, lambda: self._train(case, seed))

    def _train(self, case: Case, seed: int) -> dict:
        flags = as_flags(
            load_model=self.start, data_file=self.files["train"], eval_file=self.files["valid"],
            peft=case.method, micro_bsz=QUESTIONS, epoch_steps=STEPS, eval_samples=0, eval_steps=0,
            random_seed=seed,
        )  # fmt: skip
        ran = train(
            self.folder / f"{case.name}-{seed}".replace(" ", "-"), [*flags, *case.flags], self.folder / "log"
        )
        done = {
            "steps": ran.summary["steps"],
            "rate": ran.settings["lr_init"],
            "cpu_seconds": ran.cpu_seconds,
        }
        done |= {"commit": commit(), **of_steps(ran), **self.measures(ran.summary["output"])}
        shutil.rmtree(ran.folder)
        return done

    def measures(self, adapter: str | None) -> dict:
        """Count the right answers to the test's questions."""
        model, tokenizer = load(self.start, adapter, precision="fp32", accelerator="cpu")
        template = recorded_template("auto", tokenizer, adapter or str(self.start))
        asked = [([{"role": "user", "content": row["question"]}], row["answer"]) for row in self.test]
        found = {}
        for name, given in ((GREEDY, {}), (DRAWN, {"sampling": FROM_THE_MODEL, "samples": 4})):
            answers = experiment.texts_of_answers(model, tokenizer, template, asked, **given)
            right = [text == row["answer"] for row, texts in zip(self.test, answers) for text in texts]
            found[name] = round(sum(right) / len(right), 4)
            found[f"{name}, for example"] = [texts[0] for texts in answers[:3]]
        return found


def of_steps(ran: Ran) -> dict:
    """Describe the steps of a run: the share of their time for drawing, and curves."""
    metrics = ran.metrics
    if "draw_seconds" not in metrics[-1]:
        return {}
    # without the first step, whose time includes the start of the process
    drawing, whole = (sum(line[name] for line in metrics[1:]) for name in ("draw_seconds", "seconds"))
    windows = [metrics[i : i + WINDOW] for i in range(0, len(metrics), WINDOW)]
    curves = {
        name: [mean_of(line[name] for line in window) for window in windows]
        for name in SHOWN
        if name in metrics[0]
    }
    return {"drawing": round(drawing / whole, 3), "curves": curves}


def mean_of(values: Iterable[float | None]) -> float | None:
    """Average a figure over the steps that have it; a step without a live group has no gap. None without
    any."""
    found = [value for value in values if value is not None]
    return round(statistics.fmean(found), 10) if found else None


def summary(lines: Sequence[dict]) -> dict[str, list[str]]:
    """Sort the targets of `rewards` into met and missed."""
    own = [line for line in lines if line["case"] == "rewards"]
    return experiment.judged(
        {
            "right answers": [line[GREEDY] >= RIGHT for line in own],
            "CPU time": [line["cpu_seconds"] <= CPU_SECONDS for line in own],
            "drawing": [line["drawing"] <= DRAWING for line in own],
        }
    )


def table(lines: Sequence[dict]) -> Table:
    """Make a row for each case: the mean of its seeds."""
    columns = ["case", "method", "rate", "seeds", "greedy", "drawn", "CPU s", "drawing", "dead groups"]
    columns += ["entropy", "largest gap"]
    rows = []
    for (name,), own in groups(lines, "case").items():
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
    """Make a function that fills a figure: right answers of each case, and the curves of the steps."""
    found = {name: own for (name,), own in groups(lines, "case").items()}

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


def main() -> None:
    args = experiment.parsed(experiment.parser(__doc__, "grpo", cases=CASES))
    trainings = Trainings(args.out.resolve())
    lines, missing = [trainings.of_start()], []
    for case in map(CASES.get, args.cases):
        for seed in args.seeds if case.all_seeds else args.seeds[:1]:
            if args.only_finished and {"case": case.name, "seed": seed} not in trainings.lines:
                missing.append(f"{case.name} (seed {seed})")
                continue
            lines.append(trainings.of(case, seed))
            print(json.dumps(without_curves(lines[-1])), flush=True)
    sums = {**summary(lines), "not measured": missing}
    parts = [
        "# What rewards for a model's own answers teach",
        "Asked for, in every seed of `rewards`: 80 % right greedy answers (as an aim 85 %) after 300 steps,"
        " within two minutes of one CPU core, at most half of the time for drawing.",
        experiment.in_words(sums),
        "A base that reverses letters has learnt for"
        f" {START_STEPS} supervised steps to sort them. All trainings begin with this model, which the table"
        f" calls `start`, and have {STEPS} steps of {QUESTIONS} questions. Those on rewards draw {GROUP}"
        " answers to each question. `rewards`: exact and partial; `exact`: exact alone; `supervised`: the"
        " right answers, at the same rate, and once at the one that the run's search has found. 300 questions"
        " that no training has seen judge them.",
        "{plot}",
        "{table}",
        f"{experiment.cpu_minutes(lines)} Again: `python -m benchmarks.grpo --report docs/results`.",
    ]
    shown = list(map(without_curves, lines))
    experiment.publish("grpo", args.report, parts, table(lines), draw(lines), **sums, trainings=shown)


def without_curves(line: dict) -> dict:
    return {name: value for name, value in line.items() if name != "curves"}


if __name__ == "__main__":
    main()
