"""Learning rates on a grid, tried until the best one has a worse one on both sides."""

from __future__ import annotations

import math
from collections.abc import Callable


def enclose(loss_at: Callable[[float], float], first: float, most: int) -> dict[float, float]:
    """Return the losses of at most `most` rates: three around `first`, then further ones beyond the better
    end.

    The rates are 1 and 3 of every decade; the middle one is the nearest to `first`. The search ends when the
    best rate has a worse one on both sides. Both sides are tried, because a loss may fall again above a
    valley. A loss is infinite if the training diverged.
    """
    middle = round(2 * math.log10(first))
    low, high = middle - 1, middle + 1
    tried = {rung(k): loss_at(rung(k)) for k in (middle, low, high)}
    while len(tried) < most:
        best = best_of(tried)
        if best == rung(high):
            high += 1
        elif best == rung(low):
            low -= 1
        else:
            break
        new = rung(high) if rung(high) not in tried else rung(low)
        tried[new] = loss_at(new)
    return dict(sorted(tried.items()))


def rung(k: int) -> float:
    """Return rate number k: 0.001 for -6, 0.003 for -5, 0.01 for -4."""
    decade, half = divmod(k, 2)
    return float(f"{3 if half else 1}e{decade}")


def best_of(tried: dict[float, float]) -> float:
    """Return the rate with the lowest loss, and of rates with equal losses the lowest."""
    return min(tried, key=lambda rate: (tried[rate], rate))
