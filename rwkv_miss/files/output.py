"""Outputs, a file or a folder of a few, that appear under their names only when complete and on the disk."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from ..errors import UserError, listed


def user_cache(name: str) -> Path:
    """Return rwkv-miss/NAME in the user's cache folder. It need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rwkv-miss" / name


def refuse_inputs(out: str | os.PathLike[str], *inputs: str | os.PathLike[str]) -> None:
    """Raise UserError if `out` is the same file as an input, also under another path."""
    for path in inputs:
        if os.path.exists(out) and os.path.exists(path) and os.path.samefile(path, out):
            raise UserError(f"{out} is an input; choose another name")


def require_writable(path: str | os.PathLike[str], size: int = 0) -> None:
    """Raise UserError unless a file of `size` bytes can be made at `path`; for the start of long work."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise UserError(
            f"{path} is {'a folder' if path.is_dir() else 'no regular file'}, expected the name of a file to"
            " write"
        )
    folder = Path(os.path.realpath(path)).parent
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{path} can't be written: {folder}: {error.strerror}") from None
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(f"{path} needs {size:,} bytes, {free:,} are free in {folder}")


@contextlib.contextmanager
def _tidy() -> Iterator[None]:
    """Let a SIGTERM raise SystemExit inside the block, so that unfinished files are removed."""
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:  # another handler is set
        yield
        return

    def end(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str], size: int = 0, temporary: str = "") -> Iterator[BinaryIO]:
    """Open a file under a temporary name; when the block ends and it is on the disk, it is renamed to `path`.

    An older file at `path` stays until then, and after any failure. Raises UserError if `path` can't be
    written, `size` bytes are not free, or the disk runs full.

    The temporary name is random, because other processes may write the same file. A given `temporary` is
    overwritten.
    """
    require_writable(path, size)
    place = os.path.realpath(path)  # the file behind a link is replaced, not the link
    mode = "wb" if temporary else "xb"
    temporary, written = temporary or f"{place}.{secrets.token_hex(4)}.tmp", 0
    try:
        with _tidy():
            try:
                with open(temporary, mode) as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, place)
            finally:
                if os.path.exists(temporary):
                    written = os.path.getsize(temporary)
                    os.remove(temporary)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free = shutil.disk_usage(os.path.dirname(place)).free
        raise UserError(
            f"{path} was not written: {error.strerror}; {written:,} bytes were, {free:,} are free"
        ) from None


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file with this content, whole or not at all."""
    with whole_file(path, len(content)) as file:
        file.write(content)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text in UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike[str], content: dict) -> None:
    """Write a JSON file for people as well as machines."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def check_folder(out: str | os.PathLike[str], names: list[str]) -> None:
    """Raise UserError unless a folder with these files can be made at `out`.

    Either nothing is at `out`, or a folder without other files, which is replaced.
    """
    if os.path.lexists(out) and not os.path.isdir(out):
        raise UserError(f"{out} is a file, expected the name of a folder to write")
    others = sorted(set(os.listdir(out)) - set(names)) if os.path.isdir(out) else []
    if others:
        but = f", and only {', '.join(names)} may be there" if names else ""
        raise UserError(f"{out} holds {listed(others, 1)}{but}; choose another name, or empty the folder")
    require_writable(f"{os.path.realpath(out)}.tmp")


@_tidy()
def write_folder(out: str | os.PathLike[str], writers: dict[str, Callable[[str], None]]) -> None:
    """Write a folder; each file is written by a function of its path. The folder appears when complete.

    An older folder without other files (check_folder) is replaced. After a failure the old one is unchanged.
    """
    check_folder(out, list(writers))
    out = os.path.realpath(out)
    temporary, old = (f"{out}.{secrets.token_hex(4)}.{kind}" for kind in ("tmp", "old"))
    try:
        os.mkdir(temporary)
        for name, write in writers.items():
            write(os.path.join(temporary, name))
        if os.path.isdir(out):
            os.rename(out, old)
        try:
            os.rename(temporary, out)
        except OSError:
            if os.path.isdir(old):
                os.rename(old, out)
            raise
    finally:
        for folder in (temporary, old):
            shutil.rmtree(folder, ignore_errors=True)
