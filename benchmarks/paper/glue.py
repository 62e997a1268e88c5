"""GLUE's tasks of the MiSS paper's Table 2, read from a folder in the form of GLUE or of the Hugging Face
hub.

FOLDER/CoLA/train.tsv and dev.tsv, FOLDER/cola/train-00000-of-00001.parquet and validation-..., or .jsonl with
the same columns. MNLI is evaluated on the matched genres. Nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rwkv_miss import UserError
from src.data.formats.sources import detect
from src.data.formats.text import open_text

from .metrics import accuracy, f1, matthews

SUFFIXES = (".tsv", ".jsonl", ".parquet")
Score = Callable[[Sequence[int], Sequence[int]], float]


@dataclasses.dataclass(frozen=True)
class Task:
    """Task of GLUE. `texts` and `label` are columns, each with its names in the files; a label is a number,
    or one of `labels` in their order.

    `scores` are reported, the first as in Table 2; `paper` has method -> 100 x score of that table.
    `headless` names the columns of a TSV without a header.
    """

    name: str
    texts: tuple[tuple[str, ...], ...]
    label: tuple[str, ...]
    labels: tuple[str, ...]
    scores: dict[str, Score]
    paper: dict[str, float]
    dev: tuple[str, ...] = ("dev", "validation")
    headless: tuple[str, ...] = ()


TASKS = {
    task.name.lower(): task
    for task in (
        Task(
            "MNLI",
            (("premise", "sentence1"), ("hypothesis", "sentence2")),
            ("label", "gold_label"),
            ("entailment", "neutral", "contradiction"),
            {"accuracy": accuracy},
            {"lora": 85.63, "pissa": 85.72, "miss": 85.71},
            ("dev_matched", "validation_matched"),
        ),
        Task(
            "SST-2",
            (("sentence",),),
            ("label",),
            ("negative", "positive"),
            {"accuracy": accuracy},
            {"lora": 94.03, "pissa": 93.64, "miss": 93.60},
        ),
        Task(
            "CoLA",
            (("sentence",),),
            ("label",),
            ("unacceptable", "acceptable"),
            {"matthews": matthews, "accuracy": accuracy},
            {"lora": 62.40, "pissa": 67.28, "miss": 72.86},
            headless=("source", "label", "mark", "sentence"),
        ),
        Task(
            "QNLI",
            (("question",), ("sentence",)),
            ("label",),
            ("entailment", "not_entailment"),
            {"accuracy": accuracy},
            {"lora": 91.37, "pissa": 91.40, "miss": 91.43},
        ),
        Task(
            "MRPC",
            (("sentence1", "#1 String"), ("sentence2", "#2 String")),
            ("label", "Quality"),
            ("not_equivalent", "equivalent"),
            {"accuracy": accuracy, "f1": f1},
            {"lora": 87.98, "pissa": 88.11, "miss": 88.14},
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Example:
    """One text or a pair, and the number of its class."""

    texts: tuple[str, ...]
    label: int


def read_task(folder: str, task: Task) -> tuple[list[Example], list[Example]]:
    """Read (training, development) examples. Raises UserError for an absent file, and, with its place, for a
    row that is no example.
    """
    where = _folder(folder, task)
    files = _files(where, ("train",)), _files(where, task.dev)
    train, dev = (
        [_example(place, record, task) for path in paths for place, record in _records(path, task)]
        for paths in files
    )
    return train, dev


def _folder(folder: str, task: Task) -> pathlib.Path:
    """Find the task's folder, ignoring case and hyphens in its name."""
    root = pathlib.Path(folder)
    names = [path.name for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    for name in names:
        if name.lower().replace("-", "") == task.name.lower().replace("-", ""):
            return root / name
    raise UserError(
        f"{folder} has no folder {task.name} with GLUE's files, only:"
        f" {', '.join(sorted(names)) or 'nothing'}; nothing is downloaded: unpack GLUE there, or copy the"
        " parquet files of nyu-mll/glue"
    )


def _files(folder: pathlib.Path, splits: tuple[str, ...]) -> list[pathlib.Path]:
    """List the files of a split: train.tsv, train-00000-of-00001.parquet; several are its parts."""
    found = sorted(
        path for path in folder.iterdir() if path.suffix in SUFFIXES and path.stem.partition("-")[0] in splits
    )
    if not found:
        raise UserError(
            f"{folder} has no file"
            f" {' or '.join(f'{split}{suffix}' for split in splits for suffix in SUFFIXES)}; it has:"
            f" {', '.join(sorted(path.name for path in folder.iterdir())) or 'nothing'}"
        )
    if len({path.suffix for path in found}) > 1:
        raise UserError(
            f"{folder} has one split in several formats ({', '.join(path.name for path in found)}); leave one"
            " of them there"
        )
    return found


def _records(path: pathlib.Path, task: Task) -> Iterator[tuple[str, Any]]:
    return _tsv(str(path), task) if path.suffix == ".tsv" else detect(str(path)).records()


def _tsv(path: str, task: Task) -> Iterator[tuple[str, dict[str, str]]]:
    """Read the rows of one of GLUE's own files, in which a double quote is a character like any other."""
    with open_text(path) as file:
        rows = (
            (f"{path}, line {number}", line.rstrip("\r\n").split("\t"))
            for number, line in enumerate(file, 1)
            if line.strip()
        )
        header: Sequence[str] | None = None
        for place, cells in rows:
            if header is None:
                header = task.headless if task.headless and not set(task.label) & set(cells) else cells
                if header is cells:
                    continue
            if len(cells) < len(header):
                raise UserError(
                    f"{place}: the row has {len(cells)} cells, expected {len(header)} ({', '.join(header)})"
                )
            yield place, dict(zip(header, cells))


def _example(place: str, record: Any, task: Task) -> Example:
    if isinstance(record, UserError):
        raise UserError(f"{place}: {record}")
    texts = tuple(_column(place, record, names) for names in task.texts)
    label = str(_column(place, record, task.label))
    known = {
        **{str(i): i for i in range(len(task.labels))},
        **{name: i for i, name in enumerate(task.labels)},
    }
    if label not in known or not all(isinstance(text, str) for text in texts):
        raise UserError(
            f"{place}: expected text and a label {', '.join(task.labels)} or 0 to {len(task.labels) - 1}, got"
            f" {texts!r}, {label!r}"
        )
    return Example(texts, known[label])


def _column(place: str, record: dict[str, Any], names: tuple[str, ...]) -> Any:
    name = next((name for name in names if name in record), None)
    if name is None:
        raise UserError(f"{place}: expected a column {' or '.join(names)}, got {', '.join(map(str, record))}")
    return record[name]
