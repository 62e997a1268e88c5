"""Gates: a part of the emulated GPU runs whole only where what it depends on has changed.

record.json has for each gate the hash of these files and versions, the commit at which all cases passed,
their number, and the seconds that they took. `python -m gpu_emulation` runs them and writes it. Where the
hash still holds, one of the test files is drawn, and a tenth of its cases run (`Draw`): so a record that is
false is soon noticed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import pathlib
import random
from typing import NamedTuple

from rwkv_miss.errors import UserError
from src.ops.toolchain import BuildError, ask, find_nvcc

ROOT = pathlib.Path(__file__).parent.parent
RECORD = pathlib.Path(__file__).with_name("record.json")
KEYS = ("hash", "commit", "cases", "seconds")  # fields of a gate's record


class Gate(NamedTuple):
    """A part: patterns of its test files, of what they depend on, and packages whose versions count."""

    tests: tuple[str, ...]
    files: tuple[str, ...]
    packages: tuple[str, ...]


KERNELS = ("cuda/*.cu", "cuda/*.cuh", "cuda/*.h", "src/ops/*.py", "gpu_emulation/ptx/*.*")
OWN = ("gpu_emulation/drawn_cases.py", "gpu_emulation/gates.py", "tests/conftest.py")
GATES = {
    "ptx": Gate(
        ("gpu_emulation/test_ptx_*.py",),
        (
            *KERNELS,
            *OWN,
            "benchmarks/gpu_numerics.py",
            "benchmarks/wkv_budget.py",
            "rwkv_miss/functional.py",
            "rwkv_miss/quantised.py",
            "src/common/device.py",
            "src/common/token_loss.py",
            "src/model/layers.py",
            "src/model/loss.py",
            "src/model/rwkv*.py",
            "tests/elementwise_cases.py",
            "tests/loss_cases.py",
            "tests/test_wkv.py",
        ),
        ("torch", "nvcc"),
    ),
    "fake_gpu": Gate(
        ("gpu_emulation/test_fake_gpu.py", "gpu_emulation/test_cuda_runs.py"),
        (
            *KERNELS,
            *OWN,
            "benchmarks/gpu_budget.py",
            "benchmarks/op_counts.py",
            "benchmarks/wkv_budget.py",
            "gpu_emulation/fake_gpu/*.*",
            "rwkv_miss/methods/*.py",
            *(f"rwkv_miss/{name}.py" for name in ("adapter", "functional", "gemm", "inject", "optimizer")),
            *(f"rwkv_miss/{name}.py" for name in ("quantised", "sharding", "wrappers")),
            "src/run.py",
            *(f"src/data/{name}.py" for name in ("answer_batches", "batches", "collate")),
            *(f"src/evaluation/{name}.py" for name in ("answering", "kl_divergence", "likelihood")),
            "src/evaluation/lm_eval_model.py",
            *(f"src/{room}/*.py" for room in ("common", "distributed", "inference", "losses", "model")),
            *(f"src/{room}/*.py" for room in ("sources", "sources/*", "planning", "training")),
            "tests/program.py",
            "tests/recorded_graph.py",
            "tests/test_grpo_run.py",
            "tests/test_live_adapters.py",
        ),
        ("torch", "nvcc", "lightning", "deepspeed"),
    ),
}


def files_of(patterns: tuple[str, ...], root: pathlib.Path = ROOT) -> list[pathlib.Path]:
    """List the files of these patterns, sorted."""
    return sorted({path for pattern in patterns for path in root.glob(pattern) if path.is_file()})


def version_of(package: str) -> str:
    try:
        if package == "nvcc":
            return ask(find_nvcc().path).cuda
        return importlib.metadata.version(package).partition("+")[0]
    except (BuildError, importlib.metadata.PackageNotFoundError):
        return "absent"


def hash_of(gate: Gate, root: pathlib.Path = ROOT) -> str:
    """Hash the gate's tests, what they depend on, and the versions of its packages."""
    hashed = hashlib.sha256()
    for package in gate.packages:
        hashed.update(f"{package} {version_of(package)}\n".encode())
    for path in files_of(gate.tests + gate.files, root):
        content = path.read_bytes()
        hashed.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return hashed.hexdigest()[:32]


def read_record() -> dict[str, dict]:
    """Read record.json, which may be absent. Raises UserError where it is damaged."""
    if not RECORD.exists():
        return {}
    try:
        record = json.loads(RECORD.read_text("utf-8"))
        return {name: {key: gate[key] for key in KEYS} for name, gate in record.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{RECORD} is damaged ({error!r}): expected a JSON object with {', '.join(KEYS)} for each gate;"
            " take it from git again, or delete it and run python -m gpu_emulation"
        ) from None


def write_record(record: dict[str, dict]) -> None:
    lines = [f' "{name}": {json.dumps(record[name])}' for name in sorted(record)]
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


def unchanged() -> dict[str, dict]:
    """Return the records of the gates that hold, by their names."""
    record = read_record()
    return {
        name: record[name]
        for name, gate in GATES.items()
        if name in record and record[name]["hash"] == hash_of(gate)
    }


class Draw:
    """A tenth of some cases. The same seed draws the same ones, in every process."""

    def __init__(self, seed: int):
        self.seed = seed

    def __call__(self, cases: list[str]) -> set[str]:
        """Draw a tenth of these names, rounded up."""
        cases = sorted(set(cases))
        return set(random.Random(f"{self.seed} {cases[:1]}").sample(cases, -(-len(cases) // 10)))
