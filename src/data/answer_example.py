"""Examples whose answers to one prompt are compared: each answer is a document, prompt + answer."""

from __future__ import annotations

import dataclasses

import numpy as np

from .file_documents import Document


@dataclasses.dataclass
class AnswerExample:
    """Example of answers to one prompt; all have the same tokens before the first trained one."""

    answers: list[Document]

    @property
    def prompt(self) -> np.ndarray:
        """Tokens before the first trained one, (p,) int32 with p >= 1."""
        return self.answers[0].ids[: prompt_length(self.answers[0])]

    @property
    def inputs(self) -> int:
        """Tokens that the document takes of a row."""
        return sum(answer.inputs for answer in self.answers)

    @property
    def targets(self) -> int:
        """Trained tokens."""
        return sum(answer.targets for answer in self.answers)


@dataclasses.dataclass
class AnswerGroup(AnswerExample):
    """Example of answers that a model gave to one question, with the advantage of each.

    All their tokens are trained, the end among them.
    """

    advantage: list[float]  # one number for each answer
    drawn: list[np.ndarray]  # ln p of each answer's tokens when they were drawn, (t,) float32

    @classmethod
    def of(
        cls, prompt: np.ndarray, tokens: list[list[int]], advantage: list[float], drawn: list[np.ndarray]
    ) -> AnswerGroup:
        """Make the example from the tokens of a prompt, (p,) with p >= 1, and those of each answer."""
        answers = []
        for answer in tokens:
            ids = np.concatenate([prompt, answer]).astype(np.int32)
            weights = (np.arange(len(ids)) >= len(prompt)).astype(np.float32)
            answers.append(Document(ids, weights))
        return cls(answers, advantage, drawn)


def prompt_length(answer: Document) -> int:
    """Return the place of the first trained token, which is never the first token."""
    return 1 + int(np.argmax(answer.weights[1:] != 0))
