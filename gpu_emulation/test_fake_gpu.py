"""The paths of a GPU on a device that computes nothing (fake_gpu/), in a process of their own.

`python -m gpu_emulation.fake_gpu --write` writes fake_gpu/table.json anew: look at each difference, and
commit it with its cause.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from rwkv_miss import METHODS
from tests.conftest import ROOT, slow

from .fake_gpu import cases
from .fake_gpu.__main__ import UNAVAILABLE
from .fake_gpu.table import TABLE, differences, read

# launches of a layer of a model with adapters, forward and backward
LAUNCHES = {"layer miss v6": 110, "layer miss v7": 100}
TENSORS = {"layer miss v6": 140, "layer miss v7": 140}  # (B, T, C), read or written by elementwise launches


# one of each kind; the others are slow
FAST = """
    step adalora v7, step bat v6, step dora v7, step miss v6, step miss v7, step none v7, step state v7,
    step with weights miss v7, layer miss v6, layer miss v7, memory miss none grad_cp 0 chunk_ctx 0 v7,
    memory miss nf4 grad_cp 1 chunk_ctx 0 v6, memory miss none grad_cp 0 chunk_ctx 128 v7, decode v7,
    decode 8 rows with adapters v7, chat v7, chat on int8, train.py bf16, train.py grpo, two GPUs: ZeRO 2
""".replace("\n", " ").split(",")
FAST = [case.strip() for case in FAST]


def each(names):
    """One test a case."""
    return pytest.mark.parametrize("case", [case if case in FAST else slow(case) for case in names])


@pytest.fixture(scope="module")
def found(request, tmp_path_factory):
    """Case -> its record, of the cases that are asked for.

    One process runs them all: its imports take as long as ten cases.
    """
    path = tmp_path_factory.mktemp("fake_gpu") / "records.json"
    items = [item for item in request.session.items if item.path == request.path]
    asked = {item.callspec.params["case"] for item in items if hasattr(item, "callspec")}
    cases_asked = [f"--cases={case}" for case in asked]
    done = subprocess.run(
        [sys.executable, "-m", "gpu_emulation.fake_gpu", "--json", str(path), *cases_asked],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode == UNAVAILABLE:
        pytest.skip(f"THE GPU'S PATHS ARE NOT TESTED: {done.stdout.strip()}")
    assert done.returncode == 0, done.stdout[-2000:]
    return json.loads(path.read_text())["cases"]


def test_every_method_is_there():
    assert set(cases.METHODS) == {*METHODS, "none"}


@each(cases.ALL)
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
        + "\nWhere that is on purpose: python -m gpu_emulation.fake_gpu --write, and commit the table"
    )


@each([case for case in cases.READING_CASES if case.startswith("decode")])
def test_a_token_can_be_captured(case, found):
    """A CUDA graph records no wait and no copy from the CPU."""
    assert found[case]["launches"] and not found[case]["waits"] and not found[case]["copies"]


@each([case for case in cases.READING_CASES if "8 rows" in case])
def test_beside_a_graph_a_token_sends_its_tokens_and_the_shares_of_another_mix(case, found):
    for what, sent in {"step": 1, "step of another mix": 2, "step of another adapter": 2}.items():
        assert sum(found[case][what]["waits"].values()) == sent
    assert found[case]["step"]["launches"]["total"] == 1, "the logits are copied"


@each(LAUNCHES)
def test_launches_of_a_layer(case, found):
    """The WKV counts as its two calls: how often each launches depends on rows, tokens and heads."""
    launches = found[case]["launches"]
    assert launches["total"] - launches["wkv"] + 2 <= LAUNCHES[case]


@each(TENSORS)
def test_elementwise_traffic_of_a_layer(case, found):
    assert found[case]["tensors"] <= TENSORS[case]


@each(cases.STEP_CASES + cases.WEIGHTED_CASES)
def test_no_micro_batch_waits(case, found):
    """A tuned state has the places of the documents sent, from pinned memory."""
    assert not found[case]["waits"]
    assert all("per_document.py" in copy and "state" in case for copy in found[case]["copies"])


@each(["train.py bf16", "train.py grpo"])
def test_a_step_waits_once(case, found):
    assert sum(found[case]["waits"].values()) <= 1


@each(cases.STEP_CASES)
def test_tensor_cores_are_used(case, found):
    """The WKV uses them; everything else is in bf16, but the loss."""
    kernels = found[case]["native"]
    wkv = [name for name in kernels if name.startswith(("wkv", "mix7_chunked"))]
    assert len(wkv) == 2 and all(name.endswith("bfloat16, tensor cores") for name in wkv), kernels
    others = {name for name in kernels if name not in wkv and not name.endswith("bfloat16")}
    assert others == {"softmax_loss_ float32"}, kernels


@each(cases.MEMORY_CASES + cases.ZERO_MEMORY_CASES)
def test_memory_is_what_the_plan_says(case, found, request):
    if case == "memory state none grad_cp 1 chunk_ctx 0 v7":
        reason = "the plan leaves out the copies of documents on packed rows"
        request.applymarker(pytest.mark.xfail(strict=True, raises=AssertionError, reason=reason))
    assert found[case]["ratio"] == pytest.approx(1, abs=0.02)
