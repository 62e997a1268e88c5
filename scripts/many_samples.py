"""Scores of several answers to each question: pass@k, and the most frequent answer."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Hashable, Sequence


def pass_at_k(answers: int, right: int, k: int) -> float:
    """Compute the chance that k answers, out of `answers` of which `right` are right, include a right one.

    The mean over the questions is the unbiased estimate of arXiv 2107.03374, equation 1.
    """
    return 1 - math.comb(answers - right, k) / math.comb(answers, k)


def counts_to_report(answers: int) -> list[int]:
    """List the k of pass@k for `answers` answers: 1, 2, 4, ... and all of them."""
    powers = [1 << i for i in range(answers.bit_length())]
    return sorted({*powers, answers})


def most_frequent(results: Sequence[Hashable | None]) -> int | None:
    """Find the first answer with the most frequent result; of equally frequent results the first seen wins.

    An answer with the result None has no vote. Without any vote the function returns None.
    """
    votes = Counter(result for result in results if result is not None)
    if not votes:
        return None
    # max() returns the first of equal counts, and the counts are in the order of the answers
    winner = max(votes, key=votes.__getitem__)
    return results.index(winner)


@dataclasses.dataclass(frozen=True)
class Scores:
    """Figures of an evaluation."""

    pass_at: dict[int, float]  # k -> mean of pass@k; pass@1 is the share of right answers
    majority: float | None  # share of questions whose most frequent answer is right; None: not counted

    @property
    def accuracy(self) -> float:
        return self.pass_at[1]

    def text(self) -> str:
        """Write the scores for people, for several answers to each question."""
        parts = [f"pass@{k} {share:.1%}" for k, share in self.pass_at.items()]
        if self.majority is not None:
            parts.append(f"majority {self.majority:.1%}")
        return ", ".join(parts)

    def record(self) -> dict[str, float]:
        """Return the scores for JSON."""
        shares = {f"pass@{k}": share for k, share in self.pass_at.items()}
        return shares if self.majority is None else shares | {"majority": self.majority}


def scores_of(
    right: Sequence[Sequence[bool]], results: Sequence[Sequence[Hashable | None]] | None = None
) -> Scores:
    """Score questions that all have the same number of answers; right: whether each answer is right.

    Without `results` there is no majority: programs, for example, have no normal form to compare.
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
