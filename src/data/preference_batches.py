"""Rows of preferences -> the tensors of a batch: an answer after its prompt, or a prompt for both answers."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import numpy as np
import torch

from .collate import collate, trained_tokens
from .file_documents import Document
from .preferences import Preference, Preferences, prompt_length
from .units import Units


def collator(documents: Units, chunk: int = 0, shared: bool = False) -> Callable[[list[list], float], dict]:
    """The one way to make batches of rows of these: (rows, step_weight) -> what collate() or
    collate_preferences() makes of them.
    """
    if isinstance(documents, Preferences):
        return functools.partial(collate_preferences, chunk=chunk, shared=shared)
    return functools.partial(collate, chunk=chunk)


def collate_preferences(
    rows: list[list[Preference]], step_weight: float, chunk: int = 0, shared: bool = False
) -> dict:
    """The batch of these rows: what collate() makes of their answers' documents, in order, and

    answer: (n,) int64, the answer that each trained token belongs to. chosen: (A,) bool, of each answer; a
    pair is the answers 2p, chosen, and 2p + 1. reference: (n,) float32, None without a reference.

    With `shared`, the prompt of a pair stands in the batch once. ids: (A, T), a row for each answer, which
    begins with the last token of its prompt. prompts: (P, S) int64, the tokens before that one, padded on the
    left. prompt_reset: (P, S) bool, true where a padded prompt begins; None if none is padded. prompt_of:
    (A,) int64, the prompt of each row. `reset` is true where an answer's row begins and its prompt has no
    other token, so that nothing is taken from the padding. step_weight: the units of the whole step.

    Without rows it is one row without loss, as in collate(), and A is 0.
    """
    if shared and chunk:
        raise ValueError("collate_preferences: shared prompts have whole rows, got a chunk")
    units = list(itertools.chain(*rows))
    chosen = [chosen for unit in units for chosen in unit.chosen]
    batch = _shared(units) if shared else _separate(rows, chunk)
    with_reference = bool(units) and units[0].reference is not None
    reference = batch.pop("reference")
    return {
        **batch,
        "chosen": torch.tensor(chosen, dtype=torch.bool),
        "reference": reference if with_reference else None,
        "step_weight": step_weight,
    }


def _separate(rows: list[list[Preference]], chunk: int) -> dict:
    """Every answer after its own prompt; the answers of a row one after another."""
    width = max([sum(unit.inputs for unit in row) for row in rows] + [1])
    table = _Table(max(len(rows), 1), width)
    number = 0
    for i, row in enumerate(rows):
        start = 0
        for unit in row:
            for place, answer in enumerate(unit.answers):
                table.put(i, start, answer, number, _reference_of(unit, place))
                table.reset[i, start] = start > 0
                start, number = start + answer.inputs, number + 1
    return table.batch(chunk)


def _shared(units: list[Preference]) -> dict:
    """A row for each answer, which goes on from the state after its prompt."""
    prompts = [unit.prompt[:-1] for unit in units]
    lengths = [answer.inputs + 1 - prompt_length(answer) for unit in units for answer in unit.answers]
    table = _Table(max(len(lengths), 1), max([*lengths, 1]))
    of: list[int] = []  # the prompt of each row
    for number, unit in enumerate(units):
        for place, answer in enumerate(unit.answers):
            begin = prompt_length(answer) - 1
            after = Document(answer.ids[begin:], answer.weights[begin:])
            table.put(len(of), 0, after, len(of), _reference_of(unit, place))
            table.reset[len(of), 0] = begin == 0
            of.append(number)
    read = np.zeros((max(len(prompts), 1), max([*map(len, prompts), 1])), np.int64)
    begins = np.zeros(read.shape, bool)
    for i, prompt in enumerate(prompts):
        begin = read.shape[1] - len(prompt)
        read[i, begin:] = prompt
        begins[i, begin : begin + 1] = begin > 0
    return {
        **table.batch(0),
        "prompts": torch.from_numpy(read),
        "prompt_reset": torch.from_numpy(begins) if begins.any() else None,
        "prompt_of": torch.tensor(of or [0]),
    }


def _reference_of(unit: Preference, place: int) -> np.ndarray | None:
    return None if unit.reference is None else unit.reference[place]


class _Table:
    """The arrays (B, T) of a batch, padded on the right."""

    def __init__(self, rows: int, width: int):
        shape = (rows, width)
        self.ids, self.targets = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        self.weights, self.reset = np.zeros(shape, np.float32), np.zeros(shape, bool)
        self.answer, self.reference = np.zeros(shape, np.int64), np.zeros(shape, np.float32)

    def put(self, row: int, column: int, answer: Document, number: int, reference: np.ndarray | None) -> None:
        """An answer's document, the number of the answer, and ln p of its trained tokens."""
        part = slice(column, column + answer.inputs)
        self.ids[row, part] = answer.ids[:-1]
        self.targets[row, part] = answer.ids[1:]
        self.weights[row, part] = answer.weights[1:]
        self.answer[row, part] = number
        if reference is not None:
            self.reference[row, part][self.weights[row, part] != 0] = reference

    def batch(self, chunk: int) -> dict:
        beside = {"answer": self.answer, "reference": self.reference}
        return {
            "ids": torch.from_numpy(self.ids),
            "reset": torch.from_numpy(self.reset) if self.reset.any() else None,
            **trained_tokens(self.targets, self.weights, chunk, beside),
        }
