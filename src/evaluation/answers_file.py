"""Answers file of an evaluation, which is written as they come, and which a stopped evaluation reads.

Its first line describes the evaluation: {"evaluation": {"model", "temperature", ...}}. Every other line is an
answer: {"question", "sample", "prompt", "answer", "cut"}, with numbers from 0 on. They stand in the order in
which the answers ended until all are there, and then in the order of the questions.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rwkv_miss.errors import UserError

from ..common.files import append_line, write_lines
from ..data.questions import Question

HEAD = "evaluation"
Key = tuple[int, int]  # the numbers of a question and of an answer to it


class SavedAnswer(NamedTuple):
    """Answer of a model."""

    text: str
    cut: bool | None  # whether it reached the limit of tokens before its end; None if unknown


class AnswersFile:
    """Answers in the file at `path`, with those of an earlier call.

    `about` decides the answers: an evaluation goes on only if it is the same. Raises UserError for a file of
    another evaluation, or of none.
    """

    def __init__(self, path: str, about: Mapping[str, Any]):
        self.path = path
        self.answers: dict[Key, SavedAnswer] = {}
        self.rows: dict[Key, dict[str, Any]] = {}
        self.about = _as_read(about)
        if not _has_begun(path):
            write_lines(path, [{HEAD: self.about}])
            return
        head, rows, whole = _read(path)
        require_same(path, head, self.about)
        for row in rows:
            self._keep(row)
        if not whole:
            self._write()

    def add(self, question: int, sample: int, prompt: str, answer: SavedAnswer) -> None:
        """Add an answer, which is in the file when this returns."""
        row = {"question": question, "sample": sample, "prompt": prompt, **answer._asdict()}
        row["answer"] = row.pop("text")
        append_line(self.path, row)
        self._keep(row)

    def finish(self) -> None:
        """Sort the lines in the order of the questions."""
        if list(self.rows) != sorted(self.rows):
            self.rows = dict(sorted(self.rows.items()))
            self._write()

    def _keep(self, row: dict[str, Any]) -> None:
        key = row["question"], row["sample"]
        self.rows[key], self.answers[key] = row, SavedAnswer(row["answer"], row["cut"])

    def _write(self) -> None:
        write_lines(self.path, [{HEAD: self.about}, *self.rows.values()])


def _as_read(about: Mapping[str, Any]) -> dict[str, Any]:
    """Convert as JSON would, for which a tuple is a list."""
    return json.loads(json.dumps(about))


def _read(path: str) -> tuple[dict[str, Any], list[dict[str, Any]], bool]:
    """Read (the first line, the answers, whether the last line is whole)."""
    try:
        with open(path, "rb") as file:
            *lines, rest = file.read().split(b"\n")  # the rest was cut off by a kill
        first, *rows = map(json.loads, lines)
        for row in rows:
            row["question"], row["sample"], row["prompt"], row["answer"], row["cut"]
        return first[HEAD], rows, not rest
    except (OSError, ValueError, KeyError, TypeError) as error:
        seen = f"a line has no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"--save {path} is there and is no file of answers that --save began ({seen}); give"
            " another name, or delete it"
        ) from None


def require_same(path: str, there: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Raise UserError unless the file is of the same evaluation, by all that `about` names."""
    for name, wanted in about.items():
        if (found := there.get(name)) != wanted:
            raise UserError(
                f"--save {path} is of another evaluation: its {name} is {_short(found)}, and here it is"
                f" {_short(wanted)}; give another name, or delete it"
            )


def require_unstarted_or_same(path: str, about: Mapping[str, Any]) -> None:
    """Raise UserError if the file is there and of another evaluation, by what is known of this one so far."""
    if _has_begun(path):
        require_same(path, _read(path)[0], _as_read(about))


def _has_begun(path: str) -> bool:
    return os.path.exists(path) and os.path.getsize(path) > 0


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def digest(questions: Sequence[Question]) -> str:
    """Hash the questions and their reference answers, to 32 hex digits."""
    content = [[question.pieces, str(question.answer)] for question in questions]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def read_answers(path: str, questions: int) -> list[list[SavedAnswer]]:
    """Read the answers to `questions` questions from a file of an evaluation, or of rows {"answer"}.

    Rows without the number of a question are in the order of the questions. Raises UserError unless each
    question has equally many.
    """
    try:
        with open(path, encoding="utf-8") as file:
            rows = [row for row in map(json.loads, file) if HEAD not in row]
        answers: dict[Key, SavedAnswer] = {}
        for place, row in enumerate(rows):
            key = row.get("question", place), row.get("sample", 0)
            answers[key] = SavedAnswer(row["answer"], row.get("cut"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--answers {path} can't be read: {getattr(error, 'strerror', None) or repr(error)};"
            ' expected JSONL of {"answer": text}, as --save writes it'
        ) from None
    samples = 1 + max((sample for _, sample in answers), default=0)
    expected = {(question, sample) for question in range(questions) for sample in range(samples)}
    if answers.keys() != expected:
        each = f" with {samples} answers each" if samples > 1 else ""
        raise UserError(
            f"--answers {path} has {len(answers)} answers, --questions has {questions} questions{each}; both"
            " must be of the same file, and the evaluation that writes it must have ended"
        )
    return [[answers[question, sample] for sample in range(samples)] for question in range(questions)]
