"""Outputs that appear under their names only when they are complete."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from rwkv_miss.checkpoint import require_writable
from rwkv_miss.errors import UserError


@contextlib.contextmanager
def whole_file(path, size: int = 0) -> Iterator[str]:
    """A temporary name to write under, which becomes `path` when the block ends and the file is on the disk. UserError where it can't be written
    or `size` bytes are not free. What was there before stays until then, and after any failure."""
    require_writable(path, size)
    path = os.path.realpath(path)  # the file behind a link is replaced, not the link
    temporary = f"{path}.{secrets.token_hex(4)}.tmp"
    try:
        with refusing_a_full_disk(path):
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


@contextlib.contextmanager
def whole_folder(path) -> Iterator[Path]:
    """The same for a folder, which must be new."""
    require_new(path)
    temporary = Path(f"{os.path.realpath(path)}.{secrets.token_hex(4)}.tmp")
    try:
        with refusing_a_full_disk(path):
            temporary.mkdir()
            yield temporary
            os.replace(temporary, os.path.realpath(path))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_new(path) -> None:
    """UserError unless a folder can be made at `path`; an empty one may be there."""
    if os.path.exists(path) and not (os.path.isdir(path) and not os.listdir(path)):
        raise UserError(f"{path} is there already; --to hf writes a new folder")
    if not os.access(os.path.dirname(os.path.realpath(path)), os.W_OK):
        raise UserError(f"{path} can't be written: {os.path.dirname(os.path.realpath(path))} is no folder that may be written to")


@contextlib.contextmanager
def refusing_a_full_disk(path) -> Iterator[None]:
    """A disk that runs full is a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(f"{path} was not written: {error.strerror}") from None
