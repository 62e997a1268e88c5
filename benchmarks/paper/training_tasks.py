"""Tasks that are taught to real trained models: English text to a small RWKV-6, a changed task to RWKV-7s.

    shakespeare   rwkv6-3m-utf16, running text: the first nine tenths of the plays, held out from the last one
    gsm8k         the same model, running text: questions and answers of GSM8K's training rows, held out from
                  its test rows
    digits        rwkv7-reverse reverses digits; now each has 1 added as well (mod 10): `123,` -> `432#`
    letters       the demo's base, which reverses letters, learns to sort them; the only task without further
                  files

Every document is a row by itself. The last two tasks have right answers, whose share is the accuracy.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
import random
from collections.abc import Callable

import numpy as np

from demo import task
from rwkv_miss import UserError
from rwkv_miss.files.checkpoint import Arch
from src.data.dataset import Document, Documents
from src.model import read_model_file

from .tasks import ROOT

DIGITS = "0123456789,#"  # the vocabulary of rwkv7-reverse: a token's id is its place here


@dataclasses.dataclass(frozen=True)
class Task:
    """A base, rows of at most `width` inputs to train on, held-out rows; whether rows have right answers."""

    base: pathlib.Path
    train: Documents
    held_out: Documents
    answers: bool

    @functools.cached_property
    def arch(self) -> Arch:
        return Arch.detect(read_model_file(self.base))

    @functools.cached_property
    def digest(self) -> str:
        """Hash of the base's file and all rows, on which a training depends in addition to its settings."""
        parts = hashlib.sha256(self.base.read_bytes()).hexdigest(), self.train.digest, self.held_out.digest
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]

    @property
    def width(self) -> int:
        return int(max(self.train.lengths.max(), self.held_out.lengths.max())) - 1


def from_pairs(rows: list[tuple[list[int], int]]) -> Documents:
    """Make documents from (ids, number of ids in the prompt)."""
    return Documents(
        [Document(np.array(ids, dtype=np.int32), np.arange(len(ids)) >= given) for ids, given in rows]
    )


def digits(count: int, seed: int) -> list[tuple[list[int], int]]:
    """Make rows (ids, number of given ids) of rwkv7-reverse's changed task: reverse, add 1 to every digit."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        question = draw.choices(range(10), k=draw.randint(3, 15))
        answer = [(digit + 1) % 10 for digit in reversed(question)]
        ids = [*question, DIGITS.index(","), *answer, DIGITS.index("#")]
        rows.append((ids, len(question) + 1))
    return rows


def sorting(count: int, seed: int) -> list[tuple[list[int], int]]:
    """Make rows of the demo's task, in bytes."""
    return of_letters("sort", count, seed)


def of_letters(kind: str, count: int, seed: int) -> list[tuple[list[int], int]]:
    """Make rows of a question to sort letters or to reverse them, in bytes."""
    rows = []
    for row in task.rows(kind, count, seed):
        question, answer = (message["content"] for message in row["messages"][:2])
        given = f"User: {question}\n\nAssistant: ".encode()
        rows.append(([*given, *answer.encode(), 0], len(given)))
    return rows


def windows(text: str, count: int, characters: int, seed: int) -> Documents:
    """Cut `count` random parts out of a text, as UTF-16-LE bytes, two tokens a character, each with the token
    before it.
    """
    draw = random.Random(seed)
    starts = [draw.randrange(len(text) - characters - 1) for _ in range(count)]
    ids = [list(text[start : start + characters + 1].encode("utf-16-le"))[1:] for start in starts]
    return from_pairs([(row, 1) for row in ids])


def _shakespeare(data: pathlib.Path) -> tuple[str, str]:
    text = (data / "tinyshakespeare.txt").read_text()
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def _gsm8k(data: pathlib.Path) -> tuple[str, ...]:
    parts = (
        (json.loads(line) for line in (data / f"gsm8k_{part}.jsonl").read_text().splitlines())
        for part in ("train", "test")
    )
    return tuple("\n\n".join(f"{row['question']}\n{row['answer']}" for row in rows) for rows in parts)


TEXTS: dict[str, Callable] = {"shakespeare": _shakespeare, "gsm8k": _gsm8k}
ANSWERS = {
    "digits": ("real/rwkv7-reverse.pth", digits),
    "letters": (ROOT / "demo/rwkv7-reverse.pth", sorting),
}
TASKS = (*TEXTS, *ANSWERS)
FILES = {
    "shakespeare": ("real/rwkv6-3m-utf16.pth", "tinyshakespeare.txt"),
    "digits": ("real/rwkv7-reverse.pth",),
    "letters": (),
    "gsm8k": ("real/rwkv6-3m-utf16.pth", "gsm8k_train.jsonl", "gsm8k_test.jsonl"),
}


def load_task(name: str, folder: str, train: int, held_out: int, characters: int) -> Task:
    """Load the task with `train` rows to train on and `held_out` others; rows of a text have `characters`
    characters. Raises UserError if a file is not in the folder.
    """
    if name not in TASKS:
        raise UserError(f"task {name!r} is unknown; there are: {', '.join(TASKS)}")
    data = pathlib.Path(folder)
    for file in FILES[name]:
        if not (data / file).is_file():
            raise UserError(
                f"task {name} needs {file} in --data {folder}; give the folder that has it, or --tasks"
                " letters, which needs none"
            )
    if name in TEXTS:
        text, other = TEXTS[name](data)
        return Task(
            data / FILES[name][0],
            windows(text, train, characters, 1),
            windows(other, held_out, characters, 0),
            False,
        )
    base, rows = ANSWERS[name]
    held = rows(held_out, 0)
    known = {tuple(ids) for ids, _ in held}
    return Task(
        data / base,
        from_pairs([row for row in rows(train, 1) if tuple(row[0]) not in known]),
        from_pairs(held),
        True,
    )
