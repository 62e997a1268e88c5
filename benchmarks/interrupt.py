"""Ctrl-C at random moments of a program's start: exit code 130 and one line, and no process is left.

    python -m benchmarks.interrupt [--tries 200] [--program train] [--strategy auto] [--devices 1]

The moments lie between Python's own start, the standard library's modules that src/common/startup.py begins
with included, which no program can answer for, and the first step. Both are measured first: the step comes
after 4 to 6 s on two cores, later beside other work. Ctrl-C goes to all processes of the program, as a
terminal sends it.
"""

from __future__ import annotations

import collections
import os
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable

from demo import task

from .common import add_integers, argument_parser, report

BASE = "demo/rwkv7-reverse.pth"
PROGRAMS = {
    "chat": (["-m", "demo.chat", "--model", BASE, "--prompt", "sort cab"], "Assistant:"),
    "inspect": (["-m", "rwkv_miss", "inspect", BASE], BASE),
    "plan": (["-m", "scripts.plan", "--load_model", BASE, "--n_layer", "3"], "tokens"),
}
GIVEN_UP = 60  # seconds after which a process that goes on has not heard Ctrl-C


def training(folder: pathlib.Path, *flags: str) -> list[str]:
    """Arguments of a run that does not end by itself; its data are written to the folder."""
    task.write(str(folder / "data.jsonl"), task.rows("sort", 500, seed=1))
    return [
        "train.py",
        "--load_model",
        BASE,
        "--data_file",
        str(folder / "data.jsonl"),
        "--micro_bsz",
        "2",
        "--ctx_len",
        "64",
        "--epoch_steps",
        "1000000",
        "--resume",
        "auto",
        "--proj_dir",
        str(folder / "run"),
        *flags,
    ]


def start(arguments: list[str]) -> subprocess.Popen:
    """A program in a process group of its own, as a shell starts it."""
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, *arguments], stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def seconds_until(arguments: list[str], begins: str) -> float:
    """Time from a program's start to the first line of its output that begins so; it is killed then."""
    begun = time.perf_counter()
    process = start(arguments)
    try:
        for line in process.stdout:
            if line.startswith(begins):
                return time.perf_counter() - begun
        sys.exit(f"no line began with {begins!r}:\n{process.communicate()[1]}")
    finally:
        kill_group(process)


def python_seconds() -> float:
    """The time of Python's own start and end with the first modules, the longest of five."""
    longest = 0.0
    for _ in range(5):
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import contextlib, os, signal, threading"], check=True)
        longest = max(longest, time.perf_counter() - begun)
    return longest


def kill_group(process: subprocess.Popen) -> bool:
    """Kill all processes of a program; False where none was left."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
        return True
    except ProcessLookupError:
        return False
    finally:
        process.communicate()


def interrupted(arguments: list[str], moment: float) -> str:
    """What is wrong with a program's end after Ctrl-C, so many seconds after its start; "" if nothing is."""
    process = start(arguments)
    time.sleep(moment)
    os.killpg(process.pid, signal.SIGINT)
    return end_of(process)


def end_of(process: subprocess.Popen) -> str:
    """What is wrong with the end of a program that Ctrl-C has reached or is about to; "" if nothing is."""
    try:
        output, error = process.communicate(timeout=GIVEN_UP)
    except subprocess.TimeoutExpired:
        kill_group(process)
        return f"Ctrl-C was not heard in {GIVEN_UP} s"
    if kill_group(process):
        return "processes were left"
    if process.returncode == 130 and len(error.split("\n")) == 2 + error.startswith("\n"):
        return ""
    return f"exit code {process.returncode}, stderr:\n{error}"


def interrupt_all(arguments: list[str], moments: Iterable[float]) -> list[str]:
    """What went wrong at each moment."""
    wrong = []
    for number, moment in enumerate(moments, 1):
        if problem := interrupted(arguments, moment):
            wrong.append(f"Ctrl-C {number}, after {moment:.2f} s: {problem}")
            print(wrong[-1], flush=True)
    return wrong


def main() -> None:
    parser = argument_parser(__doc__)
    add_integers(parser, tries=200)
    parser.add_argument("--program", default="train", choices=["train", *PROGRAMS])
    parser.add_argument("--strategy", default="auto")
    add_integers(parser, devices=1, seed=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        if args.program == "train":
            flags = ["--strategy", args.strategy, "--devices", str(args.devices)]
            arguments, ready = training(pathlib.Path(folder), *flags), "step 1/"
        else:
            arguments, ready = PROGRAMS[args.program]
        earliest, latest = python_seconds(), seconds_until(arguments, ready)
        print(f"Python starts in {earliest:.2f} s, {args.program} is ready after {latest:.2f} s", flush=True)
        moments = [rng.uniform(earliest, latest) for _ in range(args.tries)]
        wrong = interrupt_all(arguments, moments)
    kinds = collections.Counter(problem.partition(": ")[2].partition("\n")[0] for problem in wrong)
    print(f"{args.tries - len(wrong)} of {args.tries} ended with exit code 130 and one line")
    report(
        "interrupt",
        program=args.program,
        tries=args.tries,
        right=args.tries - len(wrong),
        wrong=kinds,
        strategy=args.strategy,
        devices=args.devices,
        seconds_to_python_and_ready=[round(earliest, 2), round(latest, 2)],
        mean_moment=round(statistics.fmean(moments), 2),
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
