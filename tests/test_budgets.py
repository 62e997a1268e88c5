"""Budgets of the test files: a file that takes twice its own is named, a slower machine is not. Slices of the
tests marked rare: ten that have each of them once.
"""

import subprocess
import sys
import types

import pytest

import conftest

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


class Item(types.SimpleNamespace):
    """A collected test: marks, and values of parameters."""

    def get_closest_marker(self, name):
        return name if name in self.marks else None

    def add_marker(self, name):
        self.marks.add(name)


def test_ten_slices_have_every_rare_test_once():
    items = [Item(name=n, marks={"rare"} if n % 3 else set()) for n in range(35)]
    left_out = [conftest.outside_of_slice(items, number) for number in range(10)]
    ran = [item.name for others in left_out for item in items if item not in others and item.name % 3]
    assert sorted(ran) == [n for n in range(35) if n % 3]
    assert {len(others) for others in left_out} == {20, 21} and all(one.marks for one in left_out[0])


def test_of_a_product_every_value_stays():
    def case(test, *marks, **params):
        callspec = types.SimpleNamespace(params=params)
        return Item(marks=set(marks), path="file", originalname=test, callspec=callspec)

    items = [case("one", "product", version=v, dtype=d) for v in (6, 7) for d in ("bf16", "fp16", "fp32")]
    items += [case("two", "product", version=6, dtype="bf16"), case("three", version=6, dtype="bf16")]
    items.append(case("three", version=6, dtype="bf16"))
    conftest.mark_repeated_values(items)
    assert ["rare" in item.marks for item in items] == [False] * 4 + [True] * 2 + [False] * 3


def test_every_row_is_a_file():
    assert set(read_table()) <= {path.stem for path in (ROOT / "tests").glob("test_*.py")}


CONFTEST = """
import tests.budgets as budgets

budgets.read_table = lambda: {"test_known": 1.0, "test_long": 0.2}
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
    command += ["test_known.py", "test_long.py"]
    for seconds, words in ((0.1, "the dearest"), (2.0, "OVER ITS BUDGET: test_long took")):
        (tmp_path / "test_long.py").write_text(BUSY.format(seconds))
        environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert words in done.stdout and done.returncode == (seconds > 1), done.stdout + done.stderr
