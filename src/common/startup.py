"""First imports of a program, which take seconds. This module imports the standard library only."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import signal
import sys
import threading
import time
from typing import NamedTuple

# as in pyproject.toml; an older Python must be able to read this file and the first lines of a program
OLDEST = (3, 10)
TRAINER_IMPORTS = 2.0  # seconds of a run's later imports, for each CPU second of the first ones
ERASED = b"\r\x1b[K"  # to the beginning of the terminal's line, which is then empty
OURS = ("rwkv_miss", "src", "scripts", "demo")
# Torch's libraries read these when torch is loaded. What the user has set stays. OpenMP's waiting threads
# spin unless told not to. Then small models are up to thirty times slower as soon as anything else runs.
# oneDNN and torch each keep what was prepared for the last 1024 shapes, 0.4 MB a shape. Nearly every step has
# a new shape, because the number of trained tokens differs.
LIBRARY_SETTINGS = {
    "OMP_WAIT_POLICY": "passive",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    "LRU_CACHE_CAPACITY": "128",
}


class Start(NamedTuple):
    """Start of a command, in seconds since the epoch, and the CPU seconds of its first imports; 0: not known.

    By the clock they may take several times as long, because the files are not in memory yet. That tells
    nothing of the later imports, which have other files.
    """

    at: float
    imports: float = 0.0

    @classmethod
    def of_process(cls) -> Start:
        """Return this process's start. It is called when the first imports are done."""
        now, imports = time.time(), time.process_time()
        try:
            with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
                ticks = float(stat.read().rpartition(")")[2].split()[19])
                age = float(uptime.read().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
        except OSError:
            return cls(now - imports, imports)
        return cls(now - age, imports)

    def loading(self, starts_others: bool) -> float:
        """Estimate the seconds of a run without its work on tokens: until now, and for the imports of the
        trainer and of the package that draws the pictures.

        Other processes that this one starts load the same when it is done.
        """
        seconds = time.time() - self.at + TRAINER_IMPORTS * self.imports
        return 2 * seconds if starts_others else seconds


@contextlib.contextmanager
def importing():
    """Guard a program's first imports.

    A terminal is told what is loaded. An old Python and a missing package are named. Torch's libraries get
    LIBRARY_SETTINGS. Ctrl-C ends the program at once, because an exception in the middle of an import may
    meet C++ that is half loaded, leave a traceback or be lost. From one_line_errors() on,
    rwkv_miss.interrupts handles Ctrl-C.
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
    # else the interpreter looks for garbage among all modules at the end, for a second after a training
    atexit.register(gc.freeze)
    gc.disable()  # modules are no garbage
    before = signal.getsignal(signal.SIGINT)
    # if Ctrl-C is ignored, as under nohup, it stays ignored
    is_ours = before is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    if is_ours:
        signal.signal(signal.SIGINT, _end_at_once)
    try:
        with naming_missing_packages(), telling_a_terminal():
            yield
    finally:
        gc.enable()
        if is_ours:
            signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def telling_a_terminal():
    """Show on a terminal that torch is loaded, with a dot each second.

    rwkv_miss.progress, which shows all other work, comes with torch.
    """
    if not os.isatty(2) or not _is_first_process():
        yield
        return
    loaded = threading.Event()

    def add_dots() -> None:
        while not loaded.wait(1.0):
            os.write(2, b".")

    os.write(2, b"loading torch")
    thread = threading.Thread(target=add_dots, daemon=True)
    thread.start()
    try:
        yield
    finally:
        loaded.set()
        thread.join()
        os.write(2, ERASED)


def _is_first_process() -> bool:
    return (os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0") == "0"


def _end_at_once(signum, frame) -> None:
    """End as rwkv_miss.interrupts does, which can't be imported before torch."""
    if _is_first_process():
        os.write(2, ERASED + b"interrupted\n" if os.isatty(2) else b"interrupted\n")
    os._exit(130)


@contextlib.contextmanager
def naming_missing_packages():
    """Turn a missing package into one line of error, with exit code 2.

    It is around a whole program, because much is imported only when it is needed.
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
