"""Curves of a run from its metrics.jsonl, of which only what is new is read, and thinned for the page."""

from __future__ import annotations

import os
import time
from array import array

import numpy as np

from ..common.bounded_files import open_regular, parse_json

PART = 1 << 24  # bytes that are read at once
LONGEST_LINE = 1 << 16  # bytes; train.py's have a thousand
MOST_NAMES, LONGEST_NAME = 40, 80
MOST_LINES = 1 << 22
SECONDS = 5  # seconds of one update; the next one goes on from there


class MetricColumns:
    """Columns of numbers from the lines of a growing file, by name. A file that was written anew is read
    again."""

    def __init__(self, path: str):
        self.path = path
        self.forget(None)

    def forget(self, identity: int | None) -> None:
        self.identity, self.offset, self.count = identity, 0, 0
        self.columns: dict[str, array] = {"step": array("d")}

    def update(self) -> None:
        """Read the lines that were added, for at most SECONDS."""
        end = time.monotonic() + SECONDS
        try:
            with open_regular(self.path) as file:
                stat = os.fstat(file.fileno())
                if stat.st_ino != self.identity or stat.st_size < self.offset:
                    self.forget(stat.st_ino)
                while self.offset < stat.st_size and self.count < MOST_LINES and time.monotonic() < end:
                    file.seek(self.offset)
                    part = file.read(PART)
                    whole = part.rfind(b"\n") + 1  # the last line may be half written
                    if not whole and len(part) < PART:
                        return
                    whole = whole or PART  # a line that is longer than PART is skipped
                    self._add(part[:whole].splitlines())
                    self.offset += whole
        except OSError:
            self.forget(None)

    def _add(self, lines: list[bytes]) -> None:
        for line in lines[: MOST_LINES - self.count]:
            try:
                values = parse_json(line) if len(line) <= LONGEST_LINE else None
            except ValueError:
                continue
            if not isinstance(values, dict) or not isinstance(values.get("step"), int):
                continue
            for name, value in values.items():
                if name not in self.columns and isinstance(value, (int, float)):
                    if len(self.columns) < MOST_NAMES and len(name) <= LONGEST_NAME:
                        self.columns[name] = array("d", [np.nan]) * self.count
            for name, column in self.columns.items():
                value = values.get(name)
                is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
                column.append(value if is_number else np.nan)
            self.count += 1

    def last(self, name: str) -> float | None:
        """Return the newest value of a column; None where there is none."""
        column = self.columns.get(name)
        return finite(column[-1]) if column else None

    def thinned(self, points: int, begin: float, end: float) -> dict[str, list]:
        """Return at most `points` lines from the steps begin to end, by column: from each part the lines with
        the lowest and the highest score (the reward, else the loss). `mean` is the running mean of the score
        over a hundredth of the run."""
        columns = {name: np.array(column) for name, column in self.columns.items()}
        scores = columns.get("reward", columns.get("loss", np.full(self.count, np.nan)))
        columns["mean"] = running_mean(scores, max(1, self.count // 100))
        inside = np.flatnonzero((columns["step"] >= begin) & (columns["step"] <= end))
        if len(inside) > points:
            chosen = {inside[0], inside[-1]}
            for part in np.array_split(inside, max(1, (points - 2) // 2)):
                low, high = np.nan_to_num(scores[part], nan=np.inf), np.nan_to_num(scores[part], nan=-np.inf)
                chosen |= {part[low.argmin()], part[high.argmax()]}
            inside = np.array(sorted(chosen))
        return {name: [finite(value) for value in column[inside]] for name, column in columns.items()}


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Return the mean of the last `width` numbers at each place, without those that are not finite."""
    known = np.isfinite(values)
    sums, counts = (
        np.concatenate([np.zeros(width), np.cumsum(part)]) for part in (np.where(known, values, 0.0), known)
    )
    with np.errstate(invalid="ignore"):
        return (sums[width:] - sums[:-width]) / (counts[width:] - counts[:-width])


def finite(value: float) -> float | None:
    """Return a number as JSON has it, with 6 digits."""
    return None if not np.isfinite(value) else int(value) if value == int(value) else float(f"{value:.6g}")
