"""Whether preferences are learnt, and what becomes of the answers meanwhile.

    python -m benchmarks.preferences [--data ../shared/data] [--tasks sort result] [--methods miss lora]
    [--objectives dpo ...] [--seeds 0 1 2] [--only_finished] [--out out/preferences] [--report docs/results]

Every training is a whole run of train.py on pairs, at the rate that it chooses by itself, for a given number
of steps: DPO; DPO without the NLL of the chosen answers; ORPO, for twice as many steps; and supervised
training on the chosen answers, with as many prompts as either.

- sort: the demo base reverses letters. Asked to sort them, the chosen answer has them sorted, the rejected
  one reversed, as the base answers. Right is the sorted answer, word for word.
- result: an English RWKV-6 of 3 million parameters and GSM8K. The question is the last sentence of a problem.
  The chosen answer is its result alone, as `#### 18`; the rejected one is the last line of the worked
  solution. So the two differ in form and length. Right is an answer of that form. Whether its number is right
  is not looked at: a sentence does not say enough, and the model is too small.

What is measured, on questions that no training has seen: the share of pairs whose chosen answer has gained
more log-probability over the base than the rejected one (reward accuracy); the share whose chosen answer is
more likely (raw accuracy); what the chosen answer's log-probability has gained; and the right greedy answers.

--data has the base and the texts of all tasks but sort: real/rwkv6-3m-utf16.pth and gsm8k_train.jsonl. They
are not part of the repository. A finished training is kept in --out, and is not repeated. --report FOLDER
gets preferences.md, .png and .json. The last line is JSON.
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
from src.training.rate_search import recorded_search

from .common import argument_parser, as_flags, environment, report
from .paper.results import check_folder
from .preferences_table import ACCURACY, OBJECTIVES, Objective, draw, summary, table
from .trainings import ROOT, Lines, texts_of_answers, train, write_page, write_rows

METHODS = ("miss", "lora")


@dataclasses.dataclass(frozen=True)
class Pair:
    """A question, the answer that is preferred, and the other one."""

    question: str
    chosen: str
    rejected: str

    @property
    def asked(self) -> list[dict]:
        return [{"role": "user", "content": self.question}]

    def answered(self, answer: str) -> dict:
        """The conversation with this answer."""
        return {"messages": [*self.asked, {"role": "assistant", "content": answer}]}

    def row(self, on_pairs: bool) -> dict:
        """A row of data: the pair, or the chosen answer alone."""
        if not on_pairs:
            return self.answered(self.chosen)
        return {"messages": self.asked, "chosen": self.chosen, "rejected": self.rejected}


@dataclasses.dataclass(frozen=True)
class Task:
    """What is taught to which base. No question of `test` or `valid` is in `train`."""

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
        """The base, with an adapter if there is one."""
        return load(self.base, adapter, self.tokenizer, precision="fp32", accelerator="cpu")


def sort(data: pathlib.Path) -> Task:
    """The demo's base reverses letters, and learns to sort them."""
    steps, per_step = 150, 16
    test = letters(300, 1, set())
    valid = letters(100, 2, {pair.question for pair in test})
    train = letters(2 * steps * per_step, 3, {pair.question for pair in (*test, *valid)})
    base = ROOT / "demo/rwkv7-reverse.pth"
    return Task(
        base, "auto", steps, per_step, 128, train, valid, test, lambda text, pair: text == pair.chosen
    )


def letters(count: int, seed: int, excluded: set[str]) -> list[Pair]:
    """So many pairs whose answers differ, without the excluded questions."""
    found: list[Pair] = []
    for row in demo_task.rows("sort", 2 * count, seed):
        asked, answer = (turn["content"] for turn in row["messages"][:2])
        pair = Pair(asked, answer, demo_task.TASKS["reverse"](asked.split()[-1]))
        if pair.chosen != pair.rejected and asked not in excluded:
            found.append(pair)
    return found[:count]


def result(data: pathlib.Path) -> Task:
    """A small English model learns to give the result alone, where it could give a sentence."""
    steps, per_step, held_out = 50, 4, 50
    pairs = results((data / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines())
    test, valid, train = pairs[:held_out], pairs[held_out : 2 * held_out], pairs[2 * held_out :]
    base = data / "real/rwkv6-3m-utf16.pth"
    train = train[: 2 * steps * per_step]
    return Task(base, "utf16", steps, per_step, 512, train, valid, test, lambda text, pair: is_result(text))


SHORT = 45  # characters of a question and of a sentence; longer ones would cost too much


def is_result(text: str) -> bool:
    """Whether an answer is a result alone."""
    return re.fullmatch(r"#### [\d,.]+", text) is not None


def results(lines: Sequence[str]) -> list[Pair]:
    """The pairs of GSM8K's problems, each question once."""
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
    """The trainings of a task, each done once: what is finished stands in NAME.jsonl of the folder."""

    def __init__(self, name: str, folder: pathlib.Path, data: pathlib.Path):
        self.name, self.folder = name, folder / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.task = TASKS[name](data)
        # what tells one training from the others
        self.lines = Lines(folder / f"{name}.jsonl", "task", "objective", "method", "seed")

    @functools.cached_property
    def before(self) -> torch.Tensor:
        """log_probs() of the test pairs by the base."""
        base, tokenizer = self.task.model(None)
        template = recorded_template("auto", tokenizer, str(self.task.base))
        return log_probs(base, tokenizer, template, self.task.test)

    def line(self, objective: str, method: str, seed: int) -> dict:
        """What names a training."""
        return {"task": self.name, "objective": objective, "method": method, "seed": seed}

    def of(self, objective: Objective, method: str, seed: int) -> dict:
        """The line of a training, which is done where it is not yet."""
        line = self.line(objective.name, method, seed)
        return self.lines.of(line, lambda: self._train(objective, method, seed))

    def base(self) -> dict:
        """What the base is before any training."""
        return self.lines.of(self.line("base", "", 0), lambda: measures(self.task, None, self.before))

    def _train(self, objective: Objective, method: str, seed: int) -> dict:
        """What a run found, and what became of the answers."""
        task, steps = self.task, objective.steps_factor * self.task.steps
        folder = self.folder / f"{objective.name}-{method}-{seed}".replace(" ", "-")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        # as many rows as the run reads: no other pair needs the reference's values
        pairs = {"train": task.train[: steps * task.per_step], "valid": task.valid}
        files = {
            name: write_rows(folder / f"{name}.jsonl", [pair.row(objective.on_pairs) for pair in own])
            for name, own in pairs.items()
        }
        flags = as_flags(
            load_model=task.base,
            tokenizer=task.tokenizer,
            data_file=files["train"],
            eval_file=files["valid"],
            peft=method,
            packing=0,
            micro_bsz=task.per_step,
            ctx_len=task.ctx_len,
            epoch_steps=steps,
            eval_samples=0,
            random_seed=seed,
        )
        ran = train(folder / "run", [*flags, *objective.flags], self.folder / "log")
        search = recorded_search(str(ran.folder))
        tried = {trial["rate"]: trial["loss"] for trial in search["trials"]} if search else {}
        done = {"steps": ran.summary["steps"], "rate": ran.settings["lr_init"], "tried": tried}
        done |= {"cpu_seconds": ran.cpu_seconds, "commit": commit()}
        done |= measures(task, ran.summary["output"], self.before)
        shutil.rmtree(folder)
        return done


def measures(task: Task, adapter: str | None, before: torch.Tensor) -> dict[str, object]:
    """Of a task's test pairs, whose log_probs() were `before` by the base: both accuracies, what log p has
    gained, and the right answers.
    """
    model, tokenizer = task.model(adapter)
    template = recorded_template("auto", tokenizer, adapter or str(task.base))
    after = log_probs(model, tokenizer, template, task.test)
    answers = greedy_answers(model, tokenizer, template, task.test)
    right = [task.is_right(text, pair) for text, pair in zip(answers, task.test, strict=True)]
    gained = after - before
    return {
        "reward accuracy": share(gained[:, 0] > gained[:, 1]),
        "raw accuracy": share(after[:, 0] > after[:, 1]),
        "gained by the chosen": round(float(gained[:, 0].mean()), 3),
        "gained by the rejected": round(float(gained[:, 1].mean()), 3),
        "right answers": round(sum(right) / len(right), 4),
        "characters": round(sum(map(len, answers)) / len(answers), 1),
        "answers": answers[:3],
    }


def share(true: torch.Tensor) -> float:
    return round(float(true.double().mean()), 4)


def log_probs(model: RWKV, tokenizer: Tokenizer, template: Template, pairs: Sequence[Pair]) -> torch.Tensor:
    """ln p of the chosen and of the rejected answer of each pair, with its end: (n, 2) in float64.

    They are made one answer at a time, by other code than the training's.
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
    """The likeliest answer to each question, cut where it is longer than any answer of the pairs."""
    asked = [(pair.asked, max(pair.chosen, pair.rejected, key=len)) for pair in pairs]
    return [text for (text,) in texts_of_answers(model, tokenizer, template, asked)]


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("../shared/data"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only_finished", action="store_true", help="train nothing; leave the others out")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/preferences"))
    parser.add_argument("--report", help="folder for the table, the plot and JSON")
    args = parser.parse_args()
    if not (args.data / "real").is_dir() and args.tasks != ["sort"]:
        parser.error(f"--data {args.data} has no folder real/; give the folder that has it, or --tasks sort")
    folder = check_folder(args.report) if args.report else None
    torch.set_num_threads(1)
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
    print(table(lines).markdown())
    if folder:
        write_report(folder, lines, sums)
    report("preferences", **sums, trainings=lines)


def write_report(folder: pathlib.Path, lines: list[dict], sums: dict[str, list[str]]) -> None:
    """preferences.md, .png and .json."""
    facts, found = environment(), table(lines)
    seconds = sum(line.get("cpu_seconds", 0) for line in lines)
    targets = {one.name: one.target for one in OBJECTIVES.values() if one.target is not None}
    asked = " and ".join(
        f"{100 * target:.0f} % right answers with {name}" for name, target in targets.items()
    )
    parts = [
        "# What preferences teach",
        f"Asked for on `sort`, in every seed: {100 * ACCURACY:.0f} % reward accuracy, and {asked}.",
        " ".join(f"{name.capitalize()}: {', '.join(which) or 'none'}." for name, which in sums.items()),
        "`sort`: a base that reverses letters is asked to sort them; chosen is the sorted, rejected the"
        " reversed answer. 16 pairs a step; right is the sorted answer, word for word. `result`: an"
        " English RWKV-6 of 3 million parameters and the last sentence of GSM8K's problems; chosen is the"
        " result alone (`#### 18`), rejected the last line of the solution. 4 pairs a step; right is an"
        " answer of that form, whatever the number.",
        "Every run of `sort` has searched for its learning rate by itself. Those of `result` are too short"
        " for a search, and take the first guess. Pairs whose questions it has not seen judge it, 300 of"
        " `sort` and 50 of `result`. Reward accuracy: the chosen answer's log-probability has gained more"
        " over the base than the rejected one's. Gained: by how much, summed over an answer's tokens.",
        "![Reward accuracy and right answers](preferences.png)",
        found.markdown(),
        f"All trainings took {seconds / 60:.0f} CPU minutes. Again: `python -m benchmarks.preferences"
        " --report docs/results`, with the model and the texts that `--data` names, which are not part of"
        " the repository (`--tasks sort` needs none).",
        f"{facts['machine']}, 1 thread, fp32, torch {facts['versions']['torch']}. Put together at commit"
        f" {facts['commit']}.",
    ]
    content = {**sums, **facts, "table": found.records(), "trainings": lines}
    write_page(folder, "preferences", parts, draw(lines), content)


if __name__ == "__main__":
    main()
