"""benchmarks/op_counts.py against counts by hand."""

import json
import pathlib
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import gpu_budget, op_counts, wkv_budget

ROOT = pathlib.Path(__file__).parent.parent
ROW = torch.ones(1, 4)


class Counting(TorchDispatchMode):
    def __init__(self, base=()):
        super().__init__()
        self.tally, self.base = op_counts.Tally(), {x.data_ptr() for x in base}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        self.tally.add(op, args, kwargs or {}, result, of_base=lambda x: x.data_ptr() in self.base)
        return result


def counted(function, base=()):
    with Counting(base) as mode:
        function()
    return mode.tally.as_dict()


def test_products_of_the_base_and_others():
    x, weight, factor = torch.ones(6, 4), torch.ones(4, 8), torch.ones(4, 2)
    found = counted(lambda: (x @ weight, x @ factor), [weight])
    assert found["multiply_adds"] == {"product": 6 * 4 * 8, "adapter product": 6 * 4 * 2}
    assert found["bytes"]["product"] == 4 * (24 + 32 + 48)


@pytest.mark.parametrize(
    ("function", "kind", "numbers"),
    [
        (lambda x: x + 1, "elementwise", 24),
        (lambda x: x.add_(ROW), "elementwise", 28),
        (lambda x: x + x[:1].expand(3, 4), "elementwise", 28),
        (lambda x: x.zero_(), "copy", 12),
        (lambda x: x[1:].clone(), "copy", 16),
        (lambda x: x.sum(0), "reduction", 16),
        (lambda x: x.view(4, 3).t()[1:], None, 0),
    ],
)
def test_bytes(function, kind, numbers):
    x = torch.ones(3, 4)
    found = counted(lambda: function(x))
    assert found["launches"] == ({kind: 1} if kind else {})
    assert found["bytes"] == ({kind: 4 * numbers} if kind else {})


def test_lists_of_tensors():
    """A launch takes 36 tensors, and LIST_BLOCKS blocks of them."""
    small, large = torch.empty(10), torch.empty(op_counts.LIST_CHUNK * op_counts.LIST_BLOCKS, device="meta")
    assert op_counts.list_launches([small], 4) == 1
    assert op_counts.list_launches([small] * 36, 4) == 1
    assert op_counts.list_launches([small] * 37, 4) == 2
    assert op_counts.list_launches([large], 4) == 1
    assert op_counts.list_launches([large, small], 4) == 2


@pytest.mark.parametrize(
    ("shape", "count"), [((1, 37, 2), 1), ((8, 1024, 32), 4), ((4, 600, 32), 3), ((1, 300, 64), 2)]
)
def test_segments_of_the_wkv(shape, count):
    """1024 chunks of all heads together are a segment, and at least 16 of each."""
    assert op_counts.segments(*shape) == count


# 24 layers of 32 heads, 8 x 1024 tokens, with a backward
CALLS = wkv_budget.Calls(7, True, 24, 24, 8, 1024, 32)


def test_scratch_that_l2_does_not_hold_is_traffic():
    """16 chunks of 256 heads: 9,472 bytes of factors each, and 8,192 of a gradient of the state."""
    assert wkv_budget.scratch(CALLS) == (4096 * 9472, 4096 * 17664)
    layer = CALLS._replace(forwards=1, backwards=1)
    moved = 4 * 4096 * (2 * 9472 + 2 * 17664 + 6 * 2048)  # six inputs are read again
    assert wkv_budget.beyond(layer, 0) == moved
    held = [wkv_budget.beyond(layer, 1e6 * size) for size in (3, 6, 40, 50, 72, 96)]
    assert held == sorted(held, reverse=True) and held[0] > 0.9 * moved and held[-1] == 0
    assert wkv_budget.beyond(CALLS._replace(tensor_cores=False), 0) == 0


def test_a_smaller_l2_wants_shorter_segments():
    rates = {"bandwidth": 1e12, "gpu": 0.5, "host": 0.02, "launch": 1e-5}
    best = [wkv_budget.best(CALLS, 1e6 * size, **rates) for size in (6, 40, 50, 72, 96)]
    assert best == sorted(best) and best[0] < 4 and best[-1] >= 16
    assert wkv_budget.best(CALLS, 6e6, 1e12, 0, 1, 1e-5) == CALLS.chunks, "the host waits: fewest launches"


def test_what_the_wkv_of_a_card_is_bound_by():
    """Not one share of the bandwidth for all: that made 59 ms on an RTX 4090."""
    card = gpu_budget.CARDS["4090"]
    busy = wkv_budget.work(CALLS, card)
    assert max(busy, key=busy.get) == "tensor cores" and 0.005 < busy["tensor cores"] < 0.01
    old = wkv_budget.work(CALLS._replace(tensor_cores=False), gpu_budget.CARDS["t4"])
    assert max(old, key=old.get) == "instructions" and old["tensor cores"] == 0
    figures = budget("--n_layer", "3", "--vocab", "512", "--card", "4090")
    assert figures["wkv"]["bound_by"] == "bandwidth"
    assert 8 * figures["parts"]["WKV"]["ms"] < 40
    assert figures["segment_chunks"] == {"3": 2, "6": 2, "40": 8, "50": 11, "72": 16, "96": 16}


def test_the_other_trainer():
    """RWKV-LM's layer: 46 tensors forward, 75 backward."""
    forward, backward = (sum(map(sum, parts)) for parts in zip(*gpu_budget.RWKV_LM.values(), strict=True))
    assert (forward, backward) == (46, 75)


@pytest.mark.parametrize(
    "flag",
    ["--ctx_len 0", "--n_layer -1", "--bandwidth -1", "--flops nan", "--l2 0", "--grad_cp 3", "--quant int4"],
)
def test_a_budget_takes_no_senseless_number(flag, capsys):
    with pytest.raises(SystemExit):
        gpu_budget.parse(flag.split())
    assert flag.split()[0] in capsys.readouterr().err.splitlines()[-1]


def budget(*flags):
    """Run gpu_budget and return its last line."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_budget", *flags], capture_output=True, text=True, cwd=ROOT
    )
    if "it counts with torch's wheel for CPUs" in done.stderr:
        pytest.skip(done.stderr.strip())
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("step", gpu_budget.MEASURED)
def test_the_recorded_prediction_is_today_s_count(step):
    """One card is enough: python -m benchmarks.gpu_budget --predict makes the predictions anew."""
    flags = gpu_budget.MEASURED[step].split()
    counted = budget(*flags, "--card", "5090")
    recorded = json.loads(gpu_budget.PREDICTIONS.read_text())[step]["5090"]
    assert counted["tokens_per_second"] == recorded
