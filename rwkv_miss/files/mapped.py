"""Files with mapped tensors: small ones are copied, large ones are watched while they are in use.

If a file is replaced by a rename, as this package writes, programs that have mapped it keep the old content.
If a file is overwritten in place, as by cp, the tensors change. If it gets shorter, a read behind its end
raises the signal SIGBUS, which ends the process.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import os
import signal
import weakref
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, UntypedStorage

from ..errors import UserError, printable

SMALL = 1 << 26  # bytes up to which a file is copied


class ChangedFile(UserError):
    """A file was overwritten while its tensors are in use: the program must end."""


class _Mapped(NamedTuple):
    """A mapped file. The descriptor keeps the content when another file gets the name."""

    path: str
    descriptor: int
    size: int
    time: int  # when the content last changed, in ns
    storages: list[weakref.ref[UntypedStorage]]

    @property
    def is_used(self) -> bool:
        return any(storage() is not None for storage in self.storages)

    def change(self) -> str:
        """Describe a change of the content since the mapping; "" if there is none."""
        try:
            now = os.fstat(self.descriptor)
        except OSError as error:  # such as a file on a network drive that is gone
            return f"can't be read any more ({error.strerror})"
        if now.st_size != self.size:
            return f"was overwritten while it is in use ({self.size:,} bytes, now {now.st_size:,})"
        return "was overwritten while it is in use" if now.st_mtime_ns != self.time else ""


_mapped: list[_Mapped] = []


def keep(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that were just mapped from a file, as copies if the file is small.

    check_mapped() watches a larger file as long as one of its tensors is in use. Tensors that share memory
    also share it as copies.
    """
    _forget_unused()
    storages = [tensor.untyped_storage() for tensor in tensors.values()]
    # storages whose memory torch did not allocate cannot be resized
    storages = [storage for storage in storages if storage.nbytes() > 0 and not storage.resizable()]
    if not storages:
        return dict(tensors)
    descriptor = os.open(path, os.O_RDONLY)
    status = os.fstat(descriptor)
    if status.st_size <= SMALL:
        os.close(descriptor)
        return copy.deepcopy(dict(tensors))
    users = [weakref.ref(storage) for storage in storages]
    _mapped.append(_Mapped(os.fspath(path), descriptor, status.st_size, status.st_mtime_ns, users))
    return dict(tensors)


def change_of_mapped() -> str:
    """Name a file that was overwritten while its tensors are in use, and the change; "" if there is none.

    The check costs one system call for each file.
    """
    for file in tuple(_mapped):
        if change := file.change():
            gc.collect()  # frees unused models with circular references, which keep tensors alive
            if file.is_used:
                return _sentence(file, change)
            _forget_unused()
    return ""


def check_mapped() -> None:
    """Raise ChangedFile for a file that was overwritten while its tensors are in use."""
    if change := change_of_mapped():
        raise ChangedFile(change)


def _sentence(file: _Mapped, change: str) -> str:
    return (
        f"{file.path} {change}, so what follows would be of neither model. What was saved before is"
        " unchanged: put the old file back and go on (a training with --resume auto), or start again with the"
        " new one. A file in use is replaced with mv, not with cp"
    )


def _forget_unused() -> None:
    for file in [file for file in _mapped if not file.is_used]:
        _mapped.remove(file)
        os.close(file.descriptor)


@contextlib.contextmanager
def naming_changed_files() -> Iterator[None]:
    """Print which file changed if SIGBUS, the signal for a shortened mapped file, comes in the block."""
    number = getattr(signal, "SIGBUS", None)  # Windows has none: it refuses to shorten a mapped file
    if number is None:
        yield
        return
    set_handler = ctypes.CDLL(None).signal
    set_handler.argtypes, set_handler.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    told = False

    # called from C: Python runs its own handlers after the instruction, but that one never ends
    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def answer(_) -> None:
        nonlocal told
        if told:  # another thread reports the error; this one retries until the process ends
            return
        told = True
        for file in _mapped:
            if change := file.change():
                os.write(2, f"\nerror: {printable(_sentence(file, change))}\n".encode(errors="replace"))
                os._exit(2)
        set_handler(number, None)  # no mapped file changed, so let the signal end the process
        signal.raise_signal(number)

    before = set_handler(number, ctypes.cast(answer, ctypes.c_void_p))
    try:
        yield
    finally:
        set_handler(number, before)
