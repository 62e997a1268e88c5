"""Blocks of a reference pass's values on disk; each appears whole, so that a killed pass can go on."""

from __future__ import annotations

import contextlib
import os
import pathlib
import time
from collections.abc import Iterator

import numpy as np

from rwkv_miss.errors import UserError
from rwkv_miss.files.output import write_bytes
from rwkv_miss.progress import print_notes

from ..ops.build import locked

PAUSE, PAUSE_SHARE = 10.0, 0.05  # seconds between two blocks, and in a long pass the share of its time
NAMES = "[0-9]" * 12  # pattern of the files' names


class ValueBlocks:
    """Values of one dtype in the files of a folder, block by block. A file is named by the count of values
    before it.

    One process writes. The others, and one whose folder is None, keep nothing.
    """

    def __init__(self, folder: pathlib.Path | None, dtype: np.dtype, called: str = "reference"):
        self.folder, self.dtype, self.called = folder, dtype, called
        self.waiting: list[np.ndarray] = []
        self.written = 0
        self.begun = self.last = time.monotonic()

    def read(self) -> np.ndarray:
        """Read all values there, (n,). Later add() continues after them."""
        parts = [np.empty(0, self.dtype)]
        while self.folder is not None and self._path.exists():
            part = np.fromfile(self._path, self.dtype)
            if not len(part):  # the machine went down
                break
            parts.append(part)
            self.written += len(part)
        return np.concatenate(parts)

    def add(self, values: np.ndarray) -> None:
        """Add values, which are written now and then."""
        self.waiting.append(values)
        now = time.monotonic()
        if now - self.last > max(PAUSE, PAUSE_SHARE * (now - self.begun)):
            self.write()
            self.last = now

    def write(self) -> None:
        """Write what is not on the disk yet. If that fails, a note says so, and no more is kept."""
        values = np.concatenate([np.empty(0, self.dtype), *self.waiting])
        self.waiting.clear()
        if self.folder is None or not len(values):
            return
        try:
            write_bytes(self._path, values.tobytes())
            self.written += len(values)
        except (OSError, UserError) as error:
            print_notes([f"the values of the {self.called} are not kept any further: {error}"])
            self.folder = None

    def clear(self) -> None:
        """Remove all files, and the waiting values."""
        self.waiting.clear()
        self.written = 0
        for kept in self.folder.glob(NAMES) if self.folder else ():
            kept.unlink()

    @property
    def _path(self) -> pathlib.Path:
        return self.folder / f"{self.written:012d}"  # one of NAMES


@contextlib.contextmanager
def blocks_in(folder: pathlib.Path, dtype: np.dtype, is_writer: bool, called: str) -> Iterator[ValueBlocks]:
    """Open the blocks of a folder. The writing process locks it, and another run with the same one waits.

    `called` names the model that reads, in notes.
    """
    with contextlib.ExitStack() as stack:
        place = None
        if is_writer:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(folder / "lock", f"the values of the {called}"))
                os.utime(folder)  # time of the last use
                for left in folder.glob("*.tmp"):  # leftovers of a killed pass
                    left.unlink()
                place = folder
            except OSError as error:
                print_notes([f"the values of the {called} can't be kept in {folder} ({error})"])
        blocks = ValueBlocks(place, dtype, called)
        yield blocks
        blocks.write()
