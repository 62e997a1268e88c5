"""An experiment: what does a small model learn from a teacher, on the data's answers and on its own?

    python -m benchmarks.distill [--cases supervised offline ...] [--seeds 0 1 2] [--only_finished]
    [--out out/distill] [--report docs/results]

The teacher is the demo's base after a training to sort letters. The student has about a third of its
parameters, and reverses letters. Every training is a whole run of train.py on 100 rows of sort, in 15 passes
from the student: supervised alone, with the teacher's likeliest tokens (--loss distill), or on the student's
own answers (--loss distill_on_policy).

The first seed tries the settings of each case, judged by 100 questions that the table does not use. An answer
is right if the greedy answer equals the sorted letters, word for word; the table has 400 questions that no
training has seen.

A finished training is kept in --out, and is not repeated. --report FOLDER gets distillation.md. The last line
is JSON.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import pathlib
import shutil
from collections.abc import Sequence

from demo import task as demo_task
from rwkv_miss.version import commit
from src.data.templates import recorded_template
from src.inference.load import load

from . import experiment
from .common import as_flags
from .experiment import Lines, groups, mean, share, train, write_rows
from .grpo import BASE, letters
from .paper.results import Table

START_STEPS, START_ROWS = 150, 64  # steps, and rows of a step, in the first training of teacher and student
ROWS, PASSES, BATCH, GROUP = 100, 15, 16, 4
LONGER = 75  # passes of the other cases, for about the CPU time of a case that draws answers
JUDGES = {"judges": 400, "chooses": 100}  # questions
RATES = (1e-3, 2e-3, 4e-3, 8e-3)


@dataclasses.dataclass(frozen=True)
class Case:
    """A kind of training: its loss, and the rates and temperatures that are tried."""

    loss: str
    temperatures: tuple[float, ...] = ()
    rates: tuple[float, ...] = RATES

    @property
    def flags(self) -> dict[str, object]:
        if self.loss == "distill_on_policy":
            return {"loss": self.loss, "group_size": GROUP}
        return {"loss": self.loss, "packing": 0}

    @property
    def tried(self) -> list[str]:
        """Return flags."""
        of_teacher = [f" --distill_temperature {number:g}" for number in self.temperatures]
        pairs = itertools.product(self.rates, of_teacher or [""])
        return [f"--lr_init {rate:g}{other}" for rate, other in pairs]


CASES = {
    "supervised": Case("sft"),
    "offline": Case("distill", (1.0, 2.0)),
    "on-policy": Case("distill_on_policy", (1.0, 2.0), (*RATES[1:], 1.6e-2)),
}


class Trainings:
    """The trainings, each done once: finished ones are in trainings.jsonl of the folder."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.lines = Lines(folder / "trainings.jsonl", "case", "settings", "seed")
        seen: set[str] = set()
        self.questions = {}
        for seed, (name, count) in enumerate((JUDGES | {"rows": ROWS}).items(), 1):
            self.questions[name] = letters(count, seed, seen)
            seen |= {row["question"] for row in self.questions[name]}
        self.data = write_rows(folder / "rows.jsonl", self.questions["rows"])
        self.seen = seen

    @functools.cached_property
    def teacher(self) -> pathlib.Path:
        rows = letters(START_STEPS * START_ROWS, 4, self.seen)
        return self._model("teacher", rows, load_model=BASE, lr_init=2e-3)

    @functools.cached_property
    def student(self) -> pathlib.Path:
        rows = demo_task.rows("reverse", START_STEPS * START_ROWS, 5)
        new = dict(version="x070", n_layer=2, n_embd=64, head_size=32, tokenizer="bytes")
        return self._model("student", rows, **new, lr_init=4e-3)

    def _model(self, name: str, rows: Sequence[dict], **flags: object) -> pathlib.Path:
        """Train a model on rows, once; returns its file."""
        path = self.folder / f"{name}.pth"
        if not path.exists():
            data = write_rows(self.folder / f"{name}.jsonl", rows)
            common = as_flags(
                data_file=data, peft="none", packing=0, micro_bsz=START_ROWS, epoch_steps=START_STEPS,
                epoch_count=1, eval_samples=0, eval_split=0, random_seed=0, data_cache="none",
            )  # fmt: skip
            ran = train(self.folder / name, [*common, *as_flags(**flags)], self.folder / "log")
            shutil.copy(ran.summary["output"], path)
            shutil.rmtree(ran.folder)
        return path

    def before(self, name: str) -> dict:
        """Measure a model before the trainings."""
        line = {"case": name, "settings": "", "seed": 0}
        return self.lines.of(line, lambda: self._measures(getattr(self, name)))

    def of(self, name: str, settings: str, seed: int) -> dict:
        """Return the line of a training, and do the training first if it is not done."""
        line = {"case": name, "settings": settings, "seed": seed}
        return self.lines.of(line, lambda: self._train(name, settings, seed))

    def _train(self, name: str, settings: str, seed: int) -> dict:
        given = {
            "load_model": self.student, "data_file": self.data, "peft": "none", "micro_bsz": BATCH,
            "epoch_count": PASSES, "warmup_steps": 10, "weight_decay": 0.01, "eval_samples": 0,
            "eval_split": 0, "eval_steps": 0, "random_seed": seed, "data_cache": "none",
        }  # fmt: skip
        given |= {"reference": self.teacher} if name != "supervised" else {}
        ran = train(
            self.folder / f"{name}-{seed}",
            as_flags(**given | CASES[name].flags | of_flags(settings)),
            self.folder / "log",
        )
        done = {"cpu_seconds": ran.cpu_seconds, "steps": ran.summary["steps"], "commit": commit()}
        done |= self._measures(ran.summary["output"])
        shutil.rmtree(ran.folder)
        return done

    def _measures(self, path: str | pathlib.Path) -> dict:
        """Count the right answers to both sets of questions."""
        model, tokenizer = load(path, None, precision="fp32", accelerator="cpu")
        template = recorded_template("auto", tokenizer, str(path))
        found = {"parameters": sum(p.numel() for p in model.parameters())}
        for name in JUDGES:
            rows = self.questions[name]
            asked = [([{"role": "user", "content": row["question"]}], row["answer"]) for row in rows]
            answers = experiment.texts_of_answers(model, tokenizer, template, asked)
            right = [texts[0] == row["answer"] for row, texts in zip(rows, answers)]
            found[name] = sum(right) / len(right)
        return found


def of_flags(text: str) -> dict[str, str]:
    """Read "--lr_init 0.001 --epoch_count 75"."""
    words = text.split()
    return {flag.removeprefix("--"): value for flag, value in zip(words[::2], words[1::2], strict=True)}


def chosen(lines: Sequence[dict]) -> str:
    """Return the flags with the most right answers to the questions "chooses"; the first of equal ones."""
    return max(lines, key=lambda line: line["chooses"])["settings"]


def code(flags: str) -> str:
    return f"`{flags}`" if flags else ""


def table(lines: Sequence[dict]) -> Table:
    """Make a row for each case: the mean of its seeds."""
    rows = []
    for (name, flags), own in groups(lines, "case", "settings").items():
        seconds = f"{mean(own, 'cpu_seconds'):.1f}" if "cpu_seconds" in own[0] else ""
        size = f"{own[0]['parameters']:,}"
        rows.append((name, size, code(flags), str(len(own)), share(own, "judges"), seconds))
    return Table(
        "Right answers to 400 questions, greedy: the mean of the seeds, and the range. CPU seconds are those"
        " of a run of train.py, with the teacher's pass and the drawing, without the making of the teacher.",
        ["case", "parameters", "settings", "seeds", "right", "CPU s"],
        rows,
    )


def tried_table(lines: Sequence[dict]) -> str:
    rows = [
        (
            line["case"],
            code(line["settings"]),
            *(f"{100 * line[name]:.0f} %" for name in ("chooses", "judges")),
        )
        for line in lines
    ]
    note = "What was tried, with one seed: right answers to the 100 questions that choose, and to the 400."
    return Table(note, ["case", "settings", "of 100", "of 400"], rows).markdown().strip()


def main() -> None:
    args = experiment.parsed(experiment.parser(__doc__, "distill", cases=CASES))
    trainings = Trainings(args.out.resolve())
    lines, tried, missing = [trainings.before("teacher"), trainings.before("student")], [], []

    def done(name: str, settings: str, seed: int) -> list[dict]:
        if args.only_finished and dict(case=name, settings=settings, seed=seed) not in trainings.lines:
            missing.append(f"{name} {code(settings)} (seed {seed})")
            return []
        line = trainings.of(name, settings, seed)
        print(json.dumps(line), flush=True)
        return [line]

    for name in args.cases:
        of_case = [line for settings in CASES[name].tried for line in done(name, settings, args.seeds[0])]
        if not of_case:
            continue
        tried, best = tried + of_case, chosen(of_case)
        longer = [f"{best} --epoch_count {LONGER}"] if name != "on-policy" else []
        lines += [
            line for flags in [best, *longer] for seed in args.seeds for line in done(name, flags, seed)
        ]
    parts = [
        "# What a teacher teaches",
        "A small model learns to sort letters: from right answers alone, also from the likeliest tokens of a"
        " larger model that sorts (`--loss distill`), or from what that model says of the small one's own"
        " answers (`--loss distill_on_policy`).",
        "{table}",
        f"All begin with the same student, and have {PASSES} passes over {ROWS} rows, {BATCH} in a step, or"
        f" {LONGER}. On policy a pass has {GROUP} drawn answers to each question; the right answers are not"
        " read.",
        tried_table(tried),
        f"{experiment.cpu_minutes(trainings.lines.done.values())} Not measured:"
        f" {', '.join(missing) or 'none'}. Again: `python -m benchmarks.distill --report docs/results`.",
    ]
    experiment.publish("distillation", args.report, parts, table(lines), trainings=lines, tried=tried)


if __name__ == "__main__":
    main()
