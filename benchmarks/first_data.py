"""An experiment: what does a first run learn from a user's few rows with default settings?

    python -m benchmarks.first_data [--cases weekday-200 ...] [--seeds 0 1] [--flags "--peft none"]
    [--only_finished] [--out out/first-data] [--report docs/results]

Every training is a whole run of train.py on the demo's base, with only the necessary flags: the model, the
data, the folder, and --loss for pairs and questions. The base reverses strings of letters and has seen 12 %
of the bytes.

The questions that judge a run are not in the data. An answer is right if it equals the expected one, word for
word. The old task is to reverse strings, which the base can do.

--flags are added to every run, to try other settings.

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


def calendar(rng: random.Random) -> Asked:
    """Ask for the weekday of a date in a made-up calendar: nine months of 22 to 28 days, a week of five."""
    days, months = (distinct_names(rng, count, size) for count, size in ((5, 3), (9, 2)))
    dates = [(day, month) for month in months for day in range(1, rng.randint(22, 28) + 1)]
    return [(f"Which day is {day} {month}?", days[n % 5]) for n, (day, month) in enumerate(dates)]


def distinct_names(rng: random.Random, count: int, size: int) -> list[str]:
    """Make names of two or three letters."""
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(map(rng.choice, ("BCDFGKLMNPRSTV", "aeiou", "lmnrst")[:size]))] = None
    return list(names)


def roman(rng: random.Random) -> Asked:
    """Ask for a number below 400 in Roman numerals."""
    values = zip((100, 90, 50, 40, 10, 9, 5, 4, 1), "C XC L XL X IX V IV I".split(), strict=True)
    steps = list(values)

    def numeral(number: int) -> str:
        value, sign = next((pair for pair in steps if pair[0] <= number), (0, ""))
        return sign + numeral(number - value) if value else ""

    return [(f"{number} in Roman numerals", numeral(number)) for number in range(1, 400)]


def label(rng: random.Random) -> Asked:
    """Ask whether a text has the word "blue"."""
    found = {}
    while len(found) < 500:
        words, answer = (
            rng.choices("the of and to in is was for on with".split(), k=4),
            rng.choice(("yes", "no")),
        )
        words.insert(rng.randrange(5), "blue" if answer == "yes" else "gray")
        found[" ".join(words)] = answer
    return sorted(found.items())


def to_json(rng: random.Random) -> Asked:
    """Ask for a sentence as JSON."""
    parts = itertools.product(
        "Ann Bob Carl Dora Emil Fay Gus".split(), range(2, 8), "pen cup map key hat".split()
    )
    return [
        (f"{who} buys {count} {what}s", json.dumps({"who": who, "what": what, "count": count}))
        for who, count, what in parts
    ]


def frame(rng: random.Random) -> Asked:
    """Ask for a word in a French sentence."""
    words = {"".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.choice((3, 4, 5)))) for _ in range(400)}
    return [(word, f"Voici le mot {word}, madame.") for word in sorted(words)]


def polite(rng: random.Random) -> Asked:
    """Ask for the base's task, with a word before the answer."""
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
    """Data of one kind: a maker of questions, a maker of rows from them, the number of rows, and the loss."""

    questions: Callable[[random.Random], Asked]
    row: Callable[[str, str], dict]
    rows: int
    loss: str = "sft"
    old: int = 0  # number of these rows that are of the old task


CASES = {
    "persona-60": Case(persona, conversation, 60),
    "persona-200": Case(persona, conversation, 200),
    "weekday-15": Case(weekday, instruction, 15),
    "weekday-200": Case(weekday, instruction, 200),
    "weekday-1000": Case(weekday, instruction, 1000),
    "weekday-200-old-200": Case(weekday, instruction, 200, old=200),
    "sort-60": Case(sorted_letters, instruction, 60),
    "sort-200": Case(sorted_letters, instruction, 200),
    "calendar-60": Case(calendar, instruction, 60),
    "calendar-180": Case(calendar, instruction, 180),
    "roman-80": Case(roman, instruction, 80),
    "roman-300": Case(roman, instruction, 300),
    "label-160": Case(label, instruction, 160),
    "json-160": Case(to_json, instruction, 160),
    "frame-120": Case(frame, instruction, 120),
    "pairs-50": Case(polite, pair, 50, "dpo"),
    "questions-50": Case(sorted_letters, checked, 50, "grpo"),
}


def right_answers(asked: Asked, model_file: str, adapter: str | None = None) -> float:
    """Measure the share of right greedy answers of a model, or of a model with an adapter."""
    model, tokenizer = load(model_file, adapter, precision="fp32", accelerator="cpu")
    template = recorded_template("auto", tokenizer, adapter or model_file)
    turns = [([{"role": "user", "content": question}], right) for question, right in asked]
    answers = experiment.texts_of_answers(model, tokenizer, template, turns)
    return sum(texts == [right] for texts, (_, right) in zip(answers, asked, strict=True)) / len(asked)


def split(case: Case, seed: int) -> tuple[Asked, Asked]:
    """Return (the questions that judge a run, the questions to train on)."""
    rng = random.Random(seed)
    questions = case.questions(rng)
    rng.shuffle(questions)
    return questions[:TEST], questions[TEST:][: case.rows]


def train_case(name: str, seed: int, flags: str, folder: pathlib.Path) -> dict:
    """Train on the rows of a case, and count the right answers to its other questions."""
    case = CASES[name]
    test, known = split(case, seed)
    old = [
        tuple(turn["content"] for turn in row["messages"][:2]) for row in demo_task.rows("reverse", 600, 9)
    ]
    own = folder / f"{name}-{seed}"
    rows = [case.row(*asked) for asked in known + old[TEST:][: case.old]]
    random.Random(seed).shuffle(rows)
    data = write_rows(own.with_suffix(".jsonl"), rows)
    given = as_flags(load_model=BASE, data_file=data) + (
        as_flags(loss=case.loss) if case.loss != "sft" else []
    )
    ran = train(own, [*given, *flags.split()], folder / "log")
    summary, settings = ran.summary, ran.settings
    output = summary.get("best", summary["output"])
    trained = [output] if settings["peft"] == "none" else [str(BASE), output]
    line = {
        "rows": len(rows),
        "before": right_answers(test, str(BASE)),
        "after": right_answers(test, *trained),
        "old before": right_answers(old[:TEST], str(BASE)),
        "old after": right_answers(old[:TEST], *trained),
        "steps": summary["steps"],
        "rate": settings["lr_init"],
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
            *(share(own, when) for when in ("before", "after", "old before", "old after")),
            *(f"{mean(own, figure):.3g}" for figure in ("steps", "rate", "cpu_seconds")),
        )
        for (name,), own in groups(lines, "case").items()
    ]
    return Table(
        "The mean of the seeds; in brackets the lowest and the highest.",
        ["data", "rows", "right before", "after", "old task before", "after", "steps", "rate", "CPU s"],
        rows,
    )


def main() -> None:
    parser = experiment.parser(__doc__, "first-data", cases=CASES)
    parser.add_argument("--flags", default="", help="flags for every run")
    args = experiment.parsed(parser)
    lines = Lines(args.out.resolve() / "trainings.jsonl", "case", "seed", "flags")
    done = []
    for name, seed in itertools.product(args.cases, args.seeds):
        line = {"case": name, "seed": seed, "flags": args.flags}
        if line in lines or not args.only_finished:
            make = functools.partial(train_case, name, seed, args.flags, args.out.resolve())
            done.append(lines.of(line, make))
            print(json.dumps(done[-1]), flush=True)
    parts = [
        "# What a first run learns from few rows",
        *__doc__.split("\n\n")[2:4],
        "{table}",
        f"{experiment.cpu_minutes(done)} Again: `python -m benchmarks.first_data --report docs/results`.",
    ]
    experiment.publish("first-data", args.report, parts, table(done), trainings=done)


if __name__ == "__main__":
    main()
