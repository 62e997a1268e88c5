"""A program's imports, the first of which take seconds. This module imports the standard library only."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading

OURS = ("rwkv_miss", "src", "scripts", "demo")
# what oneDNN has prepared for a shape, 0.4 MB, is kept for 1024 shapes, by itself and by torch, unless these variables say otherwise when torch is
# loaded; the number of trained tokens is another one in every step, so that all of them would be filled
PREPARED_SHAPES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "128"}


@contextlib.contextmanager
def importing():
    """Around a program's first imports: Ctrl-C ends it at once and silently, a missing package is named, and torch is told PREPARED_SHAPES.

    An exception from Ctrl-C in the middle of torch's C++ would abort the process, and elsewhere leave a traceback.
    """
    for name, value in PREPARED_SHAPES.items():
        os.environ.setdefault(name, value)
    before = signal.getsignal(signal.SIGINT)
    # whoever ignores Ctrl-C, as nohup does, has reasons
    quick = before is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    if quick:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with naming_missing_packages():
            yield
    finally:
        if quick:
            signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def naming_missing_packages():
    """Around all of a program, as much is imported when it is needed: a package that is not installed is one line, with exit code 2."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in OURS:
            raise
        print(f"error: the package {package} is not installed for {sys.executable}; activate the environment that has it "
              "(source .venv/bin/activate), or: pip install -r requirements.txt", file=sys.stderr)
        sys.exit(2)
