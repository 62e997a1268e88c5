"""The folder of a run: whether it can be written, and that only one run at a time does."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator

from rwkv_miss.errors import UserError


def require_folder(folder: str) -> None:
    """UserError unless files can be made in the folder, which need not be there yet: call it before work that would be lost."""
    there = existing_part(folder)
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise UserError(f"--proj_dir {folder}: no file can be made in {there} ({error.strerror}); choose another one") from None


def existing_part(folder: str) -> str:
    """The folder, or its nearest parent that exists: where it will be made."""
    folder = os.path.abspath(folder)
    return folder if os.path.exists(folder) else existing_part(os.path.dirname(folder))


@contextlib.contextmanager
def alone_in(folder: str) -> Iterator[None]:
    """Hold the folder, which is there, for one run; a second one is a UserError. The system gives it back when the process dies.

    Windows and some network file systems have no such lock; there nothing is held.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    place = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(place)
        raise UserError(f"another run is writing into {folder} now; wait for its end, or choose another --proj_dir") from None
    except OSError:
        pass
    try:
        yield
    finally:
        os.close(place)
