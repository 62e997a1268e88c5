"""The planted faults are where their list says, tests reach them, and the runner tells who finds one."""

import ast
import concurrent.futures
import multiprocessing
import pathlib
import subprocess

import pytest

from benchmarks.import_graph import neighbours, reaching_tests
from benchmarks.planted_faults import Fault, planted, prepare, read_faults, try_fault

FAULTS = read_faults()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_has_its_place_and_tests_that_reach_it(fault):
    changed = planted(fault)
    if fault.file.endswith(".py"):
        ast.parse(changed)
    assert reaching_tests(fault.file)


def test_the_list_has_eighty_faults_of_all_kinds():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) == 80
    assert len({fault.kind for fault in FAULTS}) == 19


@pytest.mark.parametrize(
    ("file", "nearest", "others"),
    [
        ("src/serving/fields.py", "test_serving", {"test_refusals", "test_serve_program"}),  # -m demo.serve
        ("cuda/wkv6.cu", "test_launches", {"test_ptx_wkv", "test_ptx_elementwise"}),  # by *.cu
        ("src/evaluation/reward_worker.py", "test_reward_functions", {"test_grpo_run"}),  # a worker's file
        ("src/sources/drawn/taught.py", "test_distillation", {"test_on_policy"}),  # named by a loss
        ("src/studio/page/run.js", "test_studio_page", {"test_studio"}),  # a program's page
    ],
)
def test_the_nearest_tests_come_first(file, nearest, others):
    found = [pathlib.Path(test).stem for test in reaching_tests(file)]
    assert found[0] == nearest and others <= set(found) and "test_formatting" not in found
    assert neighbours("tests/test_end_to_end.py")["rwkv_miss/__main__.py"] == 1  # python -m rwkv_miss


def test_a_fault_that_is_not_in_its_place_is_named():
    with pytest.raises(ValueError, match="gone: train.py has its text 0 times"):
        planted(Fault("gone", "data", "train.py", "no such text", ""))


def test_the_runner_tells_who_finds_a_fault(tmp_path, monkeypatch):
    """All texts of half.py have one time and one size, by which Python would take bytecode of another."""
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    tree = tmp_path / "project"
    for name, text in {
        "half.py": "def half(n):\n    return n // 2\n",
        "pyproject.toml": '[tool.pytest.ini_options]\npythonpath = ["."]\n',
        "tests/test_far.py": "def test_red_anyway():\n    assert False\ndef test_green():\n    pass\n",
        "tests/test_near.py": "import os\nos.utime('half.py', (0, 0))\nimport half\n"
        "def test_half():\n    assert half.half(4) == 2\n",
    }.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    subprocess.run(["git", "init", "--quiet", str(tree)], check=True)
    tests = ["tests/test_far.py", "tests/test_near.py"]
    faults = [
        Fault("third", "formula", "half.py", "// 2", "// 3"),
        Fault("same", "", "half.py", "// 2", ">> 1"),
    ]
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(1, context, prepare, (tmp_path, [], tree)) as pool:
        third, same = pool.map(try_fault, faults, [tests] * 2, [60.0] * 2)
    assert third["outcome"] == "found" and third["found_by"] == "tests/test_near.py::test_half"
    assert third["tried"] == tests and third["red_anyway"] == ["tests/test_far.py::test_red_anyway"]
    assert (same["outcome"], same["found_by"], same["tried"]) == ("not found", None, tests)
    assert min(third["cpu_seconds"], same["cpu_seconds"]) > 0
