"""Progress of long work: a bar on a terminal, elsewhere a line now and then. Both go to stderr.

    for path in progress(paths, "hashing", unit="files"):           # a loop over things that can be counted
        ...
    with Progress("merging", total=size / 1e6, unit="MB") as bar:   # any other work of a known size
        bar.update(part / 1e6)
    with Progress("reading the plan"):                              # work without anything to count
        ...

Work of less than a second shows nothing. Inside `with` a bar also goes on while nothing is counted.
"""

from __future__ import annotations

import functools
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import ClassVar, TypeVar

T = TypeVar("T")
DELAY, REDRAW = 1.0, 0.1  # seconds before a bar is shown, and between two drawings
TICK = 1.0  # seconds between two redraws of a bar while nothing is counted
LINE, LINE_SHARE = 10.0, 0.1  # seconds between two lines; in long work this share of the elapsed time
BAR, LEAST_BAR = 20, 5  # characters


def progress(
    items: Iterable[T], what: str, total: float | None = None, unit: str = "", shown: bool = True
) -> Iterator[T]:
    """Yield the items one by one, with a Progress that counts them; `total`: for items without a len()."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)
    with Progress(what, total, unit, shown) as bar:
        for item in items:
            yield item
            bar.update()


def tensors_with_progress(
    items: Iterable[tuple[str, T]], what: str, size: int, shown: bool = True
) -> Iterator[tuple[str, T]]:
    """Yield (name, tensor) one by one, with a Progress that counts their bytes out of `size`."""
    with Progress(what, size / 1e6, "MB", shown) as bar:
        for name, tensor in items:
            yield name, tensor
            bar.update(tensor.nbytes / 1e6)


class Progress:
    """Bar for the work `what` on `total` things called `unit` ("files"), of which `done` are done already.

    `total` None: the number is not known. `shown`: True in one of several processes. `delay`: seconds before
    the first drawing on a terminal, DELAY unless given. Of nested bars only the innermost redraws itself.
    """

    open: ClassVar[list[Progress]] = []

    def __init__(
        self,
        what: str,
        total: float | None = None,
        unit: str = "",
        shown: bool = True,
        done: float = 0,
        delay: float | None = None,
    ) -> None:
        self.what, self.total, self.unit, self.shown = what, total, unit, shown
        self.first = self.done = done
        self.note = ""
        self.terminal = sys.stderr.isatty()
        self.begun = time.monotonic()
        delay = DELAY if delay is None else delay
        self.next = self.begun + (delay if self.terminal else LINE)
        self.drawn = False
        self.ended = threading.Event()
        if not delay:
            self._show()

    def update(self, count: float = 1, note: str = "") -> None:
        """Count `count` more as done; `note`: text at the end of the line, until the next note."""
        self.done += count
        self.note = note or self.note
        self._show()

    def _show(self) -> None:
        """Draw the bar, or print a line, if it is time."""
        now = time.monotonic()
        if self.shown and now >= self.next:
            elapsed = now - self.begun
            if self.terminal:
                self.next = now + REDRAW
                draw(self.text(elapsed))
                self.drawn = True
            else:
                self.next = now + max(LINE, LINE_SHARE * elapsed)
                print(self.text(elapsed), file=sys.stderr, flush=True)

    def warm_up(self, count: float = 1) -> None:
        """Count `count` more as done, and measure the rate from here: the first ones were slower."""
        self.done += count
        self.first, self.begun = self.done, time.monotonic()

    def text(self, elapsed: float) -> str:
        """Return the line after `elapsed` seconds: "merging [##  ]  50%, 50 of 100 MB, 9 MB/s, 5 s left"."""
        share = min(self.done / self.total, 1) if self.total else 0
        percent = f" {share:4.0%}, " if self.total else " "
        if not (self.total or self.unit or self.done):
            return f"{self.what}: {duration_text(elapsed)}"
        notes = self.note.split(", ") if self.note else []
        if not (self.terminal and self.total):
            return f"{self.what}:{percent}{self._numbers(elapsed, notes)}"
        # a narrow terminal drops first the rate, which the time left tells, then the bar, then the last notes
        for with_rate in (True, False):
            rest = percent + self._numbers(elapsed, notes, with_rate)
            room = min(BAR, line_width() - len(f"{self.what} []{rest}"))
            if room >= LEAST_BAR:
                return f"{self.what} [{'#' * int(room * share):<{room}}]{rest}"
        while True:
            text = f"{self.what}: {self._numbers(elapsed, notes, with_rate=False)}"
            if len(text) <= line_width() or not notes:
                return text
            notes.pop()

    def _numbers(self, elapsed: float, notes: list[str], with_rate: bool = True) -> str:
        whole = f"{self.done:,.0f} of {self.total:,.0f}" if self.total else f"{self.done:,.0f}"
        parts = [f"{whole} {self.unit}".strip()]
        new = self.done - self.first
        if new and elapsed:
            rate = new / elapsed
            if with_rate:
                parts.append(f"{rate:,.3g} {self.unit}/s" if rate >= 1 else f"{1 / rate:.3g} s each")
            if self.total:
                parts.append(f"{duration_text(max(self.total - self.done, 0) / rate)} left")
        elif elapsed >= DELAY:
            parts.append(f"{duration_text(elapsed)} so far")
        return ", ".join(parts + notes)

    def start(self) -> Progress:
        """Redraw the bar every TICK from now on, until close()."""
        if self.shown:
            Progress.open.append(self)
            self.thread = threading.Thread(target=self._tick, daemon=True)
            self.thread.start()
        return self

    def _tick(self) -> None:
        while not self.ended.wait(TICK):
            if Progress.open[-1:] == [self]:
                self._show()

    def close(self) -> None:
        """End the bar and empty its line on the terminal."""
        if self in Progress.open:
            self.ended.set()
            self.thread.join()
            Progress.open.remove(self)
        if self.drawn:
            clear()
            self.drawn = False

    def __enter__(self) -> Progress:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.close()


def say(text: str) -> None:
    """Remove the bar from the terminal's line, then print a line to stdout."""
    clear()
    print(text, flush=True)


def print_notes(notes: Iterable[str]) -> None:
    """Print notes on stderr, each once in a process, because a program may read its model several times."""
    for note in notes:
        _print_note(note)


@functools.cache
def _print_note(note: str) -> None:
    clear()
    print(f"note: {note}", file=sys.stderr, flush=True)


def clear() -> None:
    """Empty the line that a bar may be on; nothing happens if stderr is no terminal."""
    if sys.stderr.isatty():
        draw("")
        print("\r", end="", file=sys.stderr, flush=True)


def draw(text: str) -> None:
    """Write a line of the terminal. The last column stays free: some terminals begin a new line after it."""
    width = line_width()
    print("\r" + text[:width].ljust(width), end="", file=sys.stderr, flush=True)


def line_width() -> int:
    """Return the columns that a line of the terminal may have."""
    return max(shutil.get_terminal_size().columns - 1, 1)


def duration_text(seconds: float) -> str:
    """Write a duration: "0.3 s", "14 min", "5 h 12 min", "3 days 4 h"."""
    if seconds < 119.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    if (minutes := round(seconds / 60)) < 120:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} days {hours % 24} h"
