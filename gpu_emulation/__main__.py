"""python -m gpu_emulation: run every case of a part, and record in record.json that they passed.

Where a gate's record holds, CI runs a tenth of one of its files (gates.py).
"""

import argparse
import subprocess
import sys
import time

import pytest

from rwkv_miss.errors import one_line_errors

from .gates import GATES, ROOT, files_of, hash_of, read_record, unchanged, write_record


def git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


class Passed:
    """Plugin of pytest that counts the cases that passed, each row of a test of rows, and those skipped."""

    def __init__(self):
        self.cases, self.skipped = 0, []

    def pytest_runtest_logreport(self, report):
        if report.skipped and not hasattr(report, "wasxfail"):
            self.skipped.append(f"{report.nodeid}: {report.longrepr[-1]}")
        elif report.when == "call" and report.passed:
            self.cases += dict(report.user_properties).get("rows", 1)


def run(name: str) -> dict:
    """Run all cases of a part; returns its record. SystemExit where one failed or was skipped."""
    gate, passed, started = GATES[name], Passed(), time.monotonic()
    files = [str(path.relative_to(ROOT)) for path in files_of(gate.tests)]
    options = ["--draw", "all", "--numprocesses", "auto", "--dist", "loadfile", "--no-loadscope-reorder"]
    before = hash_of(gate)
    if code := pytest.main([*options, *files], plugins=[passed]):
        sys.exit(int(code))
    if passed.skipped:
        sys.exit("\n".join(["error: not recorded, because these were skipped:", *passed.skipped]))
    if hash_of(gate) != before:
        sys.exit(f"error: not recorded, because files of {name} changed while its cases ran; run it again")
    return {
        "hash": before,
        "commit": git("rev-parse", "--short=12", "HEAD"),
        "cases": passed.cases,
        "seconds": round(time.monotonic() - started),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m gpu_emulation", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(GATES)}; without one: all")
    parser.add_argument("--gates", action="store_true", help="say which gates hold, and run nothing")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(GATES):
        parser.error(f"{' '.join(sorted(unknown))}: expected {' or '.join(GATES)}")
    if arguments.gates:
        holding = unchanged()
        for name in GATES:
            print(f"{name}: {'unchanged since ' + holding[name]['commit'] if name in holding else 'changed'}")
        return
    parts = arguments.parts or list(GATES)
    patterns = [pattern for name in parts for pattern in GATES[name].tests + GATES[name].files]
    if changed := git("status", "--porcelain", "--", *patterns):
        parser.error(f"a record names a commit; commit these first:\n{changed}")
    read_record()  # a damaged one is an error now, not after minutes
    for name in parts:
        write_record(read_record() | {name: run(name)})


if __name__ == "__main__":
    with one_line_errors():
        main()
