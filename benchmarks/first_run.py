"""Whether a run without settings learns as much as one with the best learning rate.

    python -m benchmarks.first_run [--data ../shared/data] [--tasks sort ...] [--methods miss ...]
    [--seeds 0 1 2] [--out out/first-run]

Every training is a whole run of train.py's settings with --load_model, --data_file, --peft and
--random_seed, and for large tasks the sizes that keep them short. First the learning rate is given: seven
rates for the first seed, of which the best and its neighbours are trained with the others, and the method's
published rate. Then it is left to the program, and last it is the first guess, without a search.

What counts is the file that the run's merge command names: its loss on texts, or its right answers to
questions, none of which is in the training data. A finished training is kept in --out, and is not repeated.
The last line is JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import random
import shutil
import time

import torch

from demo import task as demo_task
from rwkv_miss import UserError
from src import run
from src.common.files import append_line
from src.config import Config, parse
from src.data.chat_template import Template
from src.data.dataset import load as load_documents
from src.data.encode import Encoder
from src.data.formats import Reading, Report
from src.data.templates import recorded_template
from src.evaluation.accuracy import answer_limit, exact_accuracy, read_questions
from src.inference.load import load
from src.training.short_runs import held_out_loss

from .common import argument_parser, report
from .quant import DIGITS, digits

ROOT = pathlib.Path(__file__).parent.parent
METHODS = ("miss", "lora", "pissa", "state", "none")
# the rates of the first seed; more are tried beyond an end that is the best one
RATES = {
    "miss": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "lora": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "pissa": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "state": (1e-2, 3e-2, 1e-1, 3e-1, 1e0, 3e0, 1e1),
    "none": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
}
QUESTIONS, TEXTS = 500, 60  # to judge by
SHORT = 300  # characters of GSM8K's question and answer; longer ones would cost too much


@dataclasses.dataclass(frozen=True)
class Task:
    """What is taught to which base. `test` has questions where they are counted, else texts."""

    base: pathlib.Path
    train: pathlib.Path
    test: pathlib.Path
    flags: list[str]
    counted: bool

    @property
    def config(self) -> Config:
        """The settings that decide how the test's texts are read."""
        return parse([*self.words, "--ctx_len", "1024", "--micro_bsz", "4"])[0]

    @property
    def words(self) -> list[str]:
        return ["--load_model", str(self.base), "--data_file", str(self.train), *self.flags]


def write_rows(path: pathlib.Path, rows: list[dict]) -> pathlib.Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sort(folder: pathlib.Path, data: pathlib.Path) -> Task:
    """The demo: a base that reverses letters learns to sort them."""
    held_out = demo_task.rows("sort", QUESTIONS, 1)
    asked = {turn["content"].split()[-1] for row in held_out for turn in row["messages"][::2]}
    return Task(
        ROOT / "demo/rwkv7-reverse.pth",
        write_rows(folder / "train.jsonl", demo_task.rows("sort", 10000, 2, asked)),
        write_rows(folder / "test.jsonl", held_out),
        ["--eval_samples", "0"],
        True,
    )


def digits_plus_one(folder: pathlib.Path, data: pathlib.Path) -> Task:
    """A base that reverses digits learns to add one to each: 123, becomes 432#."""
    vocabulary = folder / "digits.txt"
    vocabulary.write_text("".join(f"{i} {sign!r} 1\n" for i, sign in enumerate(DIGITS)))

    def written(name: str, count: int, seed: int) -> pathlib.Path:
        rows = []
        for ids, given in digits(count, seed):
            text = "".join(DIGITS[i] for i in ids[:-1])
            rows.append({"prompt": text[:given], "completion": text[given:]})
        return write_rows(folder / f"{name}.jsonl", rows)

    return Task(
        data / "real/rwkv7-reverse.pth",
        written("train", 24000, 1),
        written("test", QUESTIONS, 0),
        ["--tokenizer", str(vocabulary), "--eod", "#", "--eval_samples", "0"],
        True,
    )


def gsm8k_rows(data: pathlib.Path, name: str) -> list[dict]:
    lines = (data / f"gsm8k_{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = map(json.loads, lines)
    return [row for row in rows if len(row["question"]) + len(row["answer"]) <= SHORT]


def gsm8k(folder: pathlib.Path, data: pathlib.Path) -> Task:
    """A small English RWKV-6 learns the form of GSM8K's answers."""
    return Task(
        data / "real/rwkv6-3m-utf16.pth",
        write_rows(folder / "train.jsonl", gsm8k_rows(data, "train")),
        write_rows(folder / "test.jsonl", gsm8k_rows(data, "test")[:TEXTS]),
        "--tokenizer utf16 --ctx_len 640 --micro_bsz 1 --epoch_steps 200 --eval_samples 0".split(),
        False,
    )


def few_rows(folder: pathlib.Path, data: pathlib.Path) -> Task:
    """The same with 100 short rows, which are read several times."""
    rows = sorted(gsm8k_rows(data, "train"), key=lambda row: len(row["question"]) + len(row["answer"]))
    rows = rows[:200]
    random.Random(0).shuffle(rows)
    return Task(
        data / "real/rwkv6-3m-utf16.pth",
        write_rows(folder / "train.jsonl", rows[:100]),
        write_rows(folder / "test.jsonl", rows[100 : 100 + TEXTS]),
        "--tokenizer utf16 --ctx_len 512 --eval_samples 0".split(),
        False,
    )


def shakespeare(folder: pathlib.Path, data: pathlib.Path) -> Task:
    """The same base learns Shakespeare, of which the last tenth is the test."""
    text = (data / "tinyshakespeare.txt").read_text()
    cut = len(text) * 9 // 10
    (folder / "train.txt").write_text(text[:cut])
    (folder / "test.txt").write_text(text[cut : cut + 80 * TEXTS])
    return Task(
        data / "real/rwkv6-3m-utf16.pth",
        folder / "train.txt",
        folder / "test.txt",
        "--tokenizer utf16 --ctx_len 160 --micro_bsz 2 --epoch_steps 200 --eval_samples 0".split(),
        False,
    )


TASKS = {
    "sort": sort,
    "digits": digits_plus_one,
    "gsm8k": gsm8k,
    "few-rows": few_rows,
    "shakespeare": shakespeare,
}


def finished(path: pathlib.Path) -> list[dict]:
    """The lines of trainings that are done."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Trainings:
    """The trainings of a task, each done once: what is finished stands in TASK/METHOD.jsonl of the folder."""

    def __init__(self, name: str, method: str, folder: pathlib.Path, data: pathlib.Path):
        self.method, self.folder = method, folder / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.task = TASKS[name](self.folder, data)
        self.path = self.folder / f"{method}.jsonl"
        self.done = {(line["seed"], line["rate"]): line for line in finished(self.path)}

    def at(self, rate: float | str, seed: int) -> dict:
        """The line of the training at a rate, which may be auto, with a seed of adapter and order."""
        if (seed, rate) not in self.done:
            line = {"seed": seed, "rate": rate, **self._train(rate, seed)}
            append_line(self.path, line)
            self.done[seed, rate] = line
        return self.done[seed, rate]

    def _train(self, rate: float | str, seed: int) -> dict:
        """Of a run: the figure it is judged by, None for one that diverged, and the CPU time."""
        folder = self.folder / f"{self.method}-{seed}-{rate}"
        shutil.rmtree(folder, ignore_errors=True)
        flags = ["--peft", self.method, "--random_seed", str(seed), "--lr_init", str(rate)]
        begun = time.process_time()
        with open(self.folder / f"{self.method}.log", "a") as log, contextlib.redirect_stdout(log):
            try:
                run.main(*parse([*self.task.words, *flags, "--proj_dir", str(folder)]))
            except UserError as error:
                print(f"error: {error}")
                return {"figure": None, "seconds": time.process_time() - begun}
        seconds = time.process_time() - begun
        summary = json.loads((folder / "run.json").read_text())
        early = summary.get("best_step", summary["steps"]) < summary["steps"]
        figure = judge(self.task, self.method, summary["best"] if early else summary["output"])
        shutil.rmtree(folder)
        kept = ("steps", "validation_first", "validation_best", "lr_init", "search")
        return {"figure": figure, "seconds": round(seconds, 1)} | {
            name: summary[name] for name in kept if name in summary
        }


def judge(task: Task, method: str, trained: str) -> float:
    """The share of right answers, or the loss in nats per token, of what a run has written."""
    files = {"path": trained} if method == "none" else {"path": task.base, "adapter": trained}
    model, tokenizer = load(**files, precision="fp32", accelerator="cpu")
    template = recorded_template("auto", tokenizer, trained)
    if not task.counted:
        return test_loss(task, model, tokenizer, template)
    questions = read_questions(task.test, template)
    limit = answer_limit("exact", tokenizer, questions)
    return exact_accuracy(model, tokenizer, questions, limit, template)[0]


def test_loss(task: Task, model, tokenizer, template: Template) -> float:
    config = task.config
    encoder = Encoder(tokenizer, template, config.loss_mask)
    reading = Reading.of(config)
    tokens = load_documents(str(task.test), encoder, "none", reading, Report(config.on_bad_row, ""), 0)
    return held_out_loss(model, config, tokens.documents(config.ctx_len))


def sweep(trainings: Trainings, counted: bool, seeds: list[int]) -> None:
    """Train at the method's rates, and with every other seed near the best of them."""
    sign = -1 if counted else 1

    def figure(rate: float, seed: int) -> float:
        found = trainings.at(rate, seed)["figure"]
        return float("inf") if found is None or found != found else sign * found

    rates = list(RATES[trainings.method])
    for seed in seeds:
        tried = {rate: figure(rate, seed) for rate in rates}
        while (best := min(tried, key=tried.get)) in (min(tried), max(tried)):
            beyond = float(f"{best * (10**0.5 if best == max(tried) else 10**-0.5):.0e}")
            tried[beyond] = figure(beyond, seed)
            if tried[beyond] > tried[best]:
                break
        near = sorted(tried)
        at = near.index(best)
        rates = near[max(at - 1, 0) : at + 2]


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("../shared/data"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/first-run"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.tasks:
        for method in args.methods:
            trainings = Trainings(name, method, args.out, args.data)
            sweep(trainings, trainings.task.counted, args.seeds)
            print(
                name, method, {k: (v["figure"], v["seconds"]) for k, v in trainings.done.items()}, flush=True
            )
    report("first_run")


if __name__ == "__main__":
    main()
