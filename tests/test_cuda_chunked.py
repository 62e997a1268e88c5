"""The tensor-core WKV (cuda/wkv6_chunked.cu and wkv7_chunked.cu), run on the CPU through cuda/emulate.h,
against float64.
"""

import ctypes

import pytest
import torch

from .conftest import slow
from .test_cuda_kernels import devices
from .test_wkv import NAMES, REGIMES, both, documents, drop, make, results

CODES = {torch.bfloat16: 1, torch.float16: 2}
# Relative L2 error; operands of products are bf16. The largest seen below is 8.7e-3, in db of two tokens,
# where it is one product that nearly cancels. From 15 tokens on: y, dr, dw, dk, dv 2e-3 to 4e-3, da and db
# 4e-3 to 5.5e-3, states up to 2.5e-3.
TOLERANCE = 1e-2
GUARD = 64  # floats behind a buffer that must stay as they are


def launch(library, version, x, dy, dsT=None, reset=None, device=0):
    """What `test_wkv.results` gives. All memory that the kernels have to write is NaN before."""
    r, s0 = x["r"], x.get("s0")
    B, T, H, N = r.shape
    sizes = [ctypes.c_int64(n) for n in (B, T, H, N)]
    inputs = [x[name] for name in NAMES[version]]
    reset = None if reset is None else reset.to(torch.uint8)

    def function(name):
        return getattr(library, f"wkv{version}_chunked_{name}")

    def call(name, *tensors):
        pointers = [t if t is None else ctypes.c_void_p(t.data_ptr()) for t in tensors]
        return function(name)(*pointers, *sizes, CODES[r.dtype], device, None)

    def empty(*shape, dtype=torch.float32):
        return torch.full(shape, torch.nan, dtype=dtype)

    y, sT, ds0 = empty(*r.shape, dtype=r.dtype), empty(B, H, N, N), empty(B, H, N, N)
    gradients = [empty(B, H, N) if name == "u" else empty(*r.shape, dtype=r.dtype) for name in NAMES[version]]
    saved = empty(function("saved")(*sizes) + GUARD)
    forward_scratch = empty(function("forward_scratch")(*sizes, 0, None) + GUARD)
    scratch = empty(function("scratch")(*sizes, 0, None) + GUARD)
    for memory in (saved, forward_scratch, scratch):
        memory[-GUARD:] = 7
    assert call("forward", *inputs, s0, reset, y, sT, saved, forward_scratch) == 0
    assert call("backward", *inputs, s0, reset, saved, dy, dsT, *gradients, ds0, scratch) == 0
    assert all((memory[-GUARD:] == 7).all() for memory in (saved, forward_scratch, scratch))
    found = {"y": y, "sT": sT} | {f"d{name}": t for name, t in zip(NAMES[version], gradients, strict=True)}
    if version == 6:
        found["du"] = found["du"].sum(0)
    return found if s0 is None else found | {"ds0": ds0}


def check(
    libraries,
    version,
    state=True,
    packed=False,
    dtype=torch.bfloat16,
    oracle="reference",
    both_orders=True,
    **shape,
):
    """Against float64, with an initial state and a gradient of the final one or with neither, one document a
    row or several; and against itself with the threads in the other order.
    """
    library = libraries[version]
    x, dy, dsT = make(version, N=64, **shape)
    x, dy = {name: t if name in ("u", "s0") else t.to(dtype) for name, t in x.items()}, dy.to(dtype)
    if not state:
        x, dsT = drop(x, "s0"), None
    reset = documents(*dy.shape[:2]) if packed else None
    got = launch(library, version, x, dy, dsT, reset)
    double = {name: t.double() for name, t in x.items()}
    want = results(version, double, dy.double(), None if dsT is None else dsT.double(), oracle, reset)
    for name, exact in want.items():
        exact = exact.detach()
        error = (got[name] - exact).norm() / exact.norm().clamp(min=1e-30)
        assert error <= TOLERANCE, (
            f"{name} of {shape}, state {state}, packed {packed}: relative error {error:.1e}, allowed"
            f" {TOLERANCE:.0e}"
        )
    if packed and state:
        assert not got["ds0"][reset[:, 0]].any()
    if not both_orders:
        return
    library.emulate_order(1)
    try:
        again = launch(library, version, x, dy, dsT, reset)
    finally:
        library.emulate_order(0)
    for name, t in got.items():
        assert torch.equal(t, again[name]), f"{name} depends on the order of threads"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("T", [1, slow(2), slow(15), slow(16), 17, 100])
@both
def test_lengths(libraries, version, T, state, packed):
    check(libraries, version, state, packed, T=T, B=2, H=2)


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("version, decay", REGIMES)
def test_extreme_decays(libraries, version, decay, dtype):
    check(libraries, version, decay=decay, dtype=dtype, both_orders=False, T=200, B=1, H=1)


@pytest.mark.parametrize("H", [64, slow(128)])
@both
def test_many_heads(libraries, version, H):
    """From 64 heads on a block of `scan` has two warps, from 128 on four."""
    check(libraries, version, packed=True, oracle="torch", T=20, B=1, H=H)


@pytest.mark.slow
@both
def test_segments_of_time(libraries, version):
    """64 heads go in segments of 16 chunks. The threads' order is tested with fewer of the same chunks."""
    check(libraries, version, packed=True, oracle="torch", both_orders=False, T=260, B=2, H=32)


@both
def test_kernels_run_on_the_device_that_is_asked_for(libraries, version):
    x, dy, dsT = make(version, 20, N=64)
    half = {name: t if name in ("u", "s0") else t.bfloat16() for name, t in x.items()}
    launch(libraries[version], version, half, dy.bfloat16(), dsT, device=1)
    assert devices(libraries[version]) == (0, 1)


@both
def test_what_does_not_fit_is_refused(libraries, version):
    forward = getattr(libraries[version], f"wkv{version}_chunked_forward")
    for T, N, dtype, address in [(1, 32, 1, None), (1, 64, 0, None), (0, 64, 1, None), (1, 64, 1, 8)]:
        pointers = [ctypes.c_void_p(address), *[None] * (11 if version == 7 else 10)]
        assert forward(*pointers, *map(ctypes.c_int64, (1, T, 1, N)), dtype, 0, None) == 1
