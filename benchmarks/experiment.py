"""Experiments of whole runs of train.py: each run is done once and kept in a file; the result is a page."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import pathlib
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import yaml

from src import run
from src.common.files import append_line, write_bytes, write_text
from src.common.formatting import counted
from src.config import parse
from src.data.chat_template import Template
from src.data.questions import Question, answer_limit
from src.data.tokenizer import Tokenizer
from src.evaluation.answering import Asking, answers_to, engine_for
from src.inference.sampling import GREEDY, Sampling
from src.model import RWKV

from .common import argument_parser, environment, report
from .paper.results import Table, check_folder, plot

NEEDS_DATA = "with the models and texts that `--data` names, which are not part of the repository"


def parser(doc: str, name: str, **choices: Iterable[str]) -> argparse.ArgumentParser:
    """Make the parser of an experiment: a flag for each of the choices, and the flags of all experiments."""
    made = argument_parser(doc)
    for flag, values in choices.items():
        made.add_argument(f"--{flag}", nargs="+", choices=list(values), default=list(values))
    made.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    made.add_argument("--only_finished", action="store_true", help="train nothing; leave the others out")
    if "tasks" in choices:
        made.add_argument("--data", type=pathlib.Path, default=pathlib.Path("../shared/data"))
    made.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out", name))
    made.add_argument("--report", help="folder for the page and its plot")
    return made


def parsed(made: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command line; check the data and the page's folder before anything is trained."""
    args = made.parse_args()
    if "data" in args and not (args.data / "real").is_dir() and args.tasks != ["sort"]:
        made.error(f"--data {args.data} has no folder real/; give the folder that has it, or --tasks sort")
    if args.report:
        check_folder(args.report)
    torch.set_num_threads(1)
    return args


def write_rows(path: pathlib.Path, rows: Sequence[dict]) -> pathlib.Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def finished(path: pathlib.Path) -> list[dict]:
    """Read the lines of finished trainings."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Lines:
    """Lines of a file that take long to make. Each is made once, and identified by some fields."""

    def __init__(self, path: pathlib.Path, *fields: str):
        self.path, self.fields = path, fields
        path.parent.mkdir(parents=True, exist_ok=True)
        self.done = {self._key(line): line for line in finished(path)}

    def _key(self, line: dict) -> tuple:
        return tuple(line[field] for field in self.fields)

    def __contains__(self, line: dict) -> bool:
        return self._key(line) in self.done

    def of(self, line: dict, make: Callable[[], dict]) -> dict:
        """Return the line with these values of the fields, as kept, or completed by make() and kept now."""
        if line not in self:
            made = line | make()
            append_line(self.path, made)
            self.done[self._key(line)] = made
        return self.done[self._key(line)]


@dataclasses.dataclass(frozen=True)
class Ran:
    """Output folder of a run."""

    folder: pathlib.Path
    cpu_seconds: float  # CPU time of the run's process

    @property
    def summary(self) -> dict:
        return json.loads((self.folder / "run.json").read_text())

    @property
    def settings(self) -> dict:
        return yaml.safe_load((self.folder / "config.yaml").read_text())

    @property
    def metrics(self) -> list[dict]:
        return finished(self.folder / "metrics.jsonl")


def train(folder: pathlib.Path, flags: Sequence[str], log: pathlib.Path) -> Ran:
    """Run train.py in a new folder; its output is appended to the file `log`."""
    shutil.rmtree(folder, ignore_errors=True)
    begun = time.process_time()
    with open(log, "a") as file, contextlib.redirect_stdout(file):
        run.main(parse([*flags, "--proj_dir", str(folder)]))
    return Ran(folder, round(time.process_time() - begun, 1))


def texts_of_answers(
    model: RWKV,
    tokenizer: Tokenizer,
    template: Template,
    asked: Sequence[tuple[list[dict], str]],
    sampling: Sampling = GREEDY,
    samples: int = 1,
) -> list[list[str]]:
    """Answer (the turns of a conversation, the longest answer that may be right), `samples` times each."""
    questions = [
        Question([segment.text for segment in template.segments(turns, ask=True)], longest)
        for turns, longest in asked
    ]
    limit = answer_limit("exact", tokenizer, questions)
    asking = Asking(limit, template, sampling=sampling, samples=samples)
    given = answers_to(engine_for(model, tokenizer, samples * len(questions)), questions, asking)
    return [[answer.text for answer in answers] for answers in given]


def publish(
    name: str,
    folder: str | None,
    parts: Sequence[str],
    found: Table,
    draw: Callable[..., None] | None = None,
    **figures: Any,
) -> None:
    """Print an experiment's table and JSON line; if asked, write NAME.md with these paragraphs, and NAME.png.

    {table} and {plot} in a paragraph are replaced by the table and the plot.
    """
    print(found.markdown())
    if folder:
        facts = environment()
        last = (
            f"{facts['machine']}, 1 thread, fp32, torch {facts['versions']['torch']}. Put together at commit"
        )
        known = {"{table}": found.markdown().strip(), "{plot}": f"![{parts[0].lstrip('# ')}]({name}.png)"}
        text = "\n\n".join([*(known.get(part, part) for part in parts), f"{last} {facts['commit']}."])
        write_text(str(pathlib.Path(folder, f"{name}.md")), text + "\n")
        if draw:
            write_bytes(str(pathlib.Path(folder, f"{name}.png")), plot(draw))
    report(name, **figures)


def groups(lines: Sequence[dict], *fields: str) -> dict[tuple, list[dict]]:
    """Group lines that differ in the seed alone: values of some fields -> lines, in their order."""
    found: dict[tuple, list[dict]] = {}
    for line in lines:
        found.setdefault(tuple(line[field] for field in fields), []).append(line)
    return found


def cpu_minutes(lines: Sequence[dict]) -> str:
    return f"All trainings took {sum(line.get('cpu_seconds', 0) for line in lines) / 60:.0f} CPU minutes."


def mean(own: Sequence[dict], name: str) -> float:
    """Average a figure over the lines of the seeds."""
    return statistics.fmean(line[name] for line in own)


def share(own: Sequence[dict], name: str) -> str:
    """Write the mean of a figure in percent, and its range if the seeds differ."""
    values = [100 * line[name] for line in own]
    text = f"{statistics.fmean(values):.1f} %"
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return text if low == high else f"{text} ({low} to {high})"


def judged(reached: dict[str, Sequence[bool]]) -> dict[str, list[str]]:
    """Sort targets: met by every measured seed, or missed."""
    found: dict[str, list[str]] = {"met": [], "missed": []}
    for name, of_seeds in reached.items():
        if of_seeds:
            kind = "met" if all(of_seeds) else "missed"
            found[kind].append(f"{name} ({sum(of_seeds)} of {counted(len(of_seeds), 'seed')})")
    return found


def in_words(lists: dict[str, Sequence[str]]) -> str:
    """Write named lists as sentences: "Met: this. Missed: none."."""
    return " ".join(f"{name.capitalize()}: {', '.join(which) or 'none'}." for name, which in lists.items())
