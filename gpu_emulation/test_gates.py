"""A gate opens where what its part depends on has changed, and only there; else a tenth of a file runs."""

import shutil
import subprocess
import sys
import types

import pytest

from benchmarks.import_graph import neighbours

from . import drawn_cases, gates
from .gates import GATES, ROOT, Draw, files_of, hash_of

# imported, but no kernel and no step on a GPU depends on what they do
NOT_GATED = {
    "demo/chat.py",
    "rwkv_miss/__init__.py",
    "rwkv_miss/files/checkpoint.py",
    "rwkv_miss/progress.py",
    "src/config/__init__.py",
    "src/data/tokenizer.py",
    "src/model/__init__.py",
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of all files that a gate names."""
    folder = tmp_path_factory.mktemp("gates")
    for path in {path for gate in GATES.values() for path in files_of(gate.tests + gate.files)}:
        place = folder / path.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
    return folder


@pytest.mark.parametrize(
    "file, opened",
    [
        ("cuda/wkv7_chunked.cu", {"ptx", "fake_gpu"}),
        ("src/ops/elementwise_ops.py", {"ptx", "fake_gpu"}),
        ("gpu_emulation/ptx/parse.cpp", {"ptx", "fake_gpu"}),
        ("tests/test_wkv.py", {"ptx"}),
        ("src/training/trainer.py", {"fake_gpu"}),
        ("rwkv_miss/methods/lora.py", {"fake_gpu"}),
        ("gpu_emulation/fake_gpu/table.json", {"fake_gpu"}),
        ("src/planning/a_new_file.py", {"fake_gpu"}),
        ("cuda/wkv7_cpu.cpp", set()),
        ("src/serving/app.py", set()),
    ],
)
def test_a_change_opens_its_gates(copy, file, opened):
    before = {name: hash_of(gate, copy) for name, gate in GATES.items()}
    path = copy / file
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.read_bytes() if path.exists() else None
    path.write_bytes((old or b"") + b"\n")
    try:
        assert {name for name, gate in GATES.items() if hash_of(gate, copy) != before[name]} == opened
    finally:
        path.unlink() if old is None else path.write_bytes(old)
    assert before == {name: hash_of(gate, copy) for name, gate in GATES.items()}


def test_another_version_of_torch_opens_both(monkeypatch):
    before = {hash_of(gate) for gate in GATES.values()}
    monkeypatch.setattr(gates.importlib.metadata, "version", lambda package: "99.0")
    assert before.isdisjoint(map(hash_of, GATES.values()))


@pytest.mark.parametrize("name", GATES)
def test_a_gate_has_what_its_files_import(name):
    """The part's own files. What these import in turn is the gate's choice (gates.py)."""
    gate = GATES[name]
    of_part, gated = (
        {path.relative_to(ROOT).as_posix() for path in files_of(patterns)}
        for patterns in ((*gate.tests, f"gpu_emulation/{name}/*.py"), gate.tests + gate.files)
    )
    reached = {one: hops for file in of_part for one, hops in neighbours(file).items()}
    imported = {one for one, hops in reached.items() if hops == 1 and one.endswith(".py")}
    assert len(of_part) > 5
    assert imported - gated <= NOT_GATED


def test_a_tenth_is_drawn_rounded_up_and_another_one_each_time():
    cases = [f"case {n}" for n in range(41)]
    drawn = [Draw(seed)(cases) for seed in range(200)]
    assert {len(one) for one in drawn} == {5} and set.union(*drawn) == set(cases)
    assert drawn[7] == Draw(7)(cases[::-1]) and len({frozenset(one) for one in drawn}) > 190
    assert Draw(1)(["only"]) == {"only"}


def test_a_worker_draws_by_the_number_of_the_process_that_starts_it(monkeypatch):
    monkeypatch.setattr(gates, "unchanged", dict)

    def config(**more):
        option = types.SimpleNamespace(draw=None)
        return types.SimpleNamespace(option=option, getoption=lambda name: option.draw, args=[], **more)

    first, node = config(), types.SimpleNamespace(workerinput={})
    drawn_cases.pytest_configure(first)
    node.config = first
    drawn_cases.pytest_configure_node(node)
    worker = config(workerinput=node.workerinput)
    drawn_cases.pytest_configure(worker)
    assert worker.option.draw == first.option.draw and first.option.draw.isdigit()


@pytest.mark.parametrize("text", ['{"ptx": ', "[]", "7", '{"ptx": {"hash": "0"}}', '{"ptx": 7}'])
def test_a_damaged_record_is_one_line(tmp_path, monkeypatch, text):
    monkeypatch.setattr(gates, "RECORD", tmp_path / "record.json")
    assert gates.read_record() == {}
    gates.RECORD.write_text(text)
    option = types.SimpleNamespace(draw="5")
    directory = types.SimpleNamespace(dir=ROOT)
    config = types.SimpleNamespace(
        option=option, getoption=lambda name: "5", args=["gpu_emulation"], invocation_params=directory
    )
    with pytest.raises(pytest.UsageError, match=r"record.json is damaged \(.+ take it from git again"):
        drawn_cases.pytest_configure(config)


PLUGIN = """
import gpu_emulation.gates as gates
kept = {{"commit": "0000000", "cases": 1, "seconds": 1}}
gates.unchanged = lambda: {{name: kept for name in {held!r}}}
"""


@pytest.mark.parametrize(
    "held, draw, files, cases",
    [(["fake_gpu"], 5, 1, range(3, 30)), ([], 5, 2, {184}), (["fake_gpu"], "all", 2, {184})],
)
def test_pytest_runs_a_tenth_of_a_file_where_a_gate_holds(tmp_path, held, draw, files, cases):
    (tmp_path / "held_gates.py").write_text(PLUGIN.format(held=held))
    options = f"-p held_gates --collect-only -q --draw {draw} gpu_emulation/test_fake_gpu.py".split()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "gpu_emulation/test_cuda_runs.py"],
        cwd=ROOT,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    shown = [line for line in done.stdout.splitlines() if "::" in line]
    assert len({line.partition("::")[0] for line in shown}) == files and len(shown) in cases, shown
