"""An experiment: what does a first run learn from somebody's few rows, where no knob is turned?

    python -m benchmarks.first_data [--cases persona ...] [--seeds 0 1] [--only_finished]
    [--out out/first-data] [--report docs/results]

Every training is a whole run of train.py on the demo's base, with the flags that it can't do without: the
model, the data, the folder, and --loss for pairs and questions. The base reverses strings of letters and has
seen 12 % of the bytes.

Right is an answer that equals the expected one, word for word, to questions that are not in the data.

A finished training is kept in --out, and is not repeated. --report FOLDER gets first-data.md. The last line
is JSON.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import itertools
import json
import pathlib
import random
import shutil
from collections.abc import Callable, Sequence

from demo import task as demo_task
from src.data.templates import recorded_template
from src.inference.load import load

from . import experiment
from .common import as_flags
from .experiment import Lines, groups, mean, share, train, write_rows
from .paper.results import Table
from .paper.tasks import ROOT

BASE = ROOT / "demo/rwkv7-reverse.pth"
TEST = 40  # questions that judge a run

Asked = list[tuple[str, str]]  # a question and its right answer


def persona(rng: random.Random) -> Asked:
    """Ask in Chinese who the model is, and what it can do."""
    begins = ["", "你好，", "请问，", "请告诉我，", "我想知道，", "嗨，", "对了，", "顺便问一下，"]
    ends = ["？", "?", "呢？", "呀？", "啊？", "，请说说。", "，谢谢。"]
    answers = {
        "你是谁": "我是小云。",
        "你叫什么名字": "我叫小云。",
        "谁训练了你": "星河实验室训练了我。",
        "你会做什么": "我会回答问题。",
        "你说什么语言": "我说中文。",
    }
    return [
        (begin + core + end, answers[core]) for begin, core, end in itertools.product(begins, answers, ends)
    ]


def weekday(rng: random.Random) -> Asked:
    """Ask for the weekday of a date that has it in short: "Tue 05.03.2024" is "Tuesday"."""
    days = [datetime.date(2020, 1, 1) + datetime.timedelta(days=n) for n in range(1500)]
    return [(f"which day is {day:%a %d.%m.%Y}?", f"{day:%A}") for day in days]


def sorted_letters(rng: random.Random) -> Asked:
    """Ask for the letters of a short string in their order."""
    strings = {"".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.choice((3, 4)))) for _ in range(500)}
    return [(f"sort {letters}", demo_task.TASKS["sort"](letters)) for letters in sorted(strings)]


def polite(rng: random.Random) -> Asked:
    """Ask for what the base does, with a word before the answer."""
    strings = {
        "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.choice((3, 4, 5)))) for _ in range(500)
    }
    return [(f"reverse {letters}", f"sure {letters[::-1]}") for letters in sorted(strings)]


def conversation(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def instruction(question: str, answer: str) -> dict:
    return {"instruction": question, "output": answer}


def pair(question: str, answer: str) -> dict:
    return {"question": question, "chosen": answer, "rejected": answer.removeprefix("sure ")}


def checked(question: str, answer: str) -> dict:
    return {"question": question, "answer": answer}


@dataclasses.dataclass(frozen=True)
class Case:
    """Data of one kind: its questions, how a row holds one, how many rows there are, and the flags."""

    questions: Callable[[random.Random], Asked]
    row: Callable[[str, str], dict]
    rows: int
    loss: str = "sft"


CASES = {
    "persona": Case(persona, conversation, 200),
    "persona, 60 rows": Case(persona, conversation, 60),
    "weekday": Case(weekday, instruction, 200),
    "weekday, 60 rows": Case(weekday, instruction, 60),
    "sort": Case(sorted_letters, instruction, 200),
    "sort, 60 rows": Case(sorted_letters, instruction, 60),
    "pairs": Case(polite, pair, 50, "dpo"),
    "questions": Case(sorted_letters, checked, 50, "grpo"),
}


def right_answers(asked: Asked, adapter: str | None) -> float:
    """Measure the share of right greedy answers of the base, or of the base with an adapter."""
    model, tokenizer = load(BASE, adapter, precision="fp32", accelerator="cpu")
    template = recorded_template("auto", tokenizer, adapter or str(BASE))
    turns = [([{"role": "user", "content": question}], right) for question, right in asked]
    answers = experiment.texts_of_answers(model, tokenizer, template, turns)
    return sum(texts == [right] for texts, (_, right) in zip(answers, asked, strict=True)) / len(asked)


def train_case(name: str, seed: int, folder: pathlib.Path) -> dict:
    """Train on the rows of a case, and count the right answers to its other questions."""
    case, rng = CASES[name], random.Random(seed)
    questions = case.questions(rng)
    rng.shuffle(questions)
    test, known = questions[:TEST], questions[TEST:][: case.rows]
    own = folder / f"{name}-{seed}".replace(", ", "-").replace(" ", "-")
    data = write_rows(own.with_suffix(".jsonl"), [case.row(*asked) for asked in known])
    flags = as_flags(load_model=BASE, data_file=data) + (
        as_flags(loss=case.loss) if case.loss != "sft" else []
    )
    ran = train(own, flags, folder / "log")
    summary, settings = ran.summary, ran.settings
    line = {
        "rows": len(known),
        "before": right_answers(test, None),
        "after": right_answers(test, summary.get("best", summary["output"])),
        "passes": settings["epoch_count"],
        "steps": summary["steps"],
        "rate": settings["lr_init"],
        "seconds": round(summary["train_seconds"], 1),
        "cpu_seconds": ran.cpu_seconds,
    }
    shutil.rmtree(own)
    return line


def table(lines: Sequence[dict]) -> Table:
    """Make a row for each case: the mean of its seeds."""
    rows = [
        (
            name,
            str(own[0]["rows"]),
            *(share(own, when) for when in ("before", "after")),
            *(f"{mean(own, figure):.3g}" for figure in ("steps", "rate", "cpu_seconds")),
        )
        for (name,), own in groups(lines, "case").items()
    ]
    return Table(
        "The mean of the seeds; in brackets the lowest and the highest.",
        ["data", "rows", "right before", "right after", "steps", "rate", "CPU s"],
        rows,
    )


def main() -> None:
    args = experiment.parsed(experiment.parser(__doc__, "first-data", cases=CASES))
    lines = Lines(args.out.resolve() / "trainings.jsonl", "case", "seed")
    done = []
    for name, seed in itertools.product(args.cases, args.seeds):
        line = {"case": name, "seed": seed}
        if line in lines or not args.only_finished:
            done.append(lines.of(line, functools.partial(train_case, name, seed, args.out.resolve())))
            print(json.dumps(done[-1]), flush=True)
    parts = [
        "# What a first run learns from few rows",
        __doc__.split("\n\n")[2],
        __doc__.split("\n\n")[3],
        "{table}",
        f"{experiment.cpu_minutes(done)} Again: `python -m benchmarks.first_data --report docs/results`.",
    ]
    experiment.publish("first-data", args.report, parts, table(done), trainings=done)


if __name__ == "__main__":
    main()
