"""Mean and median of a sample with their uncertainty, and the scores of GLUE's tasks.

A score compares predicted and right classes, two lists of equal length.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def accuracy(predicted: Sequence[int], right: Sequence[int]) -> float:
    """Return the share of predictions that are right."""
    return sum(p == r for p, r in zip(predicted, right, strict=True)) / len(right)


def matthews(predicted: Sequence[int], right: Sequence[int]) -> float:
    """Compute Matthews' correlation of two classes, -1 to 1; 0, as in other packages, if a side has one class
    only.
    """
    tp, fp, fn, tn = _counts(predicted, right)
    scale = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(scale) if scale else 0.0


def f1(predicted: Sequence[int], right: Sequence[int]) -> float:
    """Compute the harmonic mean of precision and recall of class 1; 0 if class 1 was never predicted
    right."""
    tp, fp, fn, _ = _counts(predicted, right)
    return 2 * tp / (2 * tp + fp + fn) if tp else 0.0


def _counts(predicted: Sequence[int], right: Sequence[int]) -> tuple[int, int, int, int]:
    """Count true positives, false positives, false negatives, true negatives of class 1."""
    pairs = list(zip(predicted, right, strict=True))
    return pairs.count((1, 1)), pairs.count((1, 0)), pairs.count((0, 1)), pairs.count((0, 0))


def median_and_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median, and the two values of the sample between which the true median lies with 95 %
    certainty.

    This holds for every distribution. Up to 8 values the two are the smallest and the largest; with fewer
    than 6 values the certainty is lower.
    """
    ordered, n, left = sorted(values), len(values), 0
    # each value has equal chances to be above or below the true median
    while 2 * sum(math.comb(n, i) for i in range(left + 2)) <= 0.05 * 2**n:
        left += 1
    return statistics.median(ordered), ordered[left], ordered[n - 1 - left]


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean, and the standard deviation that the sample suggests (n - 1), which is NaN for one
    value.
    """
    mean = sum(values) / len(values)
    return mean, (
        math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else math.nan
    )
