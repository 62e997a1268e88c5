"""Ctrl-C in the programs of this project: exit code 130 and one line. Standard library only.

Ctrl-C raises KeyboardInterrupt, so that unfinished files can be removed. During an import the process ends at
once: an exception may get lost there, or reach the C++ code of a half-loaded package. No file is being
written then.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

EXIT_CODE = 130  # the shells' code for a program that Ctrl-C ended


def say_interrupted() -> None:
    """Print "interrupted", from the first of a run's processes.

    Uses os.write(), because print() itself may have been interrupted.
    """
    rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0"
    if rank == "0":
        os.write(2, b"\r\x1b[Kinterrupted\n" if os.isatty(2) else b"interrupted\n")


def end_at_once(signum: int = signal.SIGINT, frame: FrameType | None = None) -> None:
    """Handle a signal: print one line and end without exceptions or the interpreter's tidying."""
    say_interrupted()
    os._exit(EXIT_CODE)


def answer(signum: int, frame: FrameType | None) -> None:
    """Handle Ctrl-C: raise KeyboardInterrupt, or end at once in the middle of an import."""
    while frame:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            end_at_once()
        frame = frame.f_back
    raise KeyboardInterrupt


@contextlib.contextmanager
def answered() -> Iterator[None]:
    """Make `answer` the handler of Ctrl-C around a program that catches KeyboardInterrupt.

    Under nohup, where Ctrl-C is ignored, it stays ignored.

    Python only prints an exception in a destructor or in a callback from C. An interrupt there ends the
    process, too.
    """
    handler, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return

    def keep_interrupts(unraisable) -> None:
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            end_at_once()
        hook(unraisable)

    signal.signal(signal.SIGINT, answer)
    sys.unraisablehook = keep_interrupts
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        sys.unraisablehook = hook


def is_program() -> bool:
    """Tell, during the import of this package, whether it is the program that runs."""
    started = os.path.basename(sys.argv[0]) if sys.argv else ""
    # sys.argv[0] is "-m" while runpy looks for the module
    return (started == "-m" and "rwkv_miss" in sys.orig_argv) or started.startswith("rwkv-miss")


def end_program_at_once() -> None:
    """End the process at once on Ctrl-C, where this package is the program: it is still importing itself."""
    if is_program() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)
