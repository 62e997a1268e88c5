"""Memory that a process has freed: glibc keeps it for the next step, or returns it to the system."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

# glibc's largest mmap threshold on 64 bits, see mallopt(3). A larger block is mapped by itself, and is
# returned when it is freed.
HEAP_LIMIT = 1 << 25
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
TRIMMED_FROM = 1 << 17  # glibc's own


def _call(function: str, *arguments: int) -> bool:
    """Call a function of glibc; False where it fails, or this is another C library."""
    library = ctypes.CDLL(None) if os.name == "posix" else None
    return bool(getattr(library, function, lambda *_: 0)(*arguments))


def keep_freed() -> bool:
    """Have glibc keep what is freed, but for blocks above HEAP_LIMIT; False where it is another C library.

    Left alone it returns the end of the heap after a step, and the next one takes a page fault for every 4 KB
    of it again.
    """
    return _call("mallopt", MMAP_THRESHOLD, HEAP_LIMIT) and _call("mallopt", TRIM_THRESHOLD, 2**31 - 1)


def release_freed() -> None:
    """Have glibc return what is freed: what comes next would use it, and seem to need less."""
    _call("malloc_trim", 0)


def return_large_blocks() -> None:
    """Have glibc return blocks of 1 MiB and more when they are freed.

    Its own limit grows to HEAP_LIMIT with use. It then keeps freed parameters worth a tenth of the base.
    """
    _call("mallopt", MMAP_THRESHOLD, 1 << 20)


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keep what is freed inside the block, as keep_freed(), and return it at the end."""
    keep_freed()
    try:
        yield
    finally:
        _call("mallopt", TRIM_THRESHOLD, TRIMMED_FROM)
        release_freed()
