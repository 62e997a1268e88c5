"""Budgets of CPU seconds for each test file: `--budgets check` prints them and is red where a file takes
twice its own; `--budgets write` writes tests/budgets.txt anew.

Seconds of CPU, because wall time depends on what else runs. A machine may be slower than the one that the
table is of: its factor is the median, over the files that take longest, of what they took here against the
table. So one file that got slower moves nothing but itself, and neither do files that are skipped here.

Tests marked rare and those of the emulated GPU are not counted: which of them run depends on the commit.
"""

import os
import pathlib
import statistics

import pytest

TABLE = pathlib.Path(__file__).with_suffix(".txt")
LEAST = 5.0  # seconds: a smaller budget is noise, or a file whose tests were skipped
LONG = 3.0  # seconds of files that tell how fast the machine is


def cpu_seconds():
    """Return those of this process and of all that it has started. Parents count children that ended."""
    used, parents = {}, {}
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # the process has just ended
            continue
        parents[int(path.parent.name)] = int(fields[1])
        used[int(path.parent.name)] = sum(map(int, fields[11:15]))

    def of(pid):
        return used.get(pid, 0) + sum(of(child) for child, parent in parents.items() if parent == pid)

    return of(os.getpid()) / os.sysconf("SC_CLK_TCK")


def read_table():
    """File -> its seconds."""
    rows = [line.split() for line in TABLE.read_text().splitlines() if not line.startswith("#")]
    return {name: float(seconds) for name, seconds in rows}


def write_table(taken):
    """Put the seconds that files took into the table."""
    table = read_table() | {name: round(seconds, 1) for name, seconds in taken.items()}
    head = [line for line in TABLE.read_text().splitlines() if line.startswith("#")]
    rows = [f"{name:34} {seconds:6.1f}" for name, seconds in sorted(table.items()) if seconds]
    TABLE.write_text("\n".join([*head, *rows]) + "\n")


def counted_file(item):
    """The file of a test whose seconds count, else ""."""
    left_out = item.path.parent.name == "gpu_emulation" or item.get_closest_marker("rare")
    return "" if left_out else item.path.stem


def judged(taken, budgets):
    """(factor of this machine, the files that took more than twice their budgets)"""
    long = [taken[name] / budget for name, budget in budgets.items() if budget >= LONG and name in taken]
    if not long:  # the table is empty, or these are not the tests of a tier
        return 1.0, []
    factor = statistics.median(long)
    allowed = {name: 2 * factor * max(LEAST, budgets.get(name, 0.0)) for name in taken}
    return factor, [name for name, seconds in taken.items() if seconds > allowed[name]]


class Budgets:
    """Plugin of pytest that counts the CPU seconds of each file, in the workers of xdist as well."""

    def __init__(self, config):
        self.config, self.taken, self.before = config, {}, None
        self.what, self.over = config.getoption("budgets"), []
        if self.what == "write" and (config.option.markexpr or config.option.keyword):
            raise pytest.UsageError("--budgets write takes all tests: leave out -m and -k")

    def note(self, name):
        now = cpu_seconds()
        if name:
            self.taken[name] = self.taken.get(name, 0.0) + now - self.before
        self.before = now

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item, nextitem):
        if self.before is None:
            self.before = cpu_seconds()
        result = yield
        if nextitem is None or counted_file(nextitem) != counted_file(item):
            self.note(counted_file(item))
        return result

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        for name, seconds in getattr(node, "workeroutput", {}).get("cpu_seconds", {}).items():
            self.taken[name] = self.taken.get(name, 0.0) + seconds

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session):
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput["cpu_seconds"] = self.taken
        elif self.what == "write":
            write_table(self.taken)
        elif self.what == "check" and not self.config.option.collectonly:
            self.budgets = read_table()
            self.factor, self.over = judged(self.taken, self.budgets)
            if self.over and session.exitstatus == pytest.ExitCode.OK:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        if self.what != "check" or self.config.option.collectonly:
            return
        total = sum(self.taken.values())
        say = terminalreporter.write_line
        speed = f"{self.factor:.2f} times those of tests/{TABLE.name}"
        say(f"\nCPU seconds by file: {total:.0f} in all, {speed}; the dearest:")
        for name in sorted(self.taken, key=self.taken.get, reverse=True)[:15]:
            say(f"{self.taken[name]:7.1f}  budget {self.factor * self.budgets.get(name, 0):7.1f}  {name}")
        for name in self.over:
            say(
                f"OVER ITS BUDGET: {name} took {self.taken[name]:.1f} CPU seconds, expected at most twice"
                f" {self.factor * max(LEAST, self.budgets.get(name, 0)):.1f}; make its runs fewer, mark some"
                " as slow, or raise its row in tests/budgets.txt and say why"
            )
