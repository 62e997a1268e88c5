"""Budgets of the test files: a file that takes twice its own is named, a slower machine is not."""

import subprocess
import sys

from .budgets import cpu_seconds, judged, read_table
from .conftest import ROOT

BUDGETS = {"a": 10.0, "b": 20.0, "c": 4.0, "short": 0.2}


def test_a_file_is_judged_by_the_speed_that_the_others_show():
    slower = {name: 1.7 * seconds for name, seconds in BUDGETS.items()}
    assert judged(slower, BUDGETS) == (1.7, [])
    factor, over = judged(slower | {"a": 40.0}, BUDGETS)
    assert over == ["a"] and factor == 1.7
    assert judged({"b": 20.0, "short": 3.9, "new": 4.1}, BUDGETS) == (1.0, ["new"])


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


def test_a_file_over_its_budget_makes_the_tests_red(tmp_path):
    """In a worker of xdist, whose seconds come to the process that judges."""
    (tmp_path / "conftest.py").write_text(
        "import tests.budgets as budgets\n"
        "budgets.read_table = lambda: {'test_long': [0.1, 0.0]}\n"
        "budgets.LEAST = 0.1\n"
        "def pytest_configure(config):\n    config.option.budgets = 'check'\n"
        "    config.pluginmanager.register(budgets.Budgets(config))\n"
    )
    long = "import time\ndef test_long():\n    end = time.process_time() + {}\n"
    long += "    while time.process_time() < end: pass\n"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n1",
        "-m",
        "not slow",
        "--rootdir",
        ".",
        "test_long.py",
    ]
    for seconds, words in ((0.0, "the dearest"), (0.9, "OVER ITS BUDGET: test_long took")):
        (tmp_path / "test_long.py").write_text(long.format(seconds))
        done = subprocess.run(
            [*command, "-p", "no:cacheprovider"], cwd=tmp_path, capture_output=True, text=True,
            env={"PYTHONPATH": str(ROOT), "PATH": ""},
        )  # fmt: skip
        assert words in done.stdout and done.returncode == (seconds > 0), done.stdout + done.stderr
