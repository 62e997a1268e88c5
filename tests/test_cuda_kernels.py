"""The CUDA recurrences, run on the CPU through cuda/emulate.h, against float64."""

import ctypes
import functools
import re

import pytest
import torch

from src.ops import kernel_errors, native, self_test
from src.ops.build import CUDA

from .conftest import slow
from .test_wkv import NAMES, REGIMES, both, documents, drop, make, results

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Relative L2 error allowed in fp32. The largest seen below: 2.4e-7 for v6; 8.3e-7 for v7, in dk of single
# tokens, where v . dy cancels; 1.0e-5 in dw, which is a difference of sums over all later tokens.
TOLERANCE = {6: 2e-6, 7: 1e-6}
TOLERANCE_DW = 5e-5
GUARD = 64  # floats behind the scratch that must stay as they are


def launch(library, version, x, dy, dsT=None, reset=None, device=0):
    """What `test_wkv.results` gives, from a library. All that it has to write is NaN before, and it may not
    use more scratch than it asks for.
    """
    r, s0 = x["r"], x.get("s0")
    B, T, H, N = r.shape
    sizes = [ctypes.c_int64(n) for n in (B, T, H, N)]
    inputs = [x[name].float() if name == "u" else x[name] for name in NAMES[version]]
    reset = None if reset is None else reset.to(torch.uint8)

    def call(function, *arguments):
        pointers = [t if t is None else ctypes.c_void_p(t.data_ptr()) for t in arguments]
        code = DTYPES.index(r.dtype)
        return getattr(library, f"wkv{version}_{function}")(*pointers, *sizes, code, device, None)

    def empty(*shape, dtype=torch.float32):
        return torch.full(shape, torch.nan, dtype=dtype)

    y, sT, ds0 = torch.full_like(r, torch.nan), empty(B, H, N, N), empty(B, H, N, N)
    gradients = [empty(B, H, N) if name == "u" else torch.full_like(r, torch.nan) for name in NAMES[version]]
    saved = [empty(library.wkv7_saved(*sizes))] if version == 7 else []
    scratch = empty(getattr(library, f"wkv{version}_scratch")(*sizes, 0, None) + GUARD)
    scratch[-GUARD:] = 7
    assert call("forward", *inputs, s0, reset, y, sT, *saved) == 0
    assert call("backward", *inputs, s0, reset, *saved, dy, dsT, *gradients, ds0, scratch) == 0
    assert (scratch[-GUARD:] == 7).all()
    found = {"y": y, "sT": sT} | {f"d{name}": t for name, t in zip(NAMES[version], gradients, strict=True)}
    if version == 6:
        found["du"] = found["du"].sum(0)
    return found if s0 is None else found | {"ds0": ds0}


def check(libraries, version, state=True, packed=False, **shape):
    """Against float64, with an initial state and a gradient of the final one or with neither, one document a
    row or several.
    """
    x, dy, dsT = make(version, **shape)
    if not state:
        x, dsT = drop(x, "s0"), None
    reset = documents(*dy.shape[:2]) if packed else None
    got = launch(libraries[version], version, x, dy, dsT, reset)
    double = {name: t.double() for name, t in x.items()}
    want = results(version, double, dy.double(), None if dsT is None else dsT.double(), "reference", reset)
    for name, exact in want.items():
        exact = exact.detach()
        error = (got[name] - exact).norm() / exact.norm().clamp(min=1e-30)
        allowed = TOLERANCE_DW if name == "dw" else TOLERANCE[version]
        assert error <= allowed, (
            f"{name} of {shape}, state {state}, packed {packed}: relative error {error:.1e}, allowed"
            f" {allowed:.0e}"
        )
    if packed and state:
        assert not got["ds0"][reset[:, 0]].any()
    return x, got


# every length with the smallest heads, every size of heads with a length of two blocks and a token
LENGTHS = [(T, 8, 2, 3) for T in (1, 2, 15, 16, 17, 37, 129)]
LENGTHS += [(17, 16, 1, 3), (17, 64, 1, 3), slow(17, 32, 3, 1), slow(17, 128, 1, 2), slow(129, 64, 1, 3)]


@pytest.mark.parametrize("T, N, B, H", LENGTHS)
@both
def test_lengths_and_head_sizes(libraries, version, T, N, B, H):
    for state in (True, False):
        check(libraries, version, state, packed=state and T % 2 == 1, T=T, N=N, B=B, H=H)


@pytest.mark.parametrize("N", [24, 96, 200, 256])
@both
def test_head_sizes_between(libraries, version, N):
    check(libraries, version, packed=True, T=9, N=N, B=1, H=1)


@pytest.mark.parametrize("N, B, H", [slow(64, 1, 97), (40, 3, 43)])
@both
def test_many_heads(libraries, version, N, B, H):
    """From some number of blocks on a lane holds four rows instead of one."""
    check(libraries, version, packed=True, T=9, N=N, B=B, H=H)


@pytest.mark.parametrize("packed", [True, False])
@both
def test_slices_of_time(libraries, version, packed):
    check(libraries, version, packed=packed, T=1030, N=8, B=1, H=1)


@pytest.mark.parametrize("version, decay", REGIMES)
def test_extreme_decays(libraries, version, decay):
    for state in (True, False):
        x, got = check(libraries, version, state, T=129, N=16, B=1, H=1, decay=decay)
        assert all(t.isfinite().all() for t in got.values())
        if version == 6:
            assert not got["dw"][x["w"] >= 5].any()  # delta is an exact 0 in fp32


def devices(library):
    """(the current device of the emulation, the one on which the last kernel ran)"""
    current, last = ctypes.c_int(), ctypes.c_int()
    library.emulate_devices(ctypes.byref(current), ctypes.byref(last))
    return current.value, last.value


@both
def test_kernels_run_on_the_device_that_is_asked_for(libraries, version):
    x, dy, dsT = make(version, 3)
    for device in (1, 0):
        launch(libraries[version], version, x, dy, dsT, device=device)
        assert devices(libraries[version]) == (0, device), "the caller's device is the current one again"


def test_every_function_that_launches_sets_its_device():
    """A process may hold several GPUs, and an autograd thread has a current device of its own."""
    functions = [
        found.groups()
        for path in sorted(CUDA.glob("*.cu"))
        for found in re.finditer(r'extern "C" int (\w+)\(([^)]*)\) \{\n((?:.*\n){2})', path.read_text())
    ]
    assert {"wkv6_forward", "wkv7_chunked_backward", "dequantise_nf4"} <= {name for name, _, _ in functions}
    for name, arguments, start in functions:
        assert " ".join(arguments.split()).endswith("int dtype, int device, void* stream"), name
        assert start == "    OnDevice on(device);\n    if (on.error) return on.error;\n", name


@both
def test_saturated_decay(libraries, version):
    """w = 12, where 1 - sigmoid(w) in fp32 has two digits left, and +-inf."""
    x, dy, dsT = make(version, 20)
    x["w"][:] = 12
    x["w"][:, ::3], x["w"][:, 1::3] = torch.inf, -torch.inf
    got = launch(libraries[version], version, x, dy, dsT)
    if version == 7:
        x = {name: t.double() for name, t in x.items()}
        want = results(version, x, dy.double(), dsT.double(), "reference")
        for name in want:
            want[name] = want[name].detach()
            assert (got[name] - want[name]).norm() <= TOLERANCE_DW * want[name].norm(), name
    assert all(t.isfinite().all() for t in got.values())


@pytest.mark.parametrize("dtype", DTYPES[1:])
@both
def test_half_precision_rounds_inputs_and_outputs_only(libraries, version, dtype):
    x, dy, dsT = make(version, 37, N=32)
    half = {name: t if name in ("u", "s0") else t.to(dtype) for name, t in x.items()}
    dy, reset = dy.to(dtype), documents(*dy.shape[:2])
    got = launch(libraries[version], version, half, dy, dsT, reset)
    want = launch(
        libraries[version], version, {name: t.float() for name, t in half.items()}, dy.float(), dsT, reset
    )
    for name, t in want.items():
        assert got[name].dtype == (torch.float32 if name in ("sT", "ds0", "du") else dtype)
        assert torch.equal(got[name], t.to(got[name].dtype)), name


@pytest.mark.parametrize(
    "N, B, H", [(8, 1, 1), (32, 1, 1), (64, 1, 1), (128, 1, 1), (256, 1, 1), slow(64, 1, 97)]
)
@both
def test_the_order_of_threads_does_not_matter(libraries, version, N, B, H):
    x, dy, dsT = make(version, 512 // max(N, 32) + 1, N=N, B=B, H=H)
    run = functools.partial(launch, libraries[version], version, x, dy, dsT, documents(*dy.shape[:2]))
    first = run()
    libraries[version].emulate_order(1)
    try:
        second = run()
    finally:
        libraries[version].emulate_order(0)
    for name, t in first.items():
        assert torch.equal(t, second[name]), name


@both
def test_golden(libraries, data_dir, version):
    cases = torch.load(data_dir / "golden/wkv.golden.pt", weights_only=True)
    cases = {name: case for name, case in cases.items() if name.startswith(f"v{version}")}
    assert len(cases) == 3
    for title, golden in cases.items():
        golden = {
            {"x": "w", "dx": "dw"}.get(name, name) if version == 7 else name: t.contiguous()
            for name, t in golden.items()
        }
        x = {name: golden[name] for name in [*NAMES[version], "s0"] if name in golden}
        for name, got in launch(libraries[version], version, x, golden["dy"], golden.get("dsT")).items():
            error = (got - golden[name]).norm() / golden[name].norm()
            assert error <= (TOLERANCE_DW if name == "dw" else TOLERANCE[version]), (
                f"{title}: relative error of {name} {error:.1e}"
            )


@both
def test_what_does_not_fit_is_refused(libraries, version):
    forward = getattr(libraries[version], f"wkv{version}_forward")
    pointers = [None] * (11 if version == 7 else 9)
    for B, T, H, N, dtype in [(1, 1, 1, 12, 0), (1, 1, 1, 264, 0), (1, 0, 1, 64, 0), (1, 1, 1, 64, 3)]:
        assert forward(*pointers, *map(ctypes.c_int64, (B, T, H, N)), dtype, None) == 1


@pytest.mark.parametrize("chunked", [False, True])
@both
def test_the_operators_drive_the_kernels(libraries, monkeypatch, version, chunked):
    """rwkv::wkv*, gradients and all, over the emulated library in the place of the GPU's; and that they give
    it the memory it asks for.
    """
    monkeypatch.setattr(native, "library", lambda device: libraries[version])
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
            count = getattr(libraries[version], f"wkv{version}{'_chunked' * chunked}_saved")(
                *map(ctypes.c_int64, sizes)
            )
            assert native.saved_floats(version, chunked, *sizes) == count
