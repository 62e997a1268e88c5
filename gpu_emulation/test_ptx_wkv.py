"""The WKV kernels for GPUs, executed as PTX (ptx/), against float64."""

import ctypes

import pytest
import torch

from benchmarks import wkv_budget
from src.ops import kernel_errors, native, self_test
from tests.test_wkv import NAMES, both, documents, golden_cases, make, results

from .ptx.runs import check_run, device_of, runs
from .ptx.traffic import wkv_work


@pytest.mark.parametrize("architecture, group, quick", runs("wkv6", "wkv7", "wkv6_chunked", "wkv7_chunked"))
def test_rows(nvcc, architecture, group, quick, drawn_rows):
    check_run(architecture, group, quick, drawn_rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@both
def test_half_precision_rounds_inputs_and_outputs_only(gpu, version, dtype):
    x, dy, dsT = make(version, 37, N=32)
    half = {name: t if name in ("u", "s0") else t.to(dtype) for name, t in x.items()}
    dy, reset = dy.to(dtype), documents(*dy.shape[:2])
    got = results(version, half, dy, dsT, "cuda-exact", reset)
    same = {name: t.float() for name, t in half.items()}
    for name, t in results(version, same, dy.float(), dsT, "cuda-exact", reset).items():
        assert got[name].dtype == (torch.float32 if name in ("sT", "ds0", "du") else dtype)
        assert torch.equal(got[name], t.to(got[name].dtype)), name


@both
def test_golden(gpu, data_dir, version):
    for title, x, golden in golden_cases(data_dir, version):
        for name, got in results(version, x, golden["dy"], golden.get("dsT"), "cuda-exact").items():
            error = (got - golden[name]).norm() / golden[name].norm()
            allowed = 5e-5 if name == "dw" else {6: 2e-6, 7: 1e-6}[version]
            assert error <= allowed, f"{title}: relative error of {name} {error:.1e}"


@both
def test_where_nothing_is_left_the_decay_has_no_gradient(gpu, version):
    """w = 12, where 1 - sigmoid(w) in fp32 has two digits left, and +-inf."""
    x, dy, dsT = make(version, 20)
    x["w"][:] = 12
    x["w"][:, ::3], x["w"][:, 1::3] = torch.inf, -torch.inf
    got = results(version, x, dy, dsT, "cuda-exact")
    assert all(t.isfinite().all() for t in got.values())
    if version == 6:
        assert not got["dw"][x["w"] >= 5].any()  # delta is an exact 0 in fp32
        return
    doubles = {name: t.double() for name, t in x.items()}
    for name, want in results(version, doubles, dy.double(), dsT.double(), "reference").items():
        assert (got[name] - want).norm() <= 5e-5 * want.norm(), name


@pytest.mark.parametrize("chunked", [False, True])
@both
def test_the_operators_drive_the_kernels(gpu, version, chunked):
    """rwkv::wkv*, gradients and all; and that they give the kernels the memory that they ask for."""
    assert kernel_errors.wkv_error(version, "cpu", chunked) < self_test.LARGEST_ERROR[chunked]
    x, _, _ = make(version, 37, N=64, B=1, H=1)
    inputs = [x[name] if name == "u" or not chunked else x[name].bfloat16() for name in NAMES[version]]
    op = getattr(torch.ops.rwkv, f"wkv{version}")
    shifted = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in inputs]
    assert all(t.data_ptr() % 16 for t in shifted), "views that begin between two vectors of 16 bytes"
    for want, got in zip(op(*inputs, None, None, chunked)[:2], op(*shifted, None, None, chunked)[:2]):
        assert torch.equal(got, want)
    y, state, saved = op(*inputs, None, None, chunked)
    again = op(*inputs, None, None, chunked, save=False)
    assert torch.equal(again[0], y) and torch.equal(again[1], state) and not again[2].numel()
    if version == 7 or chunked:
        with pytest.raises(RuntimeError, match="the forward saved 0 numbers, .* save=True"):
            getattr(torch.ops.rwkv, f"wkv{version}_backward")(*inputs, None, None, again[2], y, None, chunked)
        for sizes in ((1, 1, 1, 64), (2, 17, 3, 64), (1, 5000, 2, 64), (8, 4096, 32, 64)):
            count = getattr(gpu.library, f"wkv{version}{'_chunked' * chunked}_saved")(
                *map(ctypes.c_int64, sizes)
            )
            assert native.saved_floats(version, chunked, *sizes) == count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_recurrence_makes_what_delta_inputs_writes(gpu, dtype):
    """To the last bit: with a state, documents, and tokens that fill no chunk."""
    x, dy, dstate = make(7, 37, N=64, B=2, H=2)
    vectors = [torch.randn(128, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    r, w, k, v, a, b = (x[name].to(dtype) for name in NAMES[7])
    rows, reset = [t.flatten(-2) for t in (k, b, r)], documents(2, 37).byte()
    rwkv, rest, dy = torch.ops.rwkv, (x["s0"], reset), dy.to(dtype)
    *made, bonus = rwkv.mix7_inputs([*rows, *vectors], 2)
    key, alpha, beta = (t.view_as(r) for t in made)
    for mine, other in zip(made, rwkv.delta_inputs([*rows[:2], *vectors[:2]], 2, 0.0), strict=True):
        assert torch.equal(mine, other)
    written = rwkv.wkv7(r, w, key, v, alpha, beta, *rest, True)
    inputs = [r, w, k, v, b], vectors, *rest
    found = rwkv.mix7_chunked(*inputs, True)
    for mine, other in zip(found, (*written, bonus), strict=True):
        assert torch.equal(mine, other)
    saved = written[2]
    written = rwkv.wkv7_backward(r, w, key, v, alpha, beta, *rest, saved, dy, dstate, True)
    for mine, other in zip(rwkv.mix7_chunked_backward(*inputs, saved, dy, dstate), written, strict=True):
        assert torch.equal(mine, other)
    for op, arguments in [
        (rwkv.mix7_inputs, ([*rows, *vectors], 2)),
        (rwkv.mix7_chunked, (*inputs, True)),
        (rwkv.mix7_chunked_backward, (*inputs, saved, dy, dstate)),
        (rwkv.mix7_readout, ([dy.flatten(-2), *rows[:2], *vectors[:2]], bonus, 1e-5, 16)),
    ]:
        torch.library.opcheck(op.default, arguments, test_utils="test_schema")
    none_saved = rwkv.mix7_chunked(*inputs, False)[2]
    with pytest.raises(RuntimeError, match="the forward saved 0 numbers, .* save=True"):
        rwkv.mix7_chunked_backward(*inputs, none_saved, dy, dstate)


@pytest.mark.slow
@pytest.mark.parametrize("chunked", [False, True])
@both
def test_work_that_the_budget_reckons_with(nvcc, version, chunked):
    # a branch of v6 depends on the numbers
    for backward, found in wkv_work(device_of("80"), version, chunked).items():
        assert tuple(found) == pytest.approx(wkv_budget.WORK[version, chunked, backward][:], rel=1e-3)


@both
def test_scratch_that_the_budget_reckons_with(gpu, version):
    for B, T, H in ((8, 1024, 32), (1, 37, 2), (3, 4096, 12)):
        calls = wkv_budget.Calls(version, True, 1, 1, B, T, H)
        parts_of_bonus = B * H * calls.chunks * 64 * 4 if version == 6 else 0
        for name, expected in zip(("forward_scratch", "scratch"), wkv_budget.scratch(calls), strict=True):
            function = getattr(gpu.library, f"wkv{version}_chunked_{name}")
            count = 4 * function(*map(ctypes.c_int64, (B, T, H, 64)), 0, None)
            assert count == expected + (parts_of_bonus if name == "scratch" else 0), (name, B, T, H)
