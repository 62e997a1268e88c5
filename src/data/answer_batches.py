"""Batches of examples of answers: an answer after its prompt, or a prompt read once for all its answers."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import torch

from ..common.batch import ENTRIES, Batch
from .answer_example import AnswerExample, prompt_length
from .collate import padded_left, trained_tokens
from .file_documents import Document


@dataclasses.dataclass(frozen=True)
class BatchColumns:
    """Extra values in a batch, by the name of the examples' attribute: a list with one for each answer."""

    of_answers: str  # one value for each answer
    of_tokens: str  # one for each trained token
    optional: bool = False  # may be absent: then the attribute is None, and so is the batch's value


PREFERENCE = BatchColumns("chosen", "reference", optional=True)
GROUP = BatchColumns("advantage", "drawn")


def collate_answers(
    rows: Sequence[Sequence[AnswerExample]],
    step_weight: float,
    chunk: int = 0,
    shared: bool = False,
    columns: BatchColumns = PREFERENCE,
) -> Batch:
    """Make the batch of these rows: collate() of their answers' documents, in order, and `answer`.

    Preferences have `chosen` and perhaps `reference`, and groups `advantage` and `drawn`.

    With `shared`, the batch has the prompt of an example once. A row of `ids` is an answer, and begins with
    the last token of its prompt. `prompts` are the tokens before that one. `reset` is true where an answer's
    row begins and its prompt has no other token, so that nothing is taken from the padding. `step_weight` is
    the divisor of the whole step's loss.

    Without rows it is one row without loss, as in collate(), and A is 0.
    """
    if shared and chunk:
        raise ValueError("collate_answers: shared prompts have whole rows, got a chunk")
    examples = list(itertools.chain(*rows))
    batch = _shared(examples, columns) if shared else _separate(rows, chunk, columns)
    name = columns.of_answers
    values = itertools.chain.from_iterable(getattr(example, name) for example in examples)
    entries = {name: torch.tensor(list(values), dtype=ENTRIES[name]["dtype"])}
    if columns.optional and (not examples or getattr(examples[0], columns.of_tokens) is None):
        entries[columns.of_tokens] = None
    return batch.having(**entries, step_weight=step_weight)


def _separate(rows: Sequence[Sequence[AnswerExample]], chunk: int, columns: BatchColumns) -> Batch:
    """Put every answer after its own prompt; the answers of a row stand one after another."""
    width = max([sum(example.inputs for example in row) for row in rows] + [1])
    table = _Table(max(len(rows), 1), width)
    number = 0
    for i, row in enumerate(rows):
        start = 0
        for example in row:
            for place, answer in enumerate(example.answers):
                table.put(i, start, answer, number, _values(example, columns, place))
                table.reset[i, start] = start > 0
                start, number = start + answer.inputs, number + 1
    return table.batch(chunk, columns)


def _shared(examples: list[AnswerExample], columns: BatchColumns) -> Batch:
    """Give each answer a row, which goes on from the state after its prompt."""
    prompts = [example.prompt[:-1] for example in examples]
    lengths = [
        answer.inputs + 1 - prompt_length(answer) for example in examples for answer in example.answers
    ]
    table = _Table(max(len(lengths), 1), max([*lengths, 1]))
    of: list[int] = []  # the prompt of each row
    for number, example in enumerate(examples):
        for place, answer in enumerate(example.answers):
            begin = prompt_length(answer) - 1
            after = Document(answer.ids[begin:], answer.weights[begin:])
            table.put(len(of), 0, after, len(of), _values(example, columns, place))
            table.reset[len(of), 0] = begin == 0
            of.append(number)
    padded, begins = padded_left(prompts or [()])
    batch = table.batch(0, columns)
    return batch.having(prompts=padded, prompt_reset=begins, prompt_of=torch.tensor(of or [0]))


def _values(example: AnswerExample, columns: BatchColumns, place: int) -> np.ndarray | None:
    values = getattr(example, columns.of_tokens)
    return None if values is None else values[place]


class _Table:
    """Arrays (B, T) of a batch, padded on the right."""

    def __init__(self, rows: int, width: int):
        shape = (rows, width)
        self.ids, self.targets = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        self.weights, self.reset = np.zeros(shape, np.float32), np.zeros(shape, bool)
        self.answer, self.values = np.zeros(shape, np.int64), np.zeros(shape, np.float32)

    def put(self, row: int, column: int, answer: Document, number: int, values: np.ndarray | None) -> None:
        """Put an answer's document into a row, with the answer's number and the values of its targets."""
        part = slice(column, column + answer.inputs)
        self.ids[row, part] = answer.ids[:-1]
        self.targets[row, part] = answer.ids[1:]
        self.weights[row, part] = answer.weights[1:]
        self.answer[row, part] = number
        if values is not None:
            self.values[row, part][self.weights[row, part] != 0] = values

    def batch(self, chunk: int, columns: BatchColumns) -> Batch:
        of_tokens = {"answer": self.answer, columns.of_tokens: self.values}
        return Batch(
            ids=torch.from_numpy(self.ids),
            reset=torch.from_numpy(self.reset) if self.reset.any() else None,
            **trained_tokens(self.targets, self.weights, chunk, of_tokens),
        )
