"""An experiment: does a run at the chosen learning rate learn as much as one at the best rate?

    python -m benchmarks.first_run [--data ../shared/data] [--tasks sort ...] [--methods miss ...]
    [--seeds 0 1] [--optimizers schedulefree ...] [--out out/first-run] [--report docs/results]

Every training is a whole run of train.py of 100 steps of 512 tokens. Each method trains on a task with 60,
200 or 2,000 rows. First train.py chooses the learning rate, with each seed of adapter and data order. Then
rates are given: with the first seed up to seven, from a middle one to the better side, until the best has a
worse one on both sides; with the other seeds that best rate. With the first seed two other optimizers train,
too, if their packages schedulefree and prodigyopt are installed.

--data has the bases and texts of all tasks but sort: real/rwkv6-3m-utf16.pth, gsm8k_train.jsonl,
gsm8k_test.jsonl and tinyshakespeare.txt. They are not part of the repository.

A run is judged by the file that its merge command names: by its loss on texts, or its right answers to
questions, none of which is in the training data. A finished training is kept in --out, and is not repeated.
--report FOLDER gets first-run.md and first-run.png. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import math
import pathlib
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from unittest import mock

import torch

from demo import task as demo_task
from rwkv_miss import UserError
from rwkv_miss.version import commit
from src.config import Config, parse
from src.data.chat_template import Template
from src.data.dataset import load as load_documents
from src.data.encode import Encoder
from src.data.formats import Reading, Report
from src.data.questions import answer_limit, read_questions
from src.data.templates import recorded_template
from src.evaluation.answering import Asking, exact_accuracy
from src.inference.load import load
from src.sources import source_of
from src.training import trainer
from src.training.short_runs import held_out_loss

from . import experiment
from .common import as_flags
from .experiment import Lines, train, write_rows
from .paper.results import Table
from .paper.tasks import ROOT
from .rates import best_of, enclose

# method -> the middle of the seven rates, from which the given rates go to the better side
RATES = {"miss": 3e-3, "lora": 3e-3, "none": 3e-4, "state": 1.0}
METHODS = ("miss", "lora", "none")
ROWS = (60, 200, 2000)
STEPS, BASE_STEPS = 100, 200  # steps of a training, and of the base that is trained here
QUESTIONS, TEXTS = 400, 24  # numbers of questions or texts that judge a run
SHORT = 400  # characters of GSM8K's question and answer; longer ones would cost too much
# most loss of the best fall, or of right answers; least share of the best fall in every case
MOST_LOST, POINTS, LEAST = 0.05, 0.03, 0.8
NOTE = (
    "Each task is taught by each method, and each has each number of rows once. Given rates were tried with"
    " the first seed, from a middle one of seven to the better side, until the best had a worse one on both"
    " sides. The other seeds trained at that best rate. So the chosen rate may come out better than the best"
    " given one."
)


@dataclasses.dataclass(frozen=True)
class Task:
    """A base and its data. `test` has questions if right answers are counted, else texts."""

    base: pathlib.Path
    train: pathlib.Path
    test: pathlib.Path
    flags: list[str]
    counted: bool = False

    @property
    def config(self) -> Config:
        """The settings that decide how the test's texts are read."""
        return parse([*self.words, "--ctx_len", "1024", "--micro_bsz", "4"])

    @property
    def words(self) -> list[str]:
        own = as_flags(epoch_steps=STEPS, eval_steps=STEPS // 2, eval_samples=0)
        return ["--load_model", str(self.base), "--data_file", str(self.train), *self.flags, *own]


def sort(folder: pathlib.Path, data: pathlib.Path, rows: int) -> Task:
    """Make the demo's task: a base that reverses letters learns to sort them."""
    held_out = demo_task.rows("sort", QUESTIONS, 1)
    asked = {turn["content"].split()[-1] for row in held_out for turn in row["messages"][::2]}
    return Task(
        ROOT / "demo/rwkv7-reverse.pth",
        write_rows(folder / "train.jsonl", demo_task.rows("sort", rows, 2, asked)),
        write_rows(folder / "test.jsonl", held_out),
        as_flags(ctx_len=128, micro_bsz=4),
        counted=True,
    )


def gsm8k(folder: pathlib.Path, data: pathlib.Path, rows: int) -> Task:
    """Make a task in which a small English RWKV-6 learns the form of GSM8K's answers."""

    def short(name: str) -> list[dict]:
        lines = (data / f"gsm8k_{name}.jsonl").read_text(encoding="utf-8").splitlines()
        found = [row for row in map(json.loads, lines) if len(row["question"] + row["answer"]) <= SHORT]
        random.Random(0).shuffle(found)
        return found

    return Task(
        data / "real/rwkv6-3m-utf16.pth",
        write_rows(folder / "train.jsonl", short("train")[:rows]),
        write_rows(folder / "test.jsonl", short("test")[:TEXTS]),
        ["--tokenizer", "utf16", *as_flags(ctx_len=512, micro_bsz=1)],
    )


def pieces(text: str, size: int, rows: int, folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Write random pieces of a text: a file to train on, and a file that judges."""
    parts = [{"text": text[at : at + size]} for at in range(0, len(text) - size, size)]
    random.Random(0).shuffle(parts)
    test = SHORT * TEXTS // size
    return (
        write_rows(folder / "train.jsonl", parts[test : test + rows]),
        write_rows(folder / "test.jsonl", parts[:test]),
    )


def shakespeare(folder: pathlib.Path, data: pathlib.Path, rows: int) -> Task:
    """Make a task in which gsm8k()'s base learns Shakespeare."""
    files = pieces((data / "tinyshakespeare.txt").read_text(), 128, rows, folder)
    flags = as_flags(tokenizer="utf16", ctx_len=128, micro_bsz=4)
    return Task(data / "real/rwkv6-3m-utf16.pth", *files, flags)


def capitals(folder: pathlib.Path, data: pathlib.Path, rows: int) -> Task:
    """Make a task in which a base of one half of Shakespeare learns the other half in capitals.

    The base is trained here. Without capitals it knows the other half almost as well as its own.
    """
    text = (data / "tinyshakespeare.txt").read_text()
    half, base = len(text) // 2, folder.parent / "base"
    if not (base / "model.pth").exists():
        base.mkdir(exist_ok=True)
        (first := base / "first-half.txt").write_text(text[:half])
        flags = as_flags(data_file=first, tokenizer="bytes", version="x070", peft="none", lr_init=2e-3)
        size = as_flags(n_layer=12, n_embd=64, head_size=32, ctx_len=256, micro_bsz=8)
        train(base / "run", [*flags, *size, *as_flags(epoch_steps=BASE_STEPS, eval_samples=0)], base / "log")
        shutil.move(base / "run/model.pth", base / "model.pth")
    files = pieces(text[half:].upper(), 256, rows, folder)
    return Task(base / "model.pth", *files, as_flags(tokenizer="bytes", ctx_len=256, micro_bsz=2))


TASKS = {"sort": sort, "shakespeare": shakespeare, "gsm8k": gsm8k, "capitals": capitals}


def schedule_free(groups: list[dict], config: Config, rate: float) -> torch.optim.Optimizer:
    """Make schedule-free AdamW, which trains at one point and is read at the mean of such points."""

    class Optimizer(importlib.import_module("schedulefree").AdamWScheduleFree):
        def step(self, closure=None):
            self.train()
            loss = super().step(closure)
            self.eval()
            return loss

    return Optimizer(groups, lr=rate, betas=(config.beta1, config.beta2), eps=config.adam_eps)


def prodigy(groups: list[dict], config: Config, rate: float) -> torch.optim.Optimizer:
    """Make Prodigy, which finds a factor of the rate 1 while it trains."""

    class Optimizer(importlib.import_module("prodigyopt").Prodigy):
        def step(self, closure=None):
            loss = super().step(closure)
            for state in self.state.values():
                state["step"] = torch.as_tensor(state["step"])  # checkpoints hold tensors alone
            return loss

    groups = [group | {"lr": rate} for group in groups]  # Prodigy refuses groups with different rates
    betas = (config.beta1, config.beta2)
    return Optimizer(groups, lr=rate, betas=betas, use_bias_correction=True, safeguard_warmup=True)


# package -> (maker of the optimizer, rate (0: the chosen one), schedule)
OPTIMIZERS = {
    "schedulefree": (schedule_free, 0.0, "constant"),
    "prodigyopt": (prodigy, 1.0, "cos"),
}


class NotDone(Exception):
    """A training is missing, and --only_finished forbids doing it."""


class Trainings:
    """The trainings of a case, each done once: finished ones are in TASK/METHOD.jsonl of the folder."""

    def __init__(self, name: str, method: str, args: argparse.Namespace, layers: str = ""):
        self.rows = ROWS[(list(TASKS).index(name) + list(RATES).index(method)) % len(ROWS)]
        self.method, self.layers, self.only_finished = method, layers, args.only_finished
        self.folder = args.out / name / f"{method} {layers}".strip().replace(":", "-")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.task = TASKS[name](self.folder, args.data, self.rows)
        self.lines = Lines(self.folder / "trainings.jsonl", "seed", "rate")

    def at(self, rate: float | str, seed: int) -> dict:
        """Return the line of the training at a rate, with a seed of adapter and order.

        The rate may be "auto", "base" for no training, or the package of an optimizer. Raises NotDone for a
        missing training with --only_finished.
        """
        line = {"seed": seed, "rate": rate}
        if self.only_finished and line not in self.lines:
            raise NotDone
        return self.lines.of(line, lambda: self._train(rate, seed))

    def loss(self, rate: float | str, seed: int) -> float:
        """Return a number that is lower for a better training."""
        figure = self.at(rate, seed)["figure"]
        if figure is None or math.isnan(figure):
            return math.inf
        return -figure if self.task.counted else figure

    def _train(self, rate: float | str, seed: int) -> dict:
        """Do a run; return its figure, None if it diverged, its CPU time, and its rate."""
        if rate == "base":
            return {"figure": judge(self.task, "none", str(self.task.base))}
        adamw, flags = trainer.adamw, []
        folder = self.folder / f"{seed}-{rate}"
        if rate in OPTIMIZERS:
            adamw, rate, schedule = OPTIMIZERS[rate]
            rate = rate or self.at("auto", seed)["lr_init"]
            flags = as_flags(lr_schedule=schedule, rollback_steps=0)  # rollback can copy tensors alone
        flags += as_flags(peft=self.method, layers=self.layers, random_seed=seed, lr_init=rate)
        begun, ran = time.process_time(), None
        try:
            with mock.patch.object(trainer, "adamw", adamw):
                ran = train(folder, [*self.task.words, *flags], self.folder / "log")
        except UserError:
            if not (folder / "metrics.jsonl").exists():
                raise  # another error than a divergence
        done = {"figure": None, "cpu_seconds": round(time.process_time() - begun, 1), "commit": commit()}
        if ran:
            summary = ran.summary
            early = summary.get("best_step", summary["steps"]) < summary["steps"]
            trained = summary["best"] if early else summary["output"]
            done |= {"steps": summary["steps"], "lr_init": ran.settings["lr_init"]}
            done["figure"] = judge(self.task, self.method, trained)
        shutil.rmtree(folder, ignore_errors=True)
        return done


def judge(task: Task, method: str, trained: str) -> float:
    """Return the share of right answers, or the loss in nats per token, of a run's output file."""
    files = {"path": trained} if method == "none" else {"path": task.base, "adapter": trained}
    kind = task.config.tokenizer  # the 3M model's file does not record its tokenizer
    model, tokenizer = load(**files, tokenizer=kind, precision="fp32", accelerator="cpu")
    template = recorded_template("auto", tokenizer, trained)
    if not task.counted:
        return test_loss(task, model, tokenizer, template)
    questions = read_questions(task.test, template)
    limit = answer_limit("exact", tokenizer, questions)
    return exact_accuracy(model, tokenizer, questions, Asking(limit, template))[0]


def test_loss(task: Task, model, tokenizer, template: Template) -> float:
    config = task.config
    encoder = Encoder(tokenizer, template, config.loss_mask)
    reading = Reading.of(config)
    tokens = load_documents(str(task.test), encoder, "none", reading, Report(config.on_bad_row, ""), 0)
    return held_out_loss(model, source_of(config), tokens.documents(config.ctx_len))


def best_rate(trainings: Trainings, seed: int) -> float:
    """Return the rate of the best training with this seed; its neighbours have been tried, too."""
    return best_of(enclose(lambda rate: trainings.loss(rate, seed), RATES[trainings.method], most=7))


def compared(trainings: Trainings, name: str, seeds: list[int], optimizers: Sequence[str]) -> Iterator[Case]:
    """Yield the case of each seed, and do its missing trainings first."""
    for seed in seeds:
        chosen = trainings.at("auto", seed)["lr_init"]
        best = best_rate(trainings, seeds[0])
        rates = {"best": best, "chosen": "auto"}
        for package in optimizers if seed == seeds[0] else ():
            if not trainings.only_finished or (seed, package) in trainings.lines.done:
                rates[package] = package
        figures = {kind: trainings.at(rate, seed)["figure"] for kind, rate in rates.items()}
        figures["base"] = trainings.at("base", seeds[0])["figure"]
        kinds = (trainings.method, trainings.rows, seed, trainings.task.counted)
        yield Case(name, *kinds, best, chosen, figures)


@dataclasses.dataclass(frozen=True)
class Case:
    """A task, a method and a seed. Figures are shares of right answers if `counted`, else losses."""

    task: str
    method: str
    rows: int
    seed: int
    counted: bool
    best_rate: float
    chosen_rate: float
    figures: Mapping[str, float | None]  # base, best, chosen, or a package -> figure; None: diverged

    @property
    def name(self) -> str:
        return f"{self.task} {self.method} {self.seed}"

    def share(self, kind: str) -> float:
        """Return a training's gain as a share of the gain at the best given rate; -inf if it diverged."""
        figure = self.figures.get(kind)
        if figure is None:
            return -math.inf
        base, best = self.figures["base"], self.figures["best"]
        return round((figure - base) / (best - base), 4)

    @property
    def is_near(self) -> bool:
        """Tell whether the chosen rate is within MOST_LOST of the best fall, or POINTS of right answers."""
        if self.counted and self.figures["chosen"] is not None:
            return round(self.figures["best"] - self.figures["chosen"], 6) <= POINTS
        return self.share("chosen") >= 1 - MOST_LOST

    def text(self, kind: str, rate: float | None = None) -> str:
        """Write a figure and its share for people."""
        figure = self.figures.get(kind)
        if figure is None:
            return "diverged" if kind in self.figures else "-"
        words = f"{100 * figure:.1f} %" if self.counted else f"{figure:.4f}"
        at = "" if rate is None else f"{rate:.2g}: "
        return f"{at}{words}" + ("" if kind in ("base", "best") else f" ({100 * self.share(kind):.0f} %)")


def table(cases: Sequence[Case], optimizers: Sequence[str]) -> Table:
    """Make a row for each case."""
    columns = ["task", "method", "rows", "seed", "before", "best rate", "chosen rate"]
    rows = [
        (
            *(one.task, one.method, one.rows, one.seed, one.text("base"), one.text("best", one.best_rate)),
            one.text("chosen", one.chosen_rate) + ("" if one.is_near else ", **missed**"),
            *map(one.text, optimizers),
        )
        for one in cases
    ]
    return Table(
        "Results are right answers, or the loss in nats a token; in brackets their share of the gain that the"
        " best given rate brings. schedulefree trains at the chosen rate.",
        [*columns, *optimizers],
        rows,
    )


def draw(cases: Sequence[Case], optimizers: Sequence[str]) -> Callable[..., None]:
    """Make a function that fills a figure: each case's share of the best gain."""

    def fill(figure) -> None:
        axes = figure.subplots()
        for kind, mark in zip(("chosen", *optimizers), "o+^"):
            shown = [
                min(max(one.share(kind), 0.0), 1.2) if kind in one.figures else math.nan for one in cases
            ]
            axes.plot(shown, mark, label=kind)
        axes.axhline(1 - MOST_LOST, color="grey", linestyle=":", label="95 %")
        axes.set(ylabel="share of the gain by the best given rate\n(0 to 1.2)")
        axes.set_xticks(range(len(cases)), [one.name for one in cases], rotation=75, fontsize="small")
        axes.legend(fontsize="small")

    return fill


def verdicts(cases: Sequence[Case]) -> dict[str, list[str]]:
    """Name the cases that miss each bound."""
    return {
        "missed": [one.name for one in cases if not one.is_near],
        "below 80 % of the gain": [one.name for one in cases if one.share("chosen") < LEAST],
    }


def main() -> None:
    parser = experiment.parser(__doc__, "first-run", tasks=TASKS, methods=RATES)
    parser.set_defaults(seeds=[0, 1], methods=METHODS)
    installed = [package for package in OPTIMIZERS if importlib.util.find_spec(package)]
    parser.add_argument("--optimizers", nargs="*", choices=OPTIMIZERS, default=installed, help="packages")
    args = experiment.parsed(parser)
    cases, unfinished, everything = [], [], {}
    for name, method in itertools.product(args.tasks, args.methods):
        trainings, done = Trainings(name, method, args), set()
        with contextlib.suppress(NotDone):
            for one in compared(trainings, name, args.seeds, args.optimizers):
                cases.append(one)
                done.add(one.seed)
                print(f"{one.name}: {one.text('chosen', one.chosen_rate)}", flush=True)
        if not done:
            unfinished.append(f"{name} {method}")
        else:
            unfinished += [f"{name} {method} {seed}" for seed in args.seeds if seed not in done]
            everything[f"{name} {method}"] = list(trainings.lines.done.values())
    sums = verdicts(cases) | {"not measured": unfinished}
    parts = [
        "# A first run compared with the best learning rate",
        f"{len(cases) - len(sums['missed'])} of {len(cases)} cases have at least 95 % of the best fall of the"
        f" loss, or are within 3 points of the most right answers. {experiment.in_words(sums)}",
        NOTE,
        "{plot}",
        "{table}",
        experiment.cpu_minutes([line for lines in everything.values() for line in lines]),
        f"Again: `python -m benchmarks.first_run --report docs/results`, {experiment.NEEDS_DATA}.",
    ]
    sums |= {"cases": len(cases), "trainings": everything}
    found = table(cases, args.optimizers)
    experiment.publish("first-run", args.report, parts, found, draw(cases, args.optimizers), **sums)


if __name__ == "__main__":
    main()
