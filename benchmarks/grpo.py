"""Whether a model learns from rewards for its own answers, beside supervised training on the right ones.

    python -m benchmarks.grpo [--cases rewards exact ...] [--seeds 0 1 2] [--only_finished]
    [--out out/grpo] [--report docs/results]

The demo's base reverses letters. A few supervised steps teach it to sort them, until a quarter to a third of
the answers that are drawn at temperature 1 are right. Every training then is a whole run of train.py on this
model, with as many prompts as any other: on rewards for 8 drawn answers to each of 16 questions a step, or
supervised on the right answers.

Right is the sorted answer, word for word, to questions that no training has seen: greedy, and drawn at
temperature 1. The cases that try rates, and the one whose rate is too high, have the first seed alone. What
drawing takes is measured beside it: the answers of a step in a batch, and one after the other.

A finished training is kept in --out, and is not repeated. --report FOLDER gets grpo.md, .png and .json. The
last line is JSON.
"""

from __future__ import annotations

import functools
import itertools
import json
import pathlib
import shutil
import statistics
import time
from collections.abc import Iterable

import torch

from demo import task as demo_task
from rwkv_miss import merge_file
from rwkv_miss.inject import inject
from rwkv_miss.version import commit
from src.data.templates import recorded_template
from src.inference.decoders import for_training
from src.inference.engine import Engine
from src.inference.load import load
from src.inference.request import Answer, Request
from src.planning.drawing import TOGETHER
from src.training.draws import FROM_THE_MODEL

from .common import argument_parser, as_flags, environment, report
from .grpo_table import CASES, DRAWN, GREEDY, Case, draw, summary, table
from .paper.results import check_folder
from .trainings import ROOT, Lines, Ran, texts_of_answers, train, write_page, write_rows

BASE = ROOT / "demo/rwkv7-reverse.pth"
START_STEPS, START_ROWS = 25, 32
STEPS, QUESTIONS, GROUP = 300, 16, 8  # of a training; of a step; answers to a question
LONGEST = 24  # tokens of a drawn answer; the right ones have at most 8
WINDOW = 10  # steps that are one point of a curve
SHOWN = ("reward", "reward_exact", "entropy", "dead_groups", "length", "cut", "engine_gap_max")


def letters(count: int, seed: int, excluded: set[str]) -> list[dict]:
    """So many questions with their sorted answers, without the excluded questions."""
    rows = (
        (turn["content"] for turn in row["messages"][:2]) for row in demo_task.rows("sort", 2 * count, seed)
    )
    found = [{"question": question, "answer": answer} for question, answer in rows]
    return [row for row in found if row["question"] not in excluded][:count]


class Trainings:
    """The trainings, each done once: what is finished stands in trainings.jsonl of the folder."""

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
        """The model that all trainings begin with, which is made where it is not there."""
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
        """What the model is before any training."""
        return self.lines.of({"case": "start", "seed": 0}, lambda: self.measures(None))

    def of(self, case: Case, seed: int) -> dict:
        """The line of a training, which is done where it is not yet."""
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
        """The right answers to the test's questions."""
        model, tokenizer = load(self.start, adapter, precision="fp32", accelerator="cpu")
        template = recorded_template("auto", tokenizer, adapter or str(self.start))
        asked = [([{"role": "user", "content": row["question"]}], row["answer"]) for row in self.test]
        found = {}
        for name, given in ((GREEDY, {}), (DRAWN, {"sampling": FROM_THE_MODEL, "samples": 4})):
            answers = texts_of_answers(model, tokenizer, template, asked, **given)
            right = [text == row["answer"] for row, texts in zip(self.test, answers) for text in texts]
            found[name] = round(sum(right) / len(right), 4)
            found[f"{name}, for example"] = [texts[0] for texts in answers[:3]]
        return found


def of_steps(ran: Ran) -> dict:
    """What the steps of a run were: the share of their time that drawing took, and curves."""
    metrics = ran.metrics
    if "draw_seconds" not in metrics[-1]:
        return {}
    # the first step's time holds what a process does once
    drawing, whole = (sum(line[name] for line in metrics[1:]) for name in ("draw_seconds", "seconds"))
    windows = [metrics[i : i + WINDOW] for i in range(0, len(metrics), WINDOW)]
    curves = {
        name: [mean_of(line[name] for line in window) for window in windows]
        for name in SHOWN
        if name in metrics[0]
    }
    return {"drawing": round(drawing / whole, 3), "curves": curves}


def mean_of(values: Iterable[float | None]) -> float | None:
    """The mean of the steps that have this figure: one without a live group has no gap. None without any."""
    found = [value for value in values if value is not None]
    return round(statistics.fmean(found), 10) if found else None


def drawing(start: pathlib.Path, rows: list[dict], rounds: int = 5) -> dict:
    """CPU seconds of one thread for the answers to the questions of a step, in a batch and one by one."""
    model, tokenizer = load(start, None, precision="fp32", accelerator="cpu")
    inject(model, "miss", rank=12)
    model.eval()
    template = recorded_template("auto", tokenizer, str(start))
    prompts = []
    for row in rows:
        turns = [{"role": "user", "content": row["question"]}]
        text = "".join(segment.text for segment in template.segments(turns, ask=True))
        prompts.append(tokenizer.encode(text))

    def asked(seed: int, n: int) -> list[Request]:
        return [
            Request(prompt, LONGEST, FROM_THE_MODEL, seed + place, template.stops, n=n, logprobs=0)
            for place, prompt in enumerate(prompts)
        ]

    def in_a_batch(seed: int) -> list[Answer]:
        decoder = for_training(model, GROUP * len(prompts))
        answers = list(
            itertools.chain.from_iterable(
                Engine(decoder, tokenizer, together=TOGETHER).run(asked(seed, GROUP))
            )
        )
        decoder.close()
        return answers

    def one_by_one(seed: int) -> list[Answer]:
        decoder = for_training(model, 1)
        engine = Engine(decoder, tokenizer)
        answers = [
            answer
            for request in asked(seed, GROUP)
            for answers in engine.run([request])
            for answer in answers
        ]
        decoder.close()
        return answers

    seconds: dict[str, list[float]] = {"batch": [], "one by one": []}
    tokens = 0
    for seed in range(rounds + 1):  # the first one warms up
        said = []
        for name, way in (("batch", in_a_batch), ("one by one", one_by_one)):
            begun = time.process_time()
            answers = way(1000 * seed)
            if seed:
                seconds[name].append(time.process_time() - begun)
            said.append(sorted((answer.request.seed, answer.index, answer.text) for answer in answers))
            tokens = sum(len(answer.tokens) for answer in answers)
        if said[0] != said[1]:
            print(f"note: {sum(a != b for a, b in zip(*said))} answers differ")
    batch, alone = (statistics.median(seconds[name]) for name in ("batch", "one by one"))
    return {
        "answers": GROUP * len(prompts),
        "tokens": tokens,
        "batch seconds": round(batch, 4),
        "one by one seconds": round(alone, 4),
        "ratio": round(statistics.median(b / a for a, b in zip(*seconds.values())), 2),
    }


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only_finished", action="store_true", help="train nothing; leave the others out")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/grpo"))
    parser.add_argument("--report", help="folder for the table, the plot and JSON")
    args = parser.parse_args()
    folder = check_folder(args.report) if args.report else None
    torch.set_num_threads(1)
    trainings = Trainings(args.out.resolve())
    lines, missing = [trainings.of_start()], []
    for case in map(CASES.get, args.cases):
        for seed in args.seeds if case.all_seeds else args.seeds[:1]:
            if args.only_finished and {"case": case.name, "seed": seed} not in trainings.lines:
                missing.append(f"{case.name} (seed {seed})")
                continue
            lines.append(trainings.of(case, seed))
            shown = {name: value for name, value in lines[-1].items() if name != "curves"}
            print(json.dumps(shown), flush=True)
    sums = {
        **summary(lines),
        "not measured": missing,
        "drawing": drawing(trainings.start, trainings.valid[:QUESTIONS]),
    }
    print(table(lines).markdown())
    if folder:
        write_report(folder, lines, sums)
    report("grpo", **sums, trainings=[{k: v for k, v in line.items() if k != "curves"} for line in lines])


def write_report(folder: pathlib.Path, lines: list[dict], sums: dict) -> None:
    """grpo.md, .png and .json."""
    facts, found, drawn = environment(), table(lines), sums["drawing"]
    seconds = sum(line.get("cpu_seconds", 0) for line in lines)
    parts = [
        "# What rewards for a model's own answers teach",
        "Asked for, in every seed of `rewards`: 80 % right greedy answers (as an aim 85 %) after 300 steps,"
        " within two minutes of one CPU core, at most half of the time for drawing.",
        " ".join(
            f"{name.capitalize()}: {', '.join(sums[name]) or 'none'}."
            for name in ("met", "missed", "not measured")
        ),
        "A base that reverses letters has learnt for"
        f" {START_STEPS} supervised steps to sort them. All trainings begin with this model, which the table"
        f" calls `start`, and have {STEPS} steps of {QUESTIONS} questions. Those on rewards draw {GROUP}"
        " answers to each question. `rewards`: exact and partial; `exact`: exact alone; `supervised`: the"
        " right answers, at the same rate, and once at the one that the run's search has found. 300 questions"
        " that no training has seen judge them.",
        "![Right answers, entropy and dead groups](grpo.png)",
        found.markdown(),
        f"Drawing: the {drawn['answers']} answers of a step, {drawn['tokens']} tokens, took"
        f" {drawn['batch seconds']:.3f} s in a batch and {drawn['one by one seconds']:.3f} s one by one,"
        f" {drawn['ratio']:.1f} times as long (medians of paired rounds).",
        f"All trainings took {seconds / 60:.0f} CPU minutes. Again: `python -m benchmarks.grpo --report"
        " docs/results`.",
        f"{facts['machine']}, 1 thread, fp32, torch {facts['versions']['torch']}. Put together at commit"
        f" {facts['commit']}.",
    ]
    content = {**sums, **facts, "table": found.records(), "trainings": lines}
    write_page(folder, "grpo", parts, draw(lines), content)


if __name__ == "__main__":
    main()
