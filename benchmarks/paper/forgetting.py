"""Forgetting of MiSS, Bat, LoRA and DoRA at equal gain, each at its own searched rate; and the right answers
that a base in 8 or 4 bits costs.

There are also trainings at half and at twice each rate.

Two bases learn a task; during the training their knowledge of a text that is not trained is measured.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import rwkv_miss
from rwkv_miss import UserError
from rwkv_miss.adapter_file import adapter_tensors
from rwkv_miss.quantised import CODES
from src import ops
from src.config import Config
from src.data.collate import collate
from src.data.dataset import Documents
from src.evaluation.kl_divergence import divergence
from src.model import RWKV
from src.planning.base_model import build_model
from src.planning.defaults import WARM_UP, chosen_rate
from src.sources import source_of
from src.training.short_runs import put_back, train, trial_of

from ..rates import best_of, enclose
from .methods import LINEAR, equal
from .results import Claim, PaperResult, Table
from .settings import option
from .training import WORDS, Runs, Spread
from .training import Settings as Training
from .training_tasks import TEXTS, Task, from_pairs, of_letters, windows

FACTORS = (0.5, 1.0, 2.0)  # rates of the trainings, times the searched rate
# the search: steps of a trial, steps of its warm-up, usual number of trials, most trials
TRIAL_STEPS, TRIAL_WARM_UP, USUAL_TRIALS, MOST_TRIALS = 15, 5, 4, 7
SHARES = (0.5, 0.9)  # forgetting is compared at these shares of the gain that every method reaches
JUDGED = 64  # rows of the training data that decide between rates, and are not trained on
ADAPTED = "miss"  # the method of the quantised bases
PAPER = "MiSS forgets 0.197 where LoRA forgets 0.050, at LoRA's rate of 1e-4 (HF peft's table of 2026)"


@dataclasses.dataclass(frozen=True)
class Settings(Training):
    methods: tuple[str, ...] = option(("miss", "bat", "lora", "dora"), "what is compared")
    rank: tuple[int, ...] = option((8, 4), "LoRA's rank; the others have about as many parameters")
    looks: tuple[int, ...] = option((3, 5), "measurements along a training, the last one at its end")
    quant: tuple[str, ...] = option(("int8", "nf4"), "quantised bases: int8, nf4")


FULL = Settings(
    tasks=("gsm8k", "letters"),
    steps=(24, 80),
    rows=(2, 8),
    train=(2000, 8000),
    held_out=(24, 120),
    characters=48,
    runs="out/forgetting.jsonl",
)
TINY = Settings(
    tasks=("letters",),
    seeds=(0, 1),
    steps=(4,),
    rows=(4,),
    train=(100,),
    held_out=(8,),
    runs="",
    methods=("miss", "lora"),
    rank=(4,),
    looks=(2,),
    quant=("nf4",),
)


@dataclasses.dataclass(frozen=True)
class Look:
    """Knowledge of a model: loss and accuracy of the task's held-out rows and of the text that is not
    trained, and KL(base || model) on that text, in nats a token.
    """

    step: int
    loss: float
    accuracy: float
    other_loss: float
    other_accuracy: float
    kl: float

    def gain(self, by: str) -> float:
        """Return the accuracy, or minus the loss, on the task."""
        return self.accuracy if by == "accuracy" else -self.loss


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A training: its looks. after: the look of its merge into the unquantised base ("merged"), and for each
    kind of quantisation the look of the quantised merge. A look is None if the model is not finite.
    """

    parameters: int
    looks: list[Look]
    after: dict[str, Look | None]
    seconds: float  # CPU time

    @classmethod
    def of(cls, kept: dict[str, Any]) -> Outcome:
        after = {name: look and Look(**look) for name, look in kept["after"].items()}
        return cls(kept["parameters"], [Look(**look) for look in kept["looks"]], after, kept["seconds"])


@torch.no_grad()
def answered(model: RWKV, documents: Documents, whole: bool) -> tuple[float, float, Tensor]:
    """Return (loss in nats a token, accuracy, logits (n, V)) of the documents' trained tokens.

    The accuracy is the share of answers whose tokens all are the likeliest; for a text it is the share of
    characters that are the likeliest. A character's second byte, 0, is not counted.
    """
    batch = collate([[row] for row in documents], 1)
    was_training = model.training
    with ops.nan_passes():
        logits = model.eval()(batch.ids)[0].flatten(0, 1)[batch.where]
    model.train(was_training)
    targets = batch.targets
    hits = logits.argmax(-1) == targets
    if whole:
        right = torch.ones(batch.ids.numel(), dtype=torch.bool)
        right[batch.where] = hits
        share = right.view_as(batch.ids).all(1)
    else:
        share = hits[targets != 0]
    return float(torch.nn.functional.cross_entropy(logits, targets)), float(share.float().mean()), logits


class Exam:
    """The questions to a base and its descendants: the task's, and a text or a task that is not trained."""

    def __init__(self, name: str, task: Task, settings: Settings):
        self.task, self.whole = task, name not in TEXTS
        rows = Runs.own(settings.held_out, name)
        if self.whole:
            self.other = from_pairs(of_letters("reverse", rows, 0))
        else:
            file = pathlib.Path(settings.data, "lambada_test.jsonl")
            if not file.is_file():
                raise UserError(f"task {name} needs {file.name} in --data {settings.data}; give its folder")
            lines = file.read_text(encoding="utf-8").splitlines()
            text = " ".join(json.loads(line)["text"] for line in lines)
            self.other = windows(text, rows, settings.characters, 0)
        self.train, self.judged = split(task.train)

    @functools.cached_property
    def digest(self) -> str:
        return f"{self.task.digest} {self.other.digest}"

    def build(self, method: str, options: dict[str, Any], quant: str = "none", **settings) -> RWKV:
        """Build the base with an adapter, or without one."""
        config = self.config(method, options, quant, **settings)
        torch.manual_seed(config.random_seed)
        kernel = ops.choose("auto", "cpu", self.task.arch.head_size)[0]
        model = build_model(config, self.task.arch, kernel, torch.float32)
        if method == "none" and quant != "none":  # only an adapter has a frozen base
            model.requires_grad_(False).quantise(quant, torch.float32)
        return model

    def config(self, method: str, options: dict[str, Any], quant: str = "none", **settings) -> Config:
        return Config(
            load_model=str(self.task.base),
            peft=method,
            peft_config=options,
            quant="none" if method == "none" else quant,
            grad_cp=0,
            ctx_len=self.task.width,
            packing=False,
            precision="fp32",
            **{"lr_schedule": "cos", **settings},
        ).settled()

    @functools.cached_property
    def base(self) -> RWKV:
        return self.build("none", {})

    @functools.cached_property
    def base_logits(self) -> Tensor:
        return answered(self.base, self.other, self.whole)[2]

    @functools.cached_property
    def before(self) -> Look:
        """The look at the base."""
        return self.look(self.base, 0)

    def look(self, model: RWKV, step: int) -> Look | None:
        """Measure a model; None if its logits are not finite."""
        loss, accuracy, _ = answered(model, self.task.held_out, self.whole)
        other_loss, other_accuracy, logits = answered(model, self.other, self.whole)
        kl = float(divergence(self.base_logits, logits).mean().clamp(min=0))
        look = Look(step, *(round(x, 5) for x in (loss, accuracy, other_loss, other_accuracy, kl)))
        return look if all(map(math.isfinite, dataclasses.astuple(look))) else None


def split(rows: Documents) -> tuple[Documents, Documents]:
    """Return (the rows to train on, the rows that decide between rates)."""
    judged = min(JUDGED, len(rows) // 4)
    return rows.take(np.arange(judged, len(rows))), rows.take(np.arange(judged))


class Trainings:
    """The trainings of the experiment, each done once."""

    def __init__(self, settings: Settings):
        self.settings, self.runs = settings, Runs(settings)
        self.exams = {name: Exam(name, task, settings) for name, task in self.runs.tasks.items()}

    def own(self, name: str, task: str) -> int:
        return self.runs.own(getattr(self.settings, name), task)

    def options(self, task: str, method: str) -> dict[str, Any]:
        width = self.exams[task].task.arch.n_embd
        return equal(method, {}, self.own("rank", task), width, width)

    def described(self, task: str, method: str, **more: Any) -> dict[str, Any]:
        run = {"task": task, "method": method, "options": self.options(task, method)}
        run |= {"rows": self.own("rows", task), "data": self.runs.data(task), **more}
        return run | {"digest": self.exams[task].digest}

    def rate(self, task: str, method: str) -> float:
        """Return the rate that a search finds, with the first seed."""
        run = self.described(task, method, search=TRIAL_STEPS, seed=self.settings.seeds[0])
        return self.runs.kept.of(run, lambda: searched(self.exams[task], run))["rate"]

    def run(self, task: str, method: str, lr: float, seed: int, quant: str = "") -> dict[str, Any]:
        """Describe a training. With `quant`, also "none", there are looks at the merged and quantised
        model."""
        sizes = {"steps": self.own("steps", task), "looks": self.own("looks", task)}
        return self.described(task, method, lr=lr, seed=seed, quant=quant, **sizes)

    def outcome(self, run: dict[str, Any]) -> Outcome:
        def make() -> dict[str, Any]:
            outcome = trained(self.exams[run["task"]], run)
            last = outcome.looks[-1]
            print(
                f"{run['task']} {run['method']} lr {run['lr']:g} seed {run['seed']} {run['quant']}: accuracy"
                f" {last.accuracy:.1%}, KL {last.kl:.4f}, {outcome.seconds:.1f} CPU s",
                flush=True,
            )
            return dataclasses.asdict(outcome)

        return Outcome.of(self.runs.kept.of(run, make))

    def at(self, task: str, method: str, factor: float) -> list[Outcome]:
        """Do the trainings at a multiple of the method's rate, one for each seed."""
        rate = self.rate(task, method) * factor
        judged = "none" if method == ADAPTED and factor == 1 and self.settings.quant else ""
        return [self.outcome(self.run(task, method, rate, seed, judged)) for seed in self.settings.seeds]

    def crossed(self, task: str) -> list[Outcome]:
        """Do the trainings of MiSS at LoRA's rate."""
        rate = self.rate(task, "lora")
        if rate == self.rate(task, ADAPTED):
            return self.at(task, ADAPTED, 1.0)
        return [self.outcome(self.run(task, ADAPTED, rate, seed)) for seed in self.settings.seeds]

    def on_quantised(self, task: str, quant: str) -> list[Outcome]:
        """Do the trainings on a quantised base."""
        rate = self.rate(task, ADAPTED)
        return [self.outcome(self.run(task, ADAPTED, rate, seed, quant)) for seed in self.settings.seeds]

    def minutes(self, task: str) -> float:
        """Estimate the CPU minutes of a task with nothing done yet, from a few steps and a look."""
        exam, run = self.exams[task], self.run(task, self.settings.methods[0], 1e-4, self.settings.seeds[0])
        model, config = prepared(exam, run)

        def seconds(steps: int) -> tuple[float, float]:
            """Time a step and a look."""
            training = cpu_seconds(lambda: list(train(model, source_of(config), exam.train, steps)))
            return training / steps, cpu_seconds(lambda: exam.look(model, 0))

        seconds(1)  # not counted, because the first step and look take longer
        step, look = seconds(4)
        methods, searches = len(self.settings.methods), USUAL_TRIALS * (TRIAL_STEPS * step + look / 2)
        count = methods * len(FACTORS) + len(self.settings.quant) + 1  # 1: MiSS at LoRA's rate
        each = run["steps"] * step + run["looks"] * look
        return (count * len(self.settings.seeds) * each + methods * searches) / 60


def cpu_seconds(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def prepared(exam: Exam, run: dict[str, Any]) -> tuple[RWKV, Config]:
    """Build the model of a run with its adapter, and the settings."""
    settings = {"micro_bsz": run["rows"], "random_seed": run["seed"], "lr_init": run.get("lr", 0.0)}
    settings["warmup_steps"] = round(WARM_UP * run["steps"]) if "steps" in run else TRIAL_WARM_UP
    adapter = run["method"], run["options"], run.get("quant") or "none"
    return exam.build(*adapter, **settings), exam.config(*adapter, **settings)


def searched(exam: Exam, run: dict[str, Any]) -> dict[str, Any]:
    """Search the rate by short trainings around the chosen one."""
    begun = time.process_time()
    model, config = prepared(exam, run)
    source = source_of(dataclasses.replace(config, micro_bsz=JUDGED))  # measures all rows at once

    def loss_at(rate: float) -> float:
        tried = dataclasses.replace(config, lr_init=rate, lr_schedule="constant")
        with put_back(model):
            losses = list(train(model, source_of(tried), exam.train, TRIAL_STEPS))
            loss = trial_of(model, source, rate, losses, exam.judged).deciding_loss
        return math.inf if loss is None else loss

    tried = enclose(loss_at, chosen_rate(config, exam.task.arch), MOST_TRIALS)
    best = best_of(tried)
    print(f"{run['task']} {run['method']}: searched rate {best:g}", flush=True)
    shown = {f"{rate:g}": loss if math.isfinite(loss) else None for rate, loss in tried.items()}
    return {"rate": best, "tried": shown, "seconds": round(time.process_time() - begun, 2)}


def trained(exam: Exam, run: dict[str, Any]) -> Outcome:
    """Do a training with looks at intervals. The looks end when the model is not finite."""
    begun = time.process_time()
    model, config = prepared(exam, run)
    steps, count = run["steps"], run["looks"]
    looked_at = {round(steps * (i + 1) / count) for i in range(count)}
    looks: list[Look | None] = [exam.before]
    for step, loss in enumerate(train(model, source_of(config), exam.train, steps), 1):
        if step in looked_at or not math.isfinite(loss):
            looks.append(exam.look(model, step))
    after: dict[str, Look | None] = {}
    if run["quant"]:
        plain, adapter = exam.build(run["method"], run["options"]), adapter_tensors(model)
        with torch.no_grad():
            for name, tensor in adapter_tensors(plain).items():
                tensor.copy_(adapter[name])
        rwkv_miss.merge(plain, keep_base=False)
        rwkv_miss.unload(plain)
        after["merged"] = exam.look(plain, steps)
        for kind in CODES if run["quant"] == "none" else ():
            quantised = copy.deepcopy(plain).requires_grad_(False)
            quantised.quantise(kind, torch.float32)
            after[kind] = exam.look(quantised, steps)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    finite = [look for look in looks if look]
    return Outcome(parameters, finite, after, round(time.process_time() - begun, 2))


def at_gain(looks: Sequence[Look], gain: float, by: str, name: str) -> float | None:
    """Interpolate a figure at the point where a training first reaches a gain; None if it never does."""
    for before, after in zip(looks, looks[1:]):
        if before.gain(by) < gain <= after.gain(by):
            part = (gain - before.gain(by)) / (after.gain(by) - before.gain(by))
            low, high = getattr(before, name), getattr(after, name)
            return low + part * (high - low)
    return None


@dataclasses.dataclass(frozen=True)
class Found:
    """Results of a task: outcomes by method and factor of its rate, of MiSS at LoRA's rate, and on quantised
    bases, by kind.
    """

    before: Look
    rates: dict[str, float]
    methods: dict[str, dict[float, list[Outcome]]]
    crossed: list[Outcome]
    on_quantised: dict[str, list[Outcome]]
    bases: dict[str, Look]  # kind -> look at the quantised base, not trained
    by: str  # the gain is measured by "accuracy", or for text by "loss"

    @property
    def gains(self) -> list[float]:
        """Return the gains at which forgetting is compared: SHARES of the gain that every training at its
        method's own rate has reached.
        """
        own = [outcome.looks for rates in self.methods.values() for outcome in rates[1.0]]
        before = self.before.gain(self.by)
        reached = min(max(look.gain(self.by) for look in looks) for looks in own)
        return [before + share * (reached - before) for share in SHARES]

    def in_words(self, gain: float) -> str:
        return f"{gain:.1%} right" if self.by == "accuracy" else f"a loss of {-gain:.4f}"

    def forgotten(self, outcomes: list[Outcome], gain: float, name: str = "kl") -> Spread:
        """Return a figure at equal gain over the seeds; NaN if one of them does not reach the gain."""
        values = [at_gain(outcome.looks, gain, self.by, name) for outcome in outcomes]
        return Spread(math.nan, math.nan) if None in values else Spread.over(values)


def measure(trainings: Trainings, task: str) -> Found:
    settings, exam = trainings.settings, trainings.exams[task]
    methods = {m: {f: trainings.at(task, m, f) for f in FACTORS} for m in settings.methods}
    both = {ADAPTED, "lora"} <= methods.keys()
    quant = settings.quant if ADAPTED in methods else ()
    bases = {kind: exam.look(exam.build("none", {}, kind), 0) for kind in quant}
    return Found(
        exam.before,
        {method: trainings.rate(task, method) for method in methods},
        methods,
        trainings.crossed(task) if both else [],
        {kind: trainings.on_quantised(task, kind) for kind in quant if exam.whole},
        bases,
        "loss" if task in TEXTS else "accuracy",
    )


def ends(outcomes: list[Outcome], name: str) -> Spread:
    """Return a figure of the last look over the seeds."""
    return Spread.over([getattr(outcome.looks[-1], name) for outcome in outcomes])


def percent(spread: Spread) -> str:
    if math.isnan(spread.sd):
        return f"{spread.mean:.1%}"
    return f"{spread.mean:.1%} ± {spread.sd:.1%}"


def kept_of(task: str) -> str:
    """Name the text or task that is not trained."""
    return "LAMBADA" if task in TEXTS else "reversing"


def rows_of(found: Found) -> list[tuple[str, float, list[Outcome]]]:
    """List (method, rate, outcomes) of the tables, MiSS at LoRA's rate last."""
    rows = [
        (method, found.rates[method] * factor, outcomes)
        for method, rates in found.methods.items()
        for factor, outcomes in rates.items()
    ]
    crossed = [(f"{ADAPTED}, LoRA's rate", found.rates["lora"], found.crossed)] if found.crossed else []
    return rows + crossed


def table_of_ends(task: str, found: Found) -> Table:
    other, names, before = kept_of(task), ("loss", "KL", "accuracy"), found.before
    rows = [
        ["untouched", 0, None, f"{before.accuracy:.1%}", f"{before.loss:.4f}"]
        + [f"{before.other_loss:.4f}", "0", f"{before.other_accuracy:.1%}"]
    ]
    for method, rate, outcomes in rows_of(found):
        figures = [str(ends(outcomes, name)) for name in ("loss", "other_loss", "kl")]
        shares = [percent(ends(outcomes, name)) for name in ("accuracy", "other_accuracy")]
        rows.append([method, outcomes[0].parameters, f"{rate:g}", shares[0], *figures, shares[1]])
    return Table(
        f"{task}, after the last step: mean ± standard deviation over the seeds. The rates of a method are"
        " half of the searched one, itself and its double",
        ("method", "parameters", "lr", "accuracy", "loss", *(f"{other}: {name}" for name in names)),
        rows,
    )


def table_at_gain(task: str, found: Found) -> Table:
    other, marks = kept_of(task), [found.in_words(gain) for gain in found.gains]
    figures = [(name, gain) for name in ("kl", "other_loss") for gain in found.gains]
    rows = [
        [method, f"{rate:g}", *(str(found.forgotten(outcomes, gain, name)) for name, gain in figures)]
        for method, rate, outcomes in rows_of(found)
    ]
    names = [f"{name} at {share:.0%}" for name in ("KL", "loss") for share in SHARES]
    return Table(
        f"{task}, {other} at equal gain: where a training first has {' and '.join(marks)},"
        f" {' and '.join(f'{share:.0%}' for share in SHARES)} of the gain that all have at their own rates;"
        " between two looks on a straight line. The base has"
        f" {found.in_words(found.before.gain(found.by))}. -: a seed does not get that far",
        ("method", "lr", *names),
        rows,
    )


def quantised_rows(task: str, found: Found) -> list[list[Any]]:
    """List the rows of a task's bases: fp32, and every kind of quantisation. No text is trained on these."""
    plain = found.methods[ADAPTED][1.0]
    rows = []
    for kind, base in {"fp32": found.before, **found.bases}.items():
        own = plain if kind == "fp32" else found.on_quantised.get(kind, [])
        merged = [outcome.after["merged"] for outcome in own]
        after = merged if kind == "fp32" else [outcome.after[kind] for outcome in plain]
        row = [task, kind, f"{base.other_accuracy:.1%}", f"{base.other_loss:.4f}"]
        for looks in ([outcome.looks[-1] for outcome in own], merged, after):
            known = [percent(Spread.over([look.accuracy for look in looks]))] if looks else [None]
            row += [*known, f"{statistics.mean(look.loss for look in looks):.4f}" if looks else None]
        rows.append(row)
    return rows


def quantised_table(found: dict[str, Found]) -> Table:
    columns = ["task", "base"]
    for what in (
        "untrained: {}, not trained",
        "{}, on the quantised base",
        "{}, merged into fp32",
        "{}, quantised last",
    ):
        columns += [what.format("accuracy"), what.format("loss")]
    return Table(
        "Quantised bases, judged by answers: the base on what is not trained; the task, taught by MiSS on the"
        " quantised base; that adapter merged into the unquantised file; the model trained and merged"
        " unquantised, and quantised after that. The loss is the mean over the seeds. Text is not trained"
        " on a quantised base",
        columns,
        [row for task in found for row in quantised_rows(task, found[task])],
    )


def claims(found: dict[str, Found], seeds: int) -> list[Claim]:
    """Say which method forgets less at the end at LoRA's rate, and at equal gain at the methods' own rates;
    whether half of a rate forgets less than its double; and how many right answers 4 bits cost.
    """
    said = []
    for task, one in found.items():
        if one.crossed:
            miss, lora = ends(one.crossed, "kl"), ends(one.methods["lora"][1.0], "kl")
            verdict = miss.below(lora, seeds)
            gained = [percent(ends(o, "accuracy")) for o in (one.crossed, one.methods["lora"][1.0])]
            said.append(
                Claim(
                    PAPER,
                    f"{task}, at LoRA's rate {one.rates['lora']:g}, after the last step: MiSS has KL {miss},"
                    f" {WORDS[verdict]} LoRA's {lora}, with {gained[0]} right against {gained[1]}",
                    None if verdict is None else not verdict,
                )
            )
        said += [compared(task, one, gain, seeds, best) for best in (False, True) for gain in one.gains]
        said.append(halved(task, one, seeds))
        if "nf4" in one.on_quantised:
            plain = one.methods[ADAPTED][1.0]
            was, lost, merged = (
                Spread.over([found(outcome) for outcome in outcomes])
                for outcomes, found in (
                    (plain, lambda o: o.after["merged"].accuracy),
                    (plain, lambda o: o.after["merged"].accuracy - o.after["nf4"].accuracy),
                    (one.on_quantised["nf4"], lambda o: o.after["merged"].accuracy),
                )
            )
            rise = statistics.mean(o.after["nf4"].loss / o.after["merged"].loss - 1 for o in plain)
            said.append(
                Claim(
                    "4 bits cost 24 points of mathematics where perplexity looked mild",
                    f"{task}: {percent(was)} right in fp32; that model, quantised to nf4, loses"
                    f" {percent(lost)} (loss {rise:+.1%}); one trained on nf4 and merged into fp32 has"
                    f" {percent(merged)}",
                    Spread(0.0, 0.0).below(lost, seeds),
                )
            )
    return said


def compared(task: str, found: Found, gain: float, seeds: int, best: bool) -> Claim:
    """Say which method forgets least at equal gain, each at its own rate, or at the best of its rates."""
    least, names = {}, {}
    for method, rates in found.methods.items():
        at = {f: found.forgotten(rates[f], gain) for f in (FACTORS if best else (1.0,))}
        factor = min(at, key=lambda f: (math.isnan(at[f].mean), at[f].mean))
        least[method], names[method] = at[factor], f"{method} ({found.rates[method] * factor:g})"
    first, *others = sorted(least, key=lambda method: (math.isnan(least[method].mean), least[method].mean))
    verdicts = {other: WORDS[least[first].below(least[other], seeds)] for other in others}
    rest = [f"{verdicts[other]} {names[other]} with {least[other]}" for other in others]
    lowest = f"{names[first]} has the lowest KL, {least[first]}, {', '.join(rest)}"
    where = "the best of its three rates" if best else "its own searched rate"
    return Claim(
        f"who forgets less at equal gain, each at {where}? (not published)",
        f"{task}, where each has {found.in_words(gain)}:"
        f" {'no gain' if math.isnan(least[first].mean) else lowest}",
    )


def in_short(task: str, found: Found, seeds: int) -> str:
    """Say which methods forget less than which at their own rates, at the last of the gains."""
    gain = found.gains[-1]
    own = {method: found.forgotten(rates[1.0], gain) for method, rates in found.methods.items()}
    first = min(own, key=lambda method: (math.isnan(own[method].mean), own[method].mean))
    more = [method for method in own if own[first].below(own[method], seeds)]
    if math.isnan(own[first].mean):
        return f"on {task} there is no gain"
    if not more:
        return f"on {task} the methods are level"
    less, than = (
        f"{' and '.join(methods)} (KL {', '.join(f'{own[method].mean:.3f}' for method in methods)})"
        for methods in ([method for method in own if method not in more], more)
    )
    return f"on {task} {less} forget less than {than}"


def halved(task: str, found: Found, seeds: int) -> Claim:
    """Say whether half of a rate forgets less than its double where both have the same accuracy."""
    verdicts = {}
    for method, rates in found.methods.items():
        low, high = (found.forgotten(rates[factor], found.gains[0]) for factor in (FACTORS[0], FACTORS[-1]))
        if not math.isnan(low.mean + high.mean):
            verdicts[method] = low.below(high, seeds)
    names = ", ".join(f"{WORDS[verdict]} it with {method}" for method, verdict in verdicts.items())
    return Claim(
        "a lower rate forgets less (often said)",
        f"{task}, where each has {found.in_words(found.gains[0])}, KL at half of the rate against its double:"
        f" {names or 'not reached'}",
        None if not verdicts or None in verdicts.values() else all(verdicts.values()),
    )


def draw(found: dict[str, Found], figure) -> None:
    """Draw KL over the gain for each task: every training's looks, with a mark at its end."""
    figure.set_size_inches(6 * len(found), 5)
    styles = dict(zip(FACTORS, (":", "-", "--")))
    axes = figure.subplots(1, len(found), squeeze=False)[0]
    for axis, (task, one) in zip(axes, found.items(), strict=True):
        for number, (method, rates) in enumerate(one.methods.items()):
            for factor, outcomes in rates.items():
                for seed, outcome in enumerate(outcomes):
                    axis.plot(
                        [abs(look.gain(one.by)) for look in outcome.looks],
                        [look.kl for look in outcome.looks],
                        styles[factor],
                        color=f"C{number}",
                        linewidth=1,
                        alpha=0.7,
                        marker="o",
                        markevery=[-1],
                        label=None if seed else f"{method}, {one.rates[method] * factor:g}",
                    )
        axis.set(title=task, xlabel=f"{one.by} on the task", ylabel=f"KL on {kept_of(task)}")
        if one.by == "loss":
            axis.invert_xaxis()
        axis.legend(fontsize="x-small", ncols=2)


def figures_of(found: Found) -> dict[str, Any]:
    """Return every look for the JSON file."""
    rows = rows_of(found) + [(f"{ADAPTED} on {kind}", 0.0, o) for kind, o in found.on_quantised.items()]
    return {
        "tried": found.rates,
        "trainings": [
            {"method": method, "rate": rate, "seeds": [dataclasses.asdict(o) for o in outcomes]}
            for method, rate, outcomes in rows
        ],
    }


def run(settings: Settings) -> PaperResult:
    if not {*settings.methods} <= {*LINEAR}:
        raise UserError(f"--methods takes any of: {' '.join(LINEAR)}; got {' '.join(settings.methods)}")
    if not {*settings.quant} <= {*CODES}:
        raise UserError(f"--quant takes any of: {' '.join(CODES)}; got {' '.join(settings.quant)}")
    torch.set_num_threads(1)  # the models are small
    trainings = Trainings(settings)
    minutes = {task: trainings.minutes(task) for task in settings.tasks}
    shown = ", ".join(f"{task} {each:.1f}" for task, each in minutes.items())
    kept = f", less what {settings.runs} has" if settings.runs else ""
    print(f"takes about {sum(minutes.values()):.1f} CPU minutes of one thread ({shown}){kept}", flush=True)
    found = {task: measure(trainings, task) for task in settings.tasks}
    spent = sum(
        outcome.seconds
        for one in found.values()
        for outcomes in (*(o for _, _, o in rows_of(one)), *one.on_quantised.values())
        for outcome in outcomes
    )
    sizes = [
        f"{task} {trainings.own('steps', task)} steps of {trainings.own('rows', task)} rows, LoRA of rank"
        f" {trainings.own('rank', task)}"
        for task in found
    ]
    shorts = [in_short(task, one, len(settings.seeds)) for task, one in found.items()]
    said, quantised = claims(found, len(settings.seeds)), [quantised_table(found)] if settings.quant else []
    return PaperResult(
        "What is forgotten, at each method's own rate",
        f"**At equal gain, each method at its own searched rate: {'; '.join(shorts)}.** Means within two"
        " standard errors are level.\n\n"
        "gsm8k and shakespeare: text to a 3M-parameter RWKV-6 trained on English, two tokens a character;"
        " accuracy is the share of next characters that are the likeliest, and what is not trained is"
        " LAMBADA's English. letters: an RWKV-7 that reverses letters learns to sort them; accuracy is the"
        " share of right answers, greedy, and what is not trained is reversing. Losses and KL(base || model)"
        f" are in nats a token. The trainings are short: {', '.join(sizes)}. The methods have about as many"
        f" parameters. A method's rate is searched by short trials, with the first seed, on {JUDGED} rows of"
        " the training data that are not trained on. AdamW, 5 % warm-up, cosine, clip 1, the same rows in the"
        " same order for all. The trainings took"
        f" {spent / 60:.0f} CPU minutes.",
        said,
        [
            *(make(task, one) for task, one in found.items() for make in (table_at_gain, table_of_ends)),
            *quantised,
        ],
        lambda figure: draw(found, figure),
        {"trainings": {task: figures_of(one) for task, one in found.items()}},
    )
