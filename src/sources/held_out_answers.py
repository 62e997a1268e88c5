"""Greedy answers to held-out questions: how many are asked, which are right, and what they have in common."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..data.chat_template import BEGUN_THOUGHTS
from ..data.encode import Encoder
from ..data.held_out import FORWARD, SAMPLE_TOKENS, SampleQuestion
from ..data.templates import answer_text
from ..evaluation.scoring import SCORES, concluded
from ..inference.request import Answer
from .estimates import DRAWN

MOST_ASKED = 40  # the most questions; two standard errors of a half of them are 16 points
SHORT = 40  # characters of an answer that is compared as a whole: a longer one has other words for the same
LOOP = re.compile(r"(.{1,60}?)\1{3}$", re.DOTALL)  # an end that says the same four times


def affordable(samples: Sequence[SampleQuestion], more: Sequence[SampleQuestion], budget: float) -> int:
    """Count how many of `more` a budget in trained tokens pays for, after the samples."""
    limit = limit_of([*samples, *more])
    costs = [FORWARD * len(question.prompt) + DRAWN * limit for question in (*samples, *more)]
    return max(0, int(np.searchsorted(np.cumsum(costs), budget, side="right")) - len(samples))


def limit_of(asked: Sequence[SampleQuestion]) -> int:
    """Choose the most tokens of an answer: those of the longest right one, a quarter more, and 16."""
    most = max((len(question.answer) for question in asked), default=0)
    return most + most // 4 + 16


def in_common(said: Sequence[str], right: Sequence[str], endless: int) -> dict[str, Any]:
    """Count what answers have in common, for an evaluation's line; `endless` of them do not end."""
    (common, same), (_, same_right) = (Counter(texts).most_common(1)[0] for texts in (said, right))
    found = {
        "empty": sum(not text for text in said),
        "endless": endless,
        "same": same,  # the most common answer
        "common": common[:SHORT],
        "same_right": same_right,  # the most common right one
    }
    return {"asked": len(said), "answers": found}


class Judge:
    """Judge of the answers to the questions of a run, as scripts.evaluate judges them.

    `score` is boxed or number where all right answers end so, else exact where they are short, else "". It is
    "" too where most right ones are longer than SAMPLE_TOKENS, at which answers are cut: none would be right.
    """

    def __init__(self, asked: Sequence[SampleQuestion], encoder: Encoder):
        self.encoder = encoder
        lengths = [len(question.answer) for question in asked]
        self.longest = max(lengths, default=0)
        decode = encoder.tokenizer.decode
        self.openings = [BEGUN_THOUGHTS.search(decode(question.prompt)) for question in asked]
        self.right = [self._said(i, decode(question.answer)) for i, question in enumerate(asked)]
        self.score = ""
        if not self.right or statistics.median(lengths) > SAMPLE_TOKENS:
            return
        if all("\\boxed" in right for right in self.right):
            self.score = "boxed"
        elif all(concluded(right) and SCORES["number"].result(right) is not None for right in self.right):
            self.score = "number"
        elif statistics.median(map(len, self.right)) <= SHORT:
            self.score = "exact"

    def counted(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Return the entries of an evaluation's line: {} without questions."""
        if not self.right:
            return {}
        said = [self._said(i, answer.text) for i, answer in enumerate(answers)]
        found = in_common(said, self.right, sum(map(self._is_endless, answers)))
        if not self.score:
            return found
        right = sum(map(SCORES[self.score].agree, said, self.right))
        return {**found, "right_answers": right / len(said)}

    def _said(self, i: int, text: str) -> str:
        """Return an answer without its thoughts and what follows its turn."""
        opening = self.openings[i]
        return answer_text(text, self.encoder.template, opening[0] if opening else "")

    def _is_endless(self, answer: Answer) -> bool:
        """Tell whether an answer is longer than all right ones, or ends in a loop."""
        return answer.cut and (len(answer.tokens) > self.longest or bool(LOOP.search(answer.text)))
