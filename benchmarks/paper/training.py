"""Trainings of real small models, each done once: finished ones are kept in a file of JSON lines, from which
a stopped experiment goes on.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from rwkv_miss import UserError
from src import ops
from src.common.files import append_line, write_lines
from src.config import Config
from src.data.collate import collate
from src.data.dataset import Documents
from src.model import RWKV
from src.planning.base_model import build_model
from src.sources import source_of
from src.training.short_runs import held_out_loss, train

from .settings import option
from .training_tasks import TEXTS, Task, load_task

PAPER_LR = 2e-5
# exponents of the rates that may be tried, in half decades: from 1e-6 to 1, beginning with 1e-3
LOWEST, HIGHEST, START = (-12, 0, -6)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of all training experiments. In a pair the first value is for text, the second for answers."""

    tasks: tuple[str, ...] = option(
        ("shakespeare", "gsm8k", "digits"), "what is taught: shakespeare, gsm8k, digits, letters"
    )
    seeds: tuple[int, ...] = option(
        (0, 1, 2), "of adapter and order of the rows; the first chooses the learning rate"
    )
    steps: tuple[int, ...] = option((100, 600), "optimizer steps, of text and of answers")
    rows: tuple[int, ...] = option((4, 16), "rows in a step")
    train: tuple[int, ...] = option((4000, 10000), "rows to train on")
    held_out: tuple[int, ...] = option((64, 200), "rows held out")
    characters: int = option(64, "characters of a row of text, each two tokens")
    data: str = option(
        "../shared/data", "folder of real/*.pth, tinyshakespeare.txt and gsm8k_*.jsonl; letters needs none"
    )
    runs: str = option(
        "out/paper-runs.jsonl",
        "file that keeps finished trainings, which are not repeated on the same base, rows and settings: "
        "remove it to measure anew, as after a change of a method; '': none",
    )


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: `rows` rows in each of `steps` steps; full fine-tuning has the method "none"."""

    task: str
    method: str
    options: dict[str, Any]
    lr: float
    seed: int
    steps: int
    rows: int
    data: list[int]  # rows to train on, held-out rows, characters
    digest: str  # hash of the base and the rows


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Losses in nats per trained token: of each step, and after training on held-out rows and on as many
    training rows; None for a loss that is not finite. For held-out answers also the share of right tokens,
    and the share of answers that are wholly right; None for text.
    """

    parameters: int
    losses: list[float]
    held_out: float | None
    seen: float | None
    tokens_right: float | None
    answers_right: float | None
    seconds: float


class Runs:
    """The trainings of an experiment; finished ones are in the file settings.runs. Raises UserError if a
    task's files are absent, or for a wrong number.
    """

    def __init__(self, settings: Settings):
        for name in ("steps", "rows", "train", "held_out"):
            if min(getattr(settings, name)) < 1:
                raise UserError(f"--{name} {' '.join(map(str, getattr(settings, name)))}: must be at least 1")
        self.settings = settings
        self.tasks = {name: load_task(name, settings.data, *self.data(name)) for name in settings.tasks}
        self.kept = Kept(settings.runs)

    def data(self, task: str) -> list[int]:
        return [
            self.own(self.settings.train, task),
            self.own(self.settings.held_out, task),
            self.settings.characters,
        ]

    @staticmethod
    def own(values: tuple[int, ...], task: str) -> int:
        """Choose the task's value of a pair: the first for text, the last for answers."""
        return values[0 if task in TEXTS else -1]

    def at_rate(self, task: str, method: str, options: dict[str, Any], lr: float) -> list[Outcome]:
        """Do one training for each seed."""
        return [self.train(task, method, options, lr, seed) for seed in self.settings.seeds]

    def at_best_rate(
        self, task: str, method: str, options: dict[str, Any], start: int = START
    ) -> tuple[int, list[Outcome]]:
        """Return (exponent of the rate with the first seed's lowest held-out loss, searched from `start`; the
        trainings at this rate).
        """
        found = climb(
            lambda lr: self.train(task, method, options, lr, self.settings.seeds[0]).held_out, start
        )
        best = min(found, key=found.get)
        return best, self.at_rate(task, method, options, rate(best))

    def train(self, task: str, method: str, options: dict[str, Any], lr: float, seed: int) -> Outcome:
        """Do a training, or look it up."""
        steps, rows = self.own(self.settings.steps, task), self.own(self.settings.rows, task)
        run = Run(task, method, options, lr, seed, steps, rows, self.data(task), self.tasks[task].digest)

        def make() -> dict[str, Any]:
            outcome = _train(run, self.tasks[run.task])
            shown = "not finite" if outcome.held_out is None else f"{outcome.held_out:.4f}"
            print(
                f"{run.task} {run.method} {run.options} lr {run.lr:g} seed {run.seed}: held out {shown},"
                f" {outcome.seconds:.1f} s",
                flush=True,
            )
            return dataclasses.asdict(outcome)

        return Outcome(**self.kept.of(dataclasses.asdict(run), make))


class Kept:
    """Outcomes of runs, in memory and in a file of JSON lines; without a path in memory alone."""

    def __init__(self, path: str):
        self.path, self.done = path, {}
        if path and os.path.exists(path):
            lines = list(_whole_lines(pathlib.Path(path).read_text(encoding="utf-8")))
            write_lines(path, lines)  # without a last line that was cut off
            self.done = {self._key(line["run"]): line["outcome"] for line in lines}
        elif path:
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)

    def __contains__(self, run: dict[str, Any]) -> bool:
        return self._key(run) in self.done

    def of(self, run: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the kept outcome of a run, or make it now."""
        if run not in self:
            outcome = self.done[self._key(run)] = make()
            if self.path:
                append_line(self.path, {"run": run, "outcome": outcome})
        return self.done[self._key(run)]

    @staticmethod
    def _key(run: dict[str, Any]) -> str:
        return json.dumps(run, sort_keys=True)


def _whole_lines(text: str):
    for line in text.splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def untouched(task: Task) -> list[float | None]:
    """Measure the base: held-out loss, share of right tokens, share of right answers."""
    config = Config(
        load_model=str(task.base), peft="none", precision="fp32", micro_bsz=16, ctx_len=task.width, grad_cp=0
    )
    model = build_model(config, task.arch, "torch", torch.float32)
    return [
        held_out_loss(model, source_of(config), task.held_out),
        *(right(model, task.held_out) if task.answers else (None, None)),
    ]


def _train(run: Run, task: Task) -> Outcome:
    started = time.perf_counter()
    config = Config(
        load_model=str(task.base),
        peft=run.method,
        peft_config=run.options,
        micro_bsz=run.rows,
        grad_cp=0,
        ctx_len=task.width,
        packing=False,
        lr_init=run.lr,
        warmup_steps=0,
        lr_schedule="cos",
        random_seed=run.seed,
        precision="fp32",
    ).settled()
    torch.manual_seed(run.seed)
    model = build_model(config, task.arch, ops.choose("auto", "cpu", task.arch.head_size)[0], torch.float32)
    losses = list(train(model, source_of(config), task.train, run.steps))
    looks: list[float | None] = [None] * 4
    if math.isfinite(losses[-1]):
        seen = task.train.take(np.arange(min(len(task.train), len(task.held_out))))
        looks = [held_out_loss(model, source_of(config), rows) for rows in (task.held_out, seen)] + [
            *(right(model, task.held_out) if task.answers else ())
        ]
        looks = [
            *(round(look, 5) if math.isfinite(look) else None for look in looks),
            *[None] * (4 - len(looks)),
        ]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Outcome(
        trained,
        [round(loss, 4) if math.isfinite(loss) else None for loss in losses],
        *looks,
        round(time.perf_counter() - started, 2),
    )


@torch.no_grad()
def right(model: RWKV, documents: Documents) -> tuple[float, float]:
    """Return (share of answer tokens that are the likeliest after the right tokens before them, share of
    answers with such tokens only, which are the right greedy answers).
    """
    batch = collate([[row] for row in documents], 1)
    with ops.nan_passes():
        guesses = model(batch.ids)[0].argmax(-1)
    hits = guesses.flatten()[batch.where] == batch.targets
    right = torch.ones_like(guesses, dtype=torch.bool)
    right.view(-1)[batch.where] = hits
    return float(hits.float().mean()), float(right.all(1).float().mean())


def rate(exponent: int) -> float:
    """Round to half decades: rate(-4) = 0.01, rate(-5) = 0.003."""
    return float(f"{10 ** (exponent / 2) * 0.95:.1g}") if exponent % 2 else 10.0 ** (exponent // 2)


def climb(loss: Callable[[float], float | None], start: int) -> dict[int, float]:
    """Map exponents to loss(rate), in half decades from `start`, until the best rate is between two worse
    ones.
    """
    found: dict[int, float] = {}
    wanted = [start]
    while wanted:
        value = loss(rate(wanted[0]))
        found[wanted[0]] = math.inf if value is None else value
        best = min(found, key=lambda k: (found[k], k))  # if all diverge, the lowest rate
        wanted = [k for k in (best + 1, best - 1) if k not in found and LOWEST <= k <= HIGHEST]
    return found


@dataclasses.dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over the seeds; NaN if a training has no such number."""

    mean: float
    sd: float

    @classmethod
    def of(cls, outcomes: list[Outcome], name: str) -> Spread:
        values = [getattr(outcome, name) for outcome in outcomes]
        return cls(math.nan, math.nan) if None in values else cls.over(values)

    @classmethod
    def over(cls, values: list[float]) -> Spread:
        return cls(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan)

    def below(self, other: Spread, seeds: int) -> bool | None:
        """Tell whether the mean is lower than another one; None if they are level, or neither is finite.

        Means within two standard errors of each other are level. With one seed there is no error, and the
        lower mean counts as lower.
        """
        if math.isnan(self.mean) or math.isnan(other.mean):
            return None if math.isnan(self.mean) == math.isnan(other.mean) else math.isnan(other.mean)
        error = math.hypot(self.sd, other.sd) / math.sqrt(seeds)
        return None if abs(self.mean - other.mean) <= 2 * error else self.mean < other.mean

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "-"
        if math.isnan(self.sd):
            return f"{self.mean:.4f}"
        return f"{self.mean:.4f} ± {self.sd:.4f}"


WORDS = {True: "below", False: "above", None: "level with"}  # words for results of below()


def below(a: list[Outcome], b: list[Outcome]) -> bool | None:
    """Tell whether a's held-out losses are lower than b's; None if they are level, see Spread.below()."""
    return Spread.of(a, "held_out").below(Spread.of(b, "held_out"), len(a))
