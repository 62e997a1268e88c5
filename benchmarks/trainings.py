"""Whole runs of train.py for a benchmark: each is done once, and what is finished stands in a file."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import shutil
import statistics
import time
from collections.abc import Callable, Sequence

import yaml

from src import run
from src.common.files import append_line, write_bytes, write_text
from src.config import parse
from src.data.chat_template import Template
from src.data.questions import Question, answer_limit
from src.data.tokenizer import Tokenizer
from src.evaluation.answering import Asking, answers_to, engine_for
from src.inference.sampling import GREEDY, Sampling
from src.model import RWKV

from .paper.results import plot

ROOT = pathlib.Path(__file__).parent.parent


def write_rows(path: pathlib.Path, rows: Sequence[dict]) -> pathlib.Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def finished(path: pathlib.Path) -> list[dict]:
    """The lines of trainings that are done."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Lines:
    """Lines of a file that take long to make: each is made once, and told from the others by some fields."""

    def __init__(self, path: pathlib.Path, *fields: str):
        self.path, self.fields = path, fields
        path.parent.mkdir(parents=True, exist_ok=True)
        self.done = {self._key(line): line for line in finished(path)}

    def _key(self, line: dict) -> tuple:
        return tuple(line[field] for field in self.fields)

    def __contains__(self, line: dict) -> bool:
        return self._key(line) in self.done

    def of(self, line: dict, make: Callable[[], dict]) -> dict:
        """The line with these values of the fields, and what make() says, now or once before."""
        if line not in self:
            made = line | make()
            append_line(self.path, made)
            self.done[self._key(line)] = made
        return self.done[self._key(line)]


@dataclasses.dataclass(frozen=True)
class Ran:
    """What a run has left behind, in its folder."""

    folder: pathlib.Path
    cpu_seconds: float  # of this process

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
    """A run of train.py in a new folder; what it says goes to the end of a file."""
    shutil.rmtree(folder, ignore_errors=True)
    begun = time.process_time()
    with open(log, "a") as file, contextlib.redirect_stdout(file):
        run.main(*parse([*flags, "--proj_dir", str(folder)]))
    return Ran(folder, round(time.process_time() - begun, 1))


def texts_of_answers(
    model: RWKV,
    tokenizer: Tokenizer,
    template: Template,
    asked: Sequence[tuple[list[dict], str]],
    sampling: Sampling = GREEDY,
    samples: int = 1,
) -> list[list[str]]:
    """Answers to (the turns of a conversation, the longest answer that may be right), `samples` each."""
    questions = [
        Question([segment.text for segment in template.segments(turns, ask=True)], longest)
        for turns, longest in asked
    ]
    limit = answer_limit("exact", tokenizer, questions)
    asking = Asking(limit, template, sampling=sampling, samples=samples)
    given = answers_to(engine_for(model, tokenizer, samples * len(questions)), questions, asking)
    return [[answer.text for answer in answers] for answers in given]


def write_page(
    folder: pathlib.Path, name: str, parts: Sequence[str], draw: Callable[..., None], content: dict
) -> None:
    """NAME.md of these paragraphs, NAME.png and NAME.json."""
    write_bytes(str(folder / f"{name}.png"), plot(draw))
    write_text(str(folder / f"{name}.md"), "\n\n".join(parts) + "\n")
    write_text(str(folder / f"{name}.json"), json.dumps(content, indent=1) + "\n")


def mean(own: Sequence[dict], name: str) -> float:
    """That of a figure over the lines of the seeds."""
    return statistics.fmean(line[name] for line in own)


def share(own: Sequence[dict], name: str) -> str:
    """The mean in percent, with the range where it is one."""
    values = [100 * line[name] for line in own]
    text = f"{statistics.fmean(values):.1f} %"
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return text if low == high else f"{text} ({low} to {high})"
