"""An experiment: are preferences learnt, and how do the answers change meanwhile?

    python -m benchmarks.preferences [--data ../shared/data] [--tasks sort result] [--methods miss lora]
    [--objectives dpo ...] [--seeds 0 1 2] [--only_finished] [--out out/preferences] [--report docs/results]

Every training is a whole run of train.py on pairs, at the rate that train.py chooses, for a given number of
steps: DPO; DPO without the NLL of the chosen answers; ORPO, for twice as many steps; and supervised training
on the chosen answers, with the same number of prompts.

- sort: the demo base reverses letters. The question is to sort them; the chosen answer has them sorted, the
  rejected one reversed, as the base answers. The sorted answer is right, word for word.
- result: an English RWKV-6 of 3 million parameters and GSM8K. The question is the last sentence of a problem.
  The chosen answer is its result alone, as `#### 18`; the rejected one is the last line of the worked
  solution. So the two differ in form and length. An answer of the chosen form is right, whatever its number:
  one sentence is not enough to know the number, and the model is too small.

Measured on questions that no training has seen: the share of pairs whose chosen answer has gained more
log-probability over the base than the rejected one (reward accuracy); the share whose chosen answer is more
likely (raw accuracy); the gain of the chosen answer's log-probability; and the right greedy answers.

--data has the base and the texts of all tasks but sort: real/rwkv6-3m-utf16.pth and gsm8k_train.jsonl. They
are not part of the repository. A finished training is kept in --out, and is not repeated. --report FOLDER
gets preferences.md and preferences.png. The last line is JSON.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import pathlib
import re
import shutil
from collections.abc import Callable, Sequence

import torch

from demo import task as demo_task
from rwkv_miss.version import commit
from src.data.chat_template import Template
from src.data.encode import Encoder
from src.data.templates import recorded_template
from src.data.tokenizer import Tokenizer
from src.evaluation.likelihood import log_likelihoods
from src.inference.load import load
from src.model import RWKV

from . import experiment
from .common import as_flags
from .experiment import Lines, groups, mean, share, train, write_rows
from .paper.results import Table
from .paper.tasks import ROOT

NAMED = ("task", "objective", "method")
ACCURACY = 0.95  # least reward accuracy, in every seed
COLOURS = {"miss": "tab:blue", "lora": "tab:orange"}


@dataclasses.dataclass(frozen=True)
class LossCase:
    """Loss of a training. `target`: least share of right answers in task sort, in addition to ACCURACY."""

    name: str
    flags: list[str]
    steps_factor: int  # multiple of the task's steps
    on_pairs: bool  # False: trained on the chosen answers alone
    target: float | None = None


OBJECTIVES = {
    one.name: one
    for one in (
        LossCase("dpo", ["--loss", "dpo"], 1, True, 0.7),
        LossCase("dpo-without-nll", ["--loss", "dpo", "--sft_weight", "0"], 1, True),
        LossCase("supervised", [], 1, False),
        LossCase("orpo", ["--loss", "orpo"], 2, True, 0.8),
        LossCase("supervised-twice", [], 2, False),
    )
}

METHODS = ("miss", "lora")


@dataclasses.dataclass(frozen=True)
class Pair:
    """A question, the chosen answer, and the rejected one."""

    question: str
    chosen: str
    rejected: str

    @property
    def asked(self) -> list[dict]:
        return [{"role": "user", "content": self.question}]

    def answered(self, answer: str) -> dict:
        """Return the conversation with this answer."""
        return {"messages": [*self.asked, {"role": "assistant", "content": answer}]}

    def row(self, on_pairs: bool) -> dict:
        """Make a row of data: the pair, or the chosen answer alone."""
        if not on_pairs:
            return self.answered(self.chosen)
        return {"messages": self.asked, "chosen": self.chosen, "rejected": self.rejected}


@dataclasses.dataclass(frozen=True)
class Task:
    """A base and its data. No question of `test` or `valid` is in `train`."""

    base: pathlib.Path
    tokenizer: str
    steps: int
    per_step: int  # prompts of a step
    ctx_len: int
    train: Sequence[Pair]
    valid: Sequence[Pair]
    test: Sequence[Pair]
    is_right: Callable[[str, Pair], bool]

    def model(self, adapter: str | None) -> tuple[RWKV, Tokenizer]:
        """Load the base, with an adapter if there is one."""
        return load(self.base, adapter, self.tokenizer, precision="fp32", accelerator="cpu")


def sort(data: pathlib.Path) -> Task:
    """Make a task in which the demo's base, which reverses letters, learns to sort them."""
    steps, per_step = 150, 16
    test = letters(300, 1, set())
    valid = letters(100, 2, {pair.question for pair in test})
    train = letters(2 * steps * per_step, 3, {pair.question for pair in (*test, *valid)})
    base = ROOT / "demo/rwkv7-reverse.pth"
    return Task(
        base, "auto", steps, per_step, 128, train, valid, test, lambda text, pair: text == pair.chosen
    )


def letters(count: int, seed: int, excluded: set[str]) -> list[Pair]:
    """Make `count` pairs whose answers differ, without the excluded questions."""
    found: list[Pair] = []
    for row in demo_task.rows("sort", 2 * count, seed):
        asked, answer = (turn["content"] for turn in row["messages"][:2])
        pair = Pair(asked, answer, demo_task.TASKS["reverse"](asked.split()[-1]))
        if pair.chosen != pair.rejected and asked not in excluded:
            found.append(pair)
    return found[:count]


def result(data: pathlib.Path) -> Task:
    """Make a task in which a small English model learns to answer with the result alone instead of a
    sentence.
    """
    steps, per_step, held_out = 50, 4, 50
    pairs = results((data / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines())
    test, valid, train = pairs[:held_out], pairs[held_out : 2 * held_out], pairs[2 * held_out :]
    base = data / "real/rwkv6-3m-utf16.pth"
    train = train[: 2 * steps * per_step]
    return Task(base, "utf16", steps, per_step, 512, train, valid, test, lambda text, pair: is_result(text))


SHORT = 45  # characters of a question and of a sentence; longer ones would cost too much


def is_result(text: str) -> bool:
    """Tell whether an answer is a result alone."""
    return re.fullmatch(r"#### [\d,.]+", text) is not None


def results(lines: Sequence[str]) -> list[Pair]:
    """Read the pairs of GSM8K's problems, each question once."""
    found: dict[str, Pair] = {}
    for line in lines:
        row = json.loads(line)
        question = re.split(r"(?<=[.?!])\s+", row["question"].strip())[-1]
        *solution, last = row["answer"].strip().split("\n")
        sentence = re.sub("<<.*?>>", "", solution[-1]).strip() if solution else ""
        short = sentence and question.endswith("?") and max(len(question), len(sentence)) <= SHORT
        if short and is_result(last):
            found.setdefault(question, Pair(question, last, sentence))
    return list(found.values())


TASKS = {"sort": sort, "result": result}


class Trainings:
    """The trainings of a task, each done once: finished ones are in NAME.jsonl of the folder."""

    def __init__(self, name: str, folder: pathlib.Path, data: pathlib.Path):
        self.name, self.folder = name, folder / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.task = TASKS[name](data)
        # the fields that identify a training
        self.lines = Lines(folder / f"{name}.jsonl", "task", "objective", "method", "seed")

    @functools.cached_property
    def before(self) -> torch.Tensor:
        """log_probs() of the test pairs by the base."""
        base, tokenizer = self.task.model(None)
        template = recorded_template("auto", tokenizer, str(self.task.base))
        return log_probs(base, tokenizer, template, self.task.test)

    def line(self, objective: str, method: str, seed: int) -> dict:
        """Return the fields that identify a training."""
        return {"task": self.name, "objective": objective, "method": method, "seed": seed}

    def of(self, objective: LossCase, method: str, seed: int) -> dict:
        """Return the line of a training, and do the training first if it is not done."""
        return self.lines.of(
            self.line(objective.name, method, seed), lambda: self._train(objective, method, seed)
        )

    def base(self) -> dict:
        """Measure the base before any training."""
        return self.lines.of(self.line("base", "", 0), lambda: measures(self.task, None, self.before))

    def _train(self, objective: LossCase, method: str, seed: int) -> dict:
        """Do a run; return its figures, and those of its answers."""
        task, steps = self.task, objective.steps_factor * self.task.steps
        folder = self.folder / f"{objective.name}-{method}-{seed}".replace(" ", "-")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        # only the rows that the run reads, because the reference's values are computed for all rows
        pairs = {"train": task.train[: steps * task.per_step], "valid": task.valid}
        files = {
            name: write_rows(folder / f"{name}.jsonl", [pair.row(objective.on_pairs) for pair in own])
            for name, own in pairs.items()
        }
        flags = as_flags(
            load_model=task.base, tokenizer=task.tokenizer, data_file=files["train"],
            eval_file=files["valid"], peft=method, packing=0, micro_bsz=task.per_step, ctx_len=task.ctx_len,
            epoch_steps=steps, eval_samples=0, random_seed=seed,
        )  # fmt: skip
        ran = train(folder / "run", [*flags, *objective.flags], self.folder / "log")
        done = {"steps": ran.summary["steps"], "rate": ran.settings["lr_init"]}
        done |= {"cpu_seconds": ran.cpu_seconds, "commit": commit()}
        done |= measures(task, ran.summary["output"], self.before)
        shutil.rmtree(folder)
        return done


def measures(task: Task, adapter: str | None, before: torch.Tensor) -> dict[str, object]:
    """Measure a task's test pairs: both accuracies, the gain of log p, and the right answers. `before`: the
    base's log_probs() of the pairs.
    """
    model, tokenizer = task.model(adapter)
    template = recorded_template("auto", tokenizer, adapter or str(task.base))
    after = log_probs(model, tokenizer, template, task.test)
    answers = greedy_answers(model, tokenizer, template, task.test)
    right = [task.is_right(text, pair) for text, pair in zip(answers, task.test, strict=True)]
    gained = after - before

    def part(true: torch.Tensor) -> float:
        return round(float(true.double().mean()), 4)

    return {
        "reward accuracy": part(gained[:, 0] > gained[:, 1]),
        "raw accuracy": part(after[:, 0] > after[:, 1]),
        "gained by the chosen": round(float(gained[:, 0].mean()), 3),
        "gained by the rejected": round(float(gained[:, 1].mean()), 3),
        "right answers": round(sum(right) / len(right), 4),
        "characters": round(sum(map(len, answers)) / len(answers), 1),
        "answers": answers[:3],
    }


def log_probs(model: RWKV, tokenizer: Tokenizer, template: Template, pairs: Sequence[Pair]) -> torch.Tensor:
    """Compute ln p of each pair's chosen and rejected answer, with its end: (n, 2) in float64.

    The answers are computed one at a time, by other code than the training's.
    """
    encoder = Encoder(tokenizer, template, "assistant")
    asked = []
    for pair in pairs:
        for answer in (pair.chosen, pair.rejected):
            ((ids, weights),) = encoder.encode(pair.answered(answer))
            begin = int(weights.astype(bool).argmax())
            asked.append((ids[:begin].tolist(), ids[begin:].tolist()))
    found = [total for total, _ in log_likelihoods(model, asked)]
    return torch.tensor(found, dtype=torch.float64).view(-1, 2)


def greedy_answers(model: RWKV, tokenizer: Tokenizer, template: Template, pairs: Sequence[Pair]) -> list[str]:
    """Return the greedy answer to each question, cut if it is longer than all answers of the pairs."""
    asked = [(pair.asked, max(pair.chosen, pair.rejected, key=len)) for pair in pairs]
    return [text for (text,) in experiment.texts_of_answers(model, tokenizer, template, asked)]


def reached(task: str, objective: str, own: Sequence[dict]) -> list[bool]:
    """Tell for each seed whether it reaches the target; [] if there is no target."""
    target = OBJECTIVES[objective].target if objective in OBJECTIVES and task == "sort" else None
    if target is None:
        return []
    return [line["reward accuracy"] >= ACCURACY and line["right answers"] >= target for line in own]


def summary(lines: Sequence[dict]) -> dict[str, list[str]]:
    """Sort the targets into met and missed."""
    found = groups(lines, *NAMED).items()
    return experiment.judged({" ".join(key): reached(*key[:2], own) for key, own in found})


def table(lines: Sequence[dict]) -> Table:
    """Make a row for each task, objective and method: the mean of its seeds."""
    columns = ["task", "objective", "steps", "method", "rates", "reward accuracy", "raw accuracy"]
    columns += ["chosen gained", "rejected gained", "right answers", "characters", "met by seeds"]
    rows = []
    for (task, objective, method), own in groups(lines, *NAMED).items():
        if objective == "base":
            start, rewards = ["base", "", "", ""], ["", share(own, "raw accuracy"), "", ""]
        else:
            rates = " ".join(f"{line['rate']:g}" for line in own)
            start = [objective, str(own[0]["steps"]), method, rates]
            gained = [f"{mean(own, f'gained by the {which}'):+.1f}" for which in ("chosen", "rejected")]
            rewards = [share(own, "reward accuracy"), share(own, "raw accuracy"), *gained]
        met = reached(task, objective, own)
        target = f"{sum(met)} of {len(own)}" if met else ""
        length = f"{mean(own, 'characters'):.1f}"
        rows.append((task, *start, *rewards, share(own, "right answers"), length, target))
    return Table(
        "The mean of the seeds, each with a rate; in brackets the lowest and the highest. Characters: of"
        " a greedy answer.",
        columns,
        rows,
    )


def draw(lines: Sequence[dict]):
    """Make a function that fills a figure: right answers as bars, reward accuracy as lines."""
    found = groups(lines, *NAMED)
    tasks = list(dict.fromkeys(task for task, _, _ in found))

    def fill(figure) -> None:
        for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
            names = [name for name in OBJECTIVES if any((task, name, method) in found for method in COLOURS)]
            for at, name in enumerate(names):
                for shift, (method, colour) in zip((-0.2, 0.2), COLOURS.items(), strict=True):
                    own = found.get((task, name, method), [])
                    if not own:
                        continue
                    axes.bar(at + shift, 100 * mean(own, "right answers"), 0.36, color=colour, alpha=0.6)
                    places = [at + shift] * len(own)
                    rights = [100 * line["right answers"] for line in own]
                    rewards = [100 * line["reward accuracy"] for line in own]
                    axes.plot(places, rights, ".", color="black", markersize=4)
                    axes.plot(places, rewards, "_", color=colour, markersize=16, markeredgewidth=2)
                target = OBJECTIVES[name].target
                if target is not None and task == "sort":
                    axes.plot([at - 0.42, at + 0.42], [100 * target] * 2, ":", color="grey")
            axes.set(title=task, ylim=(-3, 104), ylabel="%")
            axes.set_xticks(range(len(names)), [name.replace("-", "\n") for name in names], fontsize="small")
        for method, colour in COLOURS.items():
            axes.bar(0, 0, color=colour, alpha=0.6, label=f"{method}: right answers, a dot for each seed")
            axes.plot([], [], "_", color=colour, markersize=16, label=f"{method}: reward accuracy")
        axes.plot([], [], ":", color="grey", label="asked for: right answers")
        figure.legend(
            *axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small"
        )

    return fill


def main() -> None:
    arguments = {"tasks": TASKS, "methods": METHODS, "objectives": OBJECTIVES}
    args = experiment.parsed(experiment.parser(__doc__, "preferences", **arguments))
    lines, absent = [], {}
    for name in args.tasks:
        trainings = Trainings(name, args.out, args.data)
        lines.append(trainings.base())
        for seed, objective, method in itertools.product(args.seeds, args.objectives, args.methods):
            if args.only_finished and trainings.line(objective, method, seed) not in trainings.lines:
                absent.setdefault(f"{name} {objective} {method}", []).append(str(seed))
                continue
            lines.append(trainings.of(OBJECTIVES[objective], method, seed))
            print(json.dumps(lines[-1]), flush=True)
    missing = [f"{case} (seed {', '.join(seeds)})" for case, seeds in absent.items()]
    sums = {**summary(lines), "not measured": missing}
    targets = {one.name: one.target for one in OBJECTIVES.values() if one.target is not None}
    asked = " and ".join(
        f"{100 * target:.0f} % right answers with {name}" for name, target in targets.items()
    )
    parts = [
        "# What preferences teach",
        f"Asked for on `sort`, in every seed: {100 * ACCURACY:.0f} % reward accuracy, and {asked}.",
        experiment.in_words(sums),
        "`sort`: a base that reverses letters is asked to sort them; chosen is the sorted, rejected the"
        " reversed answer. 16 pairs a step; right is the sorted answer, word for word. `result`: an"
        " English RWKV-6 of 3 million parameters and the last sentence of GSM8K's problems; chosen is the"
        " result alone (`#### 18`), rejected the last line of the solution. 4 pairs a step; right is an"
        " answer of that form, whatever the number.",
        "Pairs whose questions it has not seen judge a run, 300 of `sort` and 50 of `result`. Reward"
        " accuracy: the chosen answer's log-probability has gained more over the base than the rejected"
        " one's. Gained: by how much, summed over an answer's tokens.",
        "{plot}",
        "{table}",
        f"{experiment.cpu_minutes(lines)} Again: `python -m benchmarks.preferences --report docs/results`,"
        f" {experiment.NEEDS_DATA} (`--tasks sort` needs none).",
    ]
    experiment.publish("preferences", args.report, parts, table(lines), draw(lines), **sums, trainings=lines)


if __name__ == "__main__":
    main()
