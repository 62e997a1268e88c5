"""Mistakes of a programmer, planted one at a time: which test finds each of them?

    python -m benchmarks.planted_faults [--faults NAME ...] [--tests test_data ...] [--jobs 2]
        [--pytest_arguments "-m fast"] [--limit_seconds 3600] [--out out/planted-faults.json]

benchmarks/planted_faults.txt lists the faults. Each is planted in a copy of the working tree. Then the test
files whose imports reach the changed file run one after another, the nearest first, until one fails. The
failure counts if the test passes again without the fault. --tests and --pytest_arguments select a part of the
suite. --limit_seconds is for one fault. CPU seconds include all processes that the tests start.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import json
import multiprocessing
import os
import pathlib
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

from .common import add_integers, argument_parser, report
from .import_graph import ROOT, reaching_tests

FAULTS = pathlib.Path(__file__).with_suffix(".txt")
ADOPT_ORPHANS = 36  # prctl's PR_SET_CHILD_SUBREAPER
RED = re.compile(r"^(?:FAILED|ERROR) ((?:tests|gpu_emulation)/.*?)(?: - .*)?$", re.MULTILINE)
WRONG_USE, NO_TESTS = 4, 5  # pytest's exit codes


class Fault(NamedTuple):
    """One mistake: `new` replaces `old`, which the file has exactly once."""

    name: str
    kind: str
    file: str
    old: str
    new: str


def read_faults(path: pathlib.Path = FAULTS) -> list[Fault]:
    """Read the faults of a list: each has a line of name, kind and file, then `-old` and `+new` lines."""
    faults = []
    for part in path.read_text("utf-8").strip().split("\n\n"):
        head, *lines = part.split("\n")
        old, new = ("\n".join(line[1:] for line in lines if line[0] == sign) for sign in "-+")
        faults.append(Fault(*head.split(), old, new))
    return faults


def planted(fault: Fault, root: pathlib.Path = ROOT) -> str:
    """Return the file's text with the fault. Raises ValueError unless the file has `old` exactly once."""
    text = (root / fault.file).read_text("utf-8")
    if (times := text.count(fault.old)) != 1:
        raise ValueError(
            f"{fault.name}: {fault.file} has its text {times} times, expected once; change the row in"
            f" {FAULTS.name}"
        )
    return text.replace(fault.old, fault.new)


class Copy:
    """Copy of the working tree, in which faults are planted."""

    def __init__(self, folder: pathlib.Path, arguments: list[str], root: pathlib.Path):
        self.folder, self.tree, self.arguments = folder, folder / "tree", arguments
        self.fault: Fault | None = None
        listed = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        for name in filter(None, subprocess.check_output(listed, text=True).split("\0")):
            if os.path.lexists(root / name):
                (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, self.tree / name, follow_symlinks=False)
        if (root.parent / "shared").is_dir():
            (folder / "shared").symlink_to(root.parent / "shared")  # where tests look for golden files

    @contextlib.contextmanager
    def with_fault(self, fault: Fault):
        """Plant the fault in the tree inside the block."""
        file, sound = self.tree / fault.file, (self.tree / fault.file).read_bytes()
        self.write(file, planted(fault, self.tree).encode())
        self.fault = fault
        try:
            yield
        finally:
            self.fault = None
            self.write(file, sound)

    def write(self, file: pathlib.Path, content: bytes) -> None:
        """Write a file, and drop its folder's bytecode: Python matches that by size and whole second."""
        file.write_bytes(content)
        shutil.rmtree(file.parent / "__pycache__", ignore_errors=True)

    def red_test(self, tests: list[str], deadline: float) -> str:
        """Return the first failing test of these files or ids, or "". Raises TimeoutError at the deadline."""
        environment = dict(os.environ)
        if self.fault and self.fault.file.startswith("cuda/"):
            environment["RWKV_KERNEL_CACHE"] = str(self.folder / "kernels")  # apart from the user's
        options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", f"--basetemp={self.folder / 'tmp'}"]
        command = [sys.executable, "-m", "pytest", *options, *self.arguments, *tests]
        with open(self.folder / "log", "w+b") as log:
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(
                command, cwd=self.tree, env=environment, start_new_session=True, **streams
            )
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise TimeoutError from None
            finally:
                end_group(process)
            log.seek(0)
            said = log.read().decode("utf-8", "replace")
        if process.returncode in (0, NO_TESTS):
            return ""
        if process.returncode == WRONG_USE and not self.fault:
            file, is_one, _ = tests[0].partition("::")
            if is_one:  # pytest's line may cut the id short
                return self.red_test([file], deadline)
            raise RuntimeError(f"{shlex.join(command)}:\n{said[-2000:]}")
        found = RED.search(said)
        return found[1] if found else tests[0]  # a crash names no test


def end_group(process: subprocess.Popen) -> None:
    """End the processes that a test run has left running, so that their CPU seconds are counted."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 5
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < deadline:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.05)


def prepare(folder: pathlib.Path, arguments: list[str], root: pathlib.Path = ROOT) -> None:
    """Make the copy of the working tree for a process that tries faults."""
    global copy
    ctypes.CDLL(None).prctl(ADOPT_ORPHANS, 1)  # so that CPU seconds of processes left running count, too
    copy = Copy(pathlib.Path(tempfile.mkdtemp(dir=folder)), arguments, root)


def try_fault(fault: Fault, tests: list[str], limit: float) -> dict[str, object]:
    """Plant a fault and run these tests until one finds it; return a record of the result."""
    deadline, before = time.monotonic() + limit, resource.getrusage(resource.RUSAGE_CHILDREN)
    tried, red_anyway, found, outcome = [], [], None, "not found"
    try:
        while not found and len(tried) < len(tests):
            tried.append(tests[len(tried)])
            while True:
                left_out = [f"--deselect={name}" for name in red_anyway]
                with copy.with_fault(fault):
                    red = copy.red_test([tried[-1], *left_out], deadline)
                if not red:
                    break
                if not copy.red_test([red], deadline):
                    found, outcome = red, "found"
                    break
                is_file = red in (tried[-1], *red_anyway)  # then no single test of the file can be left out
                red_anyway.append(red)
                if is_file:
                    break
    except TimeoutError:
        outcome = "out of time"
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "name": fault.name,
        "kind": fault.kind,
        "file": fault.file,
        "outcome": outcome,
        "found_by": found,
        "tried": tried,
        "reached": len(tests),
        "red_anyway": red_anyway,
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
    }


def run(faults: list[Fault], chosen: list[str], args) -> list[dict[str, object]]:
    """Try all faults, and write the results to --out after each of them."""
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        given = pathlib.Path(folder), shlex.split(args.pytest_arguments)
        context = multiprocessing.get_context("fork")
        with concurrent.futures.ProcessPoolExecutor(args.jobs, context, prepare, given) as pool:
            waiting = []
            for fault in faults:
                near = reaching_tests(fault.file)
                tests = [test for test in near if not chosen or pathlib.Path(test).stem in chosen]
                waiting.append(pool.submit(try_fault, fault, tests, args.limit_seconds))
            for done in concurrent.futures.as_completed(waiting):
                one = done.result()
                results.append(one)
                args.out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
                files = f"{len(one['tried'])} of {one['reached']} files"
                told = f"{one['outcome']:11} {files:16} {one['cpu_seconds']:8.1f} CPU s"
                print(f"{one['name']:26} {one['kind']:10} {told}  {one['found_by'] or ''}", flush=True)
    return results


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--faults", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--tests", nargs="+", default=[], metavar="FILE", help="only these files")
    parser.add_argument("--pytest_arguments", default="", metavar="TEXT", help='such as "-m fast"')
    add_integers(parser, limit_seconds=3600, jobs=1)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/planted-faults.json"))
    args = parser.parse_args()
    faults = read_faults()
    if unknown := set(args.faults) - {fault.name for fault in faults}:
        parser.error(f"--faults {' '.join(sorted(unknown))}: not in {FAULTS.name}")
    faults = [fault for fault in faults if not args.faults or fault.name in args.faults]
    results = run(faults, [pathlib.Path(name).stem for name in args.tests], args)
    outcomes = [one["outcome"] for one in results]
    counts = {name.replace(" ", "_"): outcomes.count(name) for name in ("found", "not found", "out of time")}
    seconds = round(sum(one["cpu_seconds"] for one in results), 1)
    report("planted_faults", faults=len(faults), **counts, cpu_seconds=seconds, out=str(args.out))


if __name__ == "__main__":
    main()
