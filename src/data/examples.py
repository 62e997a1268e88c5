"""Examples that a run trains on, as its schedule, evaluations and plan see them: documents, preferences,
questions."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from .collate import collate


class Examples(Sequence):
    """Sequence of examples, each in one row: dataset.Documents, preferences.Preferences or
    questions.Questions."""

    @property
    @abc.abstractmethod
    def word(self) -> str:
        """The word for one example, such as document."""

    @property
    @abc.abstractmethod
    def lengths(self) -> np.ndarray:
        """One more than the tokens that each example takes of a row, (n,) int32."""

    @property
    @abc.abstractmethod
    def target_counts(self) -> np.ndarray:
        """Trained tokens of each example, (n,) int32."""

    @property
    @abc.abstractmethod
    def weight_sums(self) -> np.ndarray:
        """Share of each example in the divisor of a step's loss, (n,) float64 or int32."""

    @property
    @abc.abstractmethod
    def tokens(self) -> int:
        """Tokens of all examples."""

    @property
    @abc.abstractmethod
    def digest(self) -> str:
        """Hash everything that is trained on, with SHA-256."""

    @abc.abstractmethod
    def take(self, chosen: np.ndarray) -> Examples:
        """Return the examples at these places."""

    @abc.abstractmethod
    def inputs(self) -> Iterable[np.ndarray]:
        """Yield the tokens that are read, (n,) int32: all but the last of each text."""

    @abc.abstractmethod
    def contents(self) -> Iterable[np.ndarray]:
        """Yield the key of each example, (n,) int32."""

    @abc.abstractmethod
    def held_out_by(self) -> Iterable[np.ndarray]:
        """Yield tokens of each example, (n,) int32: examples with equal ones are held out together."""

    def collator(self, chunk: int = 0, shared: bool = False) -> Callable[[list[list], float], dict]:
        """Return the one function that makes batches of rows of these: (rows, step_weight) -> the batch of
        collate() or collate_answers().
        """
        return functools.partial(collate, chunk=chunk)

    def to_ask(self, count: int) -> Sequence:
        """Return documents of which held_out.questions() takes the first `count` that can be asked."""
        return self

    conversation: np.ndarray | None = None  # (n,) int32, see dataset.Documents; None: each is one of its own
    by_prompt = True  # whether held_out_by() is the prompt
    alone = False  # whether an example has its row for itself, also if rows are packed
    # changes to documents so that they fit into rows; preferences and questions are never cut
    cut = cut_tokens = 0  # examples that were longer than ctx_len and lost their end; tokens that they lost
    split = 0  # texts that became several examples, of which at least one is here
    # (conversations that became several examples, of which at least one is here; these examples)
    rewritten = 0, 0
    untrained = 0  # examples that were left out because they have no trained token

    def too_long_text(self, ctx_len: int) -> str:
        """Tell how many were left out as longer than a row, and where the first are; "" for none."""
        return ""

    @property
    def targets(self) -> int:
        """Trained tokens of all examples."""
        return int(self.target_counts.sum(dtype=np.int64))

    @property
    def weight(self) -> float:
        """The sum of weight_sums."""
        return float(self.weight_sums.sum(dtype=np.float64))
