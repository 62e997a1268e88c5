"""The folder of a run: whether it can be written, and that only one run at a time looks at it and writes."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator

from rwkv_miss.errors import UserError

from .config.launcher import is_first_process
from .distributed.watchdog import Lifeline

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def require_folder(folder: str) -> None:
    """UserError unless files can be made in the folder, which need not be there yet: call it before work that
    would be lost.
    """
    there = existing_part(folder)
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise UserError(
            f"--proj_dir {folder}: no file can be made in {there} ({error.strerror}); choose another one"
        ) from None


def existing_part(folder: str) -> str:
    """The folder, or its nearest parent that exists: where it will be made."""
    folder = os.path.abspath(folder)
    return folder if os.path.exists(folder) else existing_part(os.path.dirname(folder))


@contextlib.contextmanager
def folder_of_run(folder: str, others: Lifeline | None) -> Iterator[None]:
    """In each process of a run, all that it does with its folder: the first one holds it, and the others,
    which only read, look into it after that. `others` is the connection to them where they are not started by
    the first one.
    """
    if is_first_process():
        with alone_in(folder):
            if others:
                others.tell_folder_is_held()
            yield
        return
    if others:
        others.wait_for_folder()
    yield


@contextlib.contextmanager
def alone_in(folder: str) -> Iterator[None]:
    """Hold the folder for one run; a second one is a UserError. It is made, and removed if it is empty at the
    end.

    The system gives the folder back when the process dies. Windows and some network file systems have no such
    lock; there nothing is held.
    """
    require_folder(folder)
    there = existing_part(folder)
    place = _hold(folder)
    try:
        yield
    finally:
        _remove_empty(folder, there)  # while it is held: nobody else is about to use it
        if place is not None:
            os.close(place)


def _hold(folder: str) -> int | None:
    """Make the folder and lock it; the file descriptor that keeps the lock, None where there are no locks."""
    if fcntl is None:
        os.makedirs(folder, exist_ok=True)
        return None
    while True:
        os.makedirs(folder, exist_ok=True)
        try:
            place = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # the run that made it has just removed it
            continue
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(place)
            raise UserError(
                f"another run is writing into {folder} now; wait for its end, or choose another --proj_dir"
            ) from None
        except OSError:
            pass
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(place), os.stat(folder)):
                return place
        os.close(place)  # the lock of a folder that is no longer there


def _remove_empty(folder: str, there: str) -> None:
    """Remove the folder and those above it up to `there`, as far as they are empty."""
    folder = os.path.abspath(folder)
    with contextlib.suppress(OSError):
        while folder != there:
            os.rmdir(folder)
            folder = os.path.dirname(folder)
