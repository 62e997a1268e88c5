"""A program's imports, the first of which take seconds. This module imports the standard library only."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading

# as in pyproject.toml; an older one must be able to read this file and the first lines of a program
OLDEST = (3, 10)
OURS = ("rwkv_miss", "src", "scripts", "demo")
# read by torch's libraries when it is loaded, and left alone where the user has set them. OpenMP's waiting
# threads spin unless told not to: small models are then up to thirty times slower as soon as anything else
# runs. What oneDNN has prepared for a shape, 0.4 MB, is kept for 1024 shapes, by itself and by torch, and the
# number of trained tokens is another one in every step
LIBRARY_SETTINGS = {
    "OMP_WAIT_POLICY": "passive",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    "LRU_CACHE_CAPACITY": "128",
}


@contextlib.contextmanager
def importing():
    """Around a program's first imports: an old Python and a missing package are named, Ctrl-C ends it at
    once, and torch's libraries get LIBRARY_SETTINGS.

    An exception from Ctrl-C in the middle of an import may meet C++ that is half loaded, leave a traceback or
    be lost. From one_line_errors() on, rwkv_miss.interrupts answers.
    """
    if sys.version_info < OLDEST:
        major, minor = sys.version_info[:2]
        print(
            f"error: Python {major}.{minor} is too old, 3.10 or newer is needed; here it is {sys.executable}",
            file=sys.stderr,
        )
        sys.exit(2)
    for name, value in LIBRARY_SETTINGS.items():
        os.environ.setdefault(name, value)
    before = signal.getsignal(signal.SIGINT)
    # whoever ignores Ctrl-C, as nohup does, has reasons
    ours = before is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGINT, _end_at_once)
    try:
        with naming_missing_packages():
            yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)


def _end_at_once(signum, frame) -> None:
    """That of rwkv_miss.interrupts, which can't be imported before torch is."""
    if (os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0") == "0":
        os.write(2, b"\r\x1b[Kinterrupted\n" if os.isatty(2) else b"interrupted\n")
    os._exit(130)


@contextlib.contextmanager
def naming_missing_packages():
    """Around all of a program, as much is imported when it is needed: a package that is not installed is one
    line, with exit code 2.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in OURS:
            raise
        print(
            f"error: the package {package} is not installed for {sys.executable}; activate the environment"
            " that has it (source .venv/bin/activate), or: pip install -r requirements.txt",
            file=sys.stderr,
        )
        sys.exit(2)
