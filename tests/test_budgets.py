"""Budgets of the test files: a file that takes twice its own is named, a slower machine is not."""

import subprocess
import sys

import pytest

from .budgets import cpu_seconds, judged, read_table
from .conftest import ROOT

BUDGETS = {"a": 10.0, "b": 20.0, "c": 4.0, "short": 0.2}


def test_a_file_is_judged_by_the_speed_that_the_others_show():
    slower = {name: 1.7 * seconds for name, seconds in BUDGETS.items()}
    assert judged(slower, BUDGETS) == (1.7, [])
    factor, over = judged(slower | {"a": 40.0}, BUDGETS)
    assert over == ["a"] and factor == 1.7
    assert judged({"b": 20.0, "short": 9.9, "new": 10.1}, BUDGETS) == (1.0, ["new"])


def test_seconds_of_processes_count_while_they_run_and_when_they_are_over():
    busy = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ninput()"
    before = cpu_seconds()
    with subprocess.Popen(
        [sys.executable, "-c", busy], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        child.stdout.readline()
        running = cpu_seconds()
        child.communicate(b"\n")
    assert before + 0.4 < running <= cpu_seconds() + 0.05


def test_every_row_is_a_file():
    assert set(read_table()) <= {path.stem for path in (ROOT / "tests").glob("test_*.py")}


CONFTEST = """
import tests.budgets as budgets

budgets.read_table = lambda: {"test_known": [1.0, 0.0], "test_long": [0.2, 0.0]}
budgets.LEAST, budgets.LONG = 0.2, 1.0

def pytest_configure(config):
    config.option.budgets = "check"
    config.pluginmanager.register(budgets.Budgets(config))
"""
BUSY = """
import time

def test_busy():
    end = time.process_time() + {}
    while time.process_time() < end:
        pass
"""


@pytest.mark.slow
def test_a_file_over_its_budget_makes_the_tests_red(tmp_path):
    """In a worker of xdist, whose seconds come to the process that judges."""
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_known.py").write_text(BUSY.format(1.0))
    command = [sys.executable, "-m", "pytest", *"-q -n1 -p no:cacheprovider --rootdir .".split()]
    command += ["-m", "not slow", "test_known.py", "test_long.py"]
    for seconds, words in ((0.1, "the dearest"), (2.0, "OVER ITS BUDGET: test_long took")):
        (tmp_path / "test_long.py").write_text(BUSY.format(seconds))
        environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert words in done.stdout and done.returncode == (seconds > 1), done.stdout + done.stderr
