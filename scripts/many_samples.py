"""Scores of several answers to each question: pass@k, and the answer that most of them give."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Hashable, Sequence


def pass_at_k(answers: int, right: int, k: int) -> float:
    """The chance that of k answers out of so many, `right` of them right, at least one is right.

    Averaged over the questions it is the unbiased estimate of arXiv 2107.03374, equation 1.
    """
    return 1 - math.comb(answers - right, k) / math.comb(answers, k)


def counts_to_report(answers: int) -> list[int]:
    """The k of pass@k for so many answers: 1, 2, 4, ... and all of them."""
    powers = [1 << i for i in range(answers.bit_length())]
    return sorted({*powers, answers})


def most_frequent(results: Sequence[Hashable | None]) -> int | None:
    """The place of the first answer with the most frequent result; of equally frequent ones the first seen.

    None stands for an answer without a result, which has no vote. Without a vote there is no answer.
    """
    votes = Counter(result for result in results if result is not None)
    if not votes:
        return None
    # the first of the largest counts, in the order in which they were seen
    winner = max(votes, key=votes.__getitem__)
    return results.index(winner)


@dataclasses.dataclass(frozen=True)
class Scores:
    """The figures of an evaluation."""

    pass_at: dict[int, float]  # k -> mean of pass@k; that of 1 is the share of right answers
    majority: float | None  # share of questions whose most frequent answer is right; None: not asked for

    @property
    def accuracy(self) -> float:
        return self.pass_at[1]

    def text(self) -> str:
        """In words, for several answers to each question."""
        parts = [f"pass@{k} {share:.1%}" for k, share in self.pass_at.items()]
        if self.majority is not None:
            parts.append(f"majority {self.majority:.1%}")
        return ", ".join(parts)

    def record(self) -> dict[str, float]:
        """For JSON."""
        found = {f"pass@{k}": share for k, share in self.pass_at.items()}
        return found if self.majority is None else found | {"majority": self.majority}


def scores_of(
    right: Sequence[Sequence[bool]], results: Sequence[Sequence[Hashable | None]] | None = None
) -> Scores:
    """The scores of questions with equally many answers each: whether they are right, and what they say.

    Without `results` there is no majority: programs, for one, have no normal form.
    """
    answers = len(right[0])
    pass_at = {
        k: sum(pass_at_k(answers, sum(row), k) for row in right) / len(right)
        for k in counts_to_report(answers)
    }
    if results is None:
        return Scores(pass_at, None)
    chosen = [most_frequent(row) for row in results]
    won = sum(place is not None and row[place] for row, place in zip(right, chosen, strict=True))
    return Scores(pass_at, won / len(right))
