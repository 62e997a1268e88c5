"""The paths of a GPU on a device that computes nothing (tests/fake_gpu), in a process of their own.

`python -m tests.fake_gpu --write` writes tests/fake_gpu/table.json anew: look at each difference, and commit
it with its cause.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from rwkv_miss import METHODS

from .conftest import ROOT
from .fake_gpu import cases
from .fake_gpu.__main__ import UNAVAILABLE
from .fake_gpu.table import TABLE, differences, read


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Case -> its record."""
    path = tmp_path_factory.mktemp("fake_gpu") / "records.json"
    command = [sys.executable, "-m", "tests.fake_gpu", "--json", str(path)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    if done.returncode == UNAVAILABLE:
        pytest.skip(f"THE GPU'S PATHS ARE NOT TESTED: {done.stdout.strip()}")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(path.read_text())["cases"]


def test_every_method_is_there():
    assert set(cases.METHODS) == {*METHODS, "none"}


@pytest.mark.parametrize("case", cases.ALL)
def test_as_the_table_has_it(case, found):
    record, table = found[case], read(TABLE)
    assert "error" not in record, record["error"]
    if torch.__version__.split("+")[0] != table["torch"]:
        pytest.skip(
            f"COUNTS ARE NOT COMPARED: the table is of torch {table['torch']}, this is {torch.__version__}"
        )
    changes = differences(case, record, table)
    assert not changes, (
        "\n".join(changes)
        + "\nWhere that is on purpose: python -m tests.fake_gpu --write, and commit the table"
    )


@pytest.mark.parametrize("case", [case for case in cases.READING_CASES if case.startswith("decode")])
def test_a_token_can_be_captured(case, found):
    """A CUDA graph records no wait and no copy from the CPU."""
    assert found[case]["launches"] and not found[case]["waits"] and not found[case]["copies"]


@pytest.mark.parametrize("case", cases.WEIGHTED_CASES)
def test_weights_make_nobody_wait(case, found):
    weighted, plain = found[case], found[case.replace(" with weights", "")]
    assert sum(weighted["waits"].values()) == sum(plain["waits"].values()) > 0
    assert not weighted["copies"]


@pytest.mark.parametrize("case", cases.STEP_CASES)
def test_tensor_cores_are_used(case, found):
    kernels = found[case]["native"]
    assert kernels and all(name.endswith("bfloat16, tensor cores") for name in kernels), kernels


@pytest.mark.parametrize("case", cases.MEMORY_CASES)
def test_memory_is_what_the_plan_says(case, found):
    assert found[case]["ratio"] == pytest.approx(1, abs=0.02)
