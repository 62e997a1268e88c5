"""The WKV kernels against float64: independent goldens, then the token-by-token reference at odd sizes and
extreme decays.
"""

import ctypes
import functools
import platform
import shutil
import types
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rwkv_miss.errors import UserError
from src import ops
from src.model.rwkv import RWKV
from src.ops import build, native, self_test, toolchain
from src.ops.reference import decay6, log_decay7

from .conftest import close, make_arch, slow

NAMES = {6: ["r", "k", "v", "w", "u"], 7: ["r", "w", "k", "v", "a", "b"]}
OPS = {6: ops.wkv6, 7: ops.wkv7}
KERNELS = ["cpu", "torch", "reference"]  # kernels for GPUs: test_ptx_wkv.py
# Largest fp32 error seen below, against the largest value (torch 2.13 CPU, AVX-512): y and states 9.8e-7;
# gradients 1.7e-6, in dw of v7 near its smallest decay, where 1 - sigmoid(w) cancels. One case has 4.0e-6: dk
# of a single token, v . dy times r, and v . dy cancels.
TOLERANCE = 1e-5
# dw of the native kernels is a difference of sums over all later tokens (see cuda/wkv7_cpu.cpp)
DW_TOLERANCE = 5e-5
DECAYS = {
    6: {
        "real": lambda z: 1.5 * z - 2,
        "to zero": lambda z: 1.5 * z + 1.5,
        # delta is an exact 0 in a quarter of the places, exp(w) or w itself is inf in some of them
        "underflow": lambda z: torch.where(
            z > 0.7, torch.where(z > 1.5, torch.where(z > 2, torch.inf, 100.0), 10.0), z
        ),
        "all underflow": lambda z: torch.full_like(z, 89.0),
        "to one": lambda z: z - 14,
        "exactly one": lambda z: torch.full_like(z, -torch.inf),
    },
    7: {
        "real": lambda z: 2 * z - 2,
        "minimum": lambda z: torch.full_like(
            z, 4.0
        ),  # delta = 0.551; from 17 on, fp32 gives 0 for dw where float64 gives 1e-8
        "to one": lambda z: z - 14,
        "exactly one": lambda z: torch.full_like(z, -torch.inf),
    },
}
REGIMES = [(version, decay) for version in DECAYS for decay in DECAYS[version]]
both = pytest.mark.parametrize("version", OPS)
every_kernel = pytest.mark.parametrize("kernel", KERNELS)
plain_kernel = pytest.mark.parametrize("kernel", ops.PLAIN)


def make(version, T, N=8, B=2, H=3, decay="real", dtype=torch.float32):
    """({name: input}, dy, dsT), random, exact in fp32; for v7 a = -kappa and b = kappa * learning rate, as
    the model makes them.
    """
    randn = functools.partial(torch.randn, generator=torch.Generator().manual_seed(100 * T + N))
    x = {name: randn(H, N) if name == "u" else randn(B, T, H, N) for name in NAMES[version]}
    x["w"] = DECAYS[version][decay](x["w"])
    if version == 7:
        kappa = torch.nn.functional.normalize(x["a"], dim=-1)
        x |= {"a": -kappa, "b": kappa * torch.sigmoid(x["b"])}
    x["s0"], dsT, dy = randn(B, H, N, N), randn(B, H, N, N), randn(B, T, H, N)
    return {name: t.to(dtype) for name, t in x.items()}, dy.to(dtype), dsT.to(dtype)


def results(version, x, dy, dsT=None, kernel="torch", reset=None):
    """Forward and backward: {y, sT, d<name> of every input}; without dsT the final state has no gradient."""
    x = {name: t.detach().requires_grad_() for name, t in x.items()}
    y, sT = OPS[version](**x, reset=reset, kernel=kernel)
    outputs = [(y, dy)] if dsT is None else [(y, dy), (sT, dsT)]
    gradients = torch.autograd.grad(
        [out for out, _ in outputs], list(x.values()), [grad for _, grad in outputs], materialize_grads=True
    )
    return {"y": y, "sT": sT} | {f"d{name}": gradient for name, gradient in zip(x, gradients, strict=True)}


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread: a second one makes these small tensors much slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def documents(B, T):
    """Mark where documents start, (B, T): elsewhere in every row, two in a row, the last token, and none."""
    reset = torch.rand(B, T, generator=torch.Generator().manual_seed(T)) < 0.15
    reset[0, T // 2 :][:2] = reset[0, -1] = True
    if B > 1:
        reset[-1] = False
    return reset


@functools.cache
def exact(version, state, **shape):
    """`results` of the reference in float64, with initial state and final gradient, or with neither."""
    x, dy, dsT = make(version, dtype=torch.float64, **shape)
    return (
        results(version, x, dy, dsT, "reference")
        if state
        else results(version, drop(x, "s0"), dy, None, "reference")
    )


def test_documents_do_not_meet():
    """The specification of `reset`: the reference on a row of documents is the reference on each of them."""
    for version in OPS:
        x, dy, dsT = make(version, 41, B=1, dtype=torch.float64)
        reset = torch.zeros(1, 41, dtype=torch.bool)
        cuts = [0, 1, 17, 18, 40, 41]
        reset[0, cuts[1:-1]] = True
        got = results(version, x, dy, dsT, "reference", reset)
        parts = []
        for start, end in zip(cuts, cuts[1:]):
            piece = {name: t if name in ("u", "s0") else t[:, start:end] for name, t in x.items()}
            piece["s0"] = x["s0"] if start == 0 else torch.zeros_like(x["s0"])
            parts.append(
                results(
                    version, piece, dy[:, start:end], dsT if end == 41 else torch.zeros_like(dsT), "reference"
                )
            )
        want = {
            name: torch.cat([part[name] for part in parts], 1)
            for name in got
            if name not in ("sT", "ds0", "du")
        }
        want |= {"sT": parts[-1]["sT"], "ds0": parts[0]["ds0"]}
        if version == 6:
            want["du"] = sum(part["du"] for part in parts)
        for name, t in want.items():
            close(f"v{version} {name}", got[name], t, 1e-13)


@pytest.mark.parametrize("T", [1, 2, 16, 37, 100])
@pytest.mark.parametrize("kernel", ["cpu", "torch"])
@both
def test_resets(version, kernel, T):
    for B, N in ((3, 8), (1, 64)):
        x, dy, dsT = make(version, T, N=N, B=B, dtype=torch.float64)
        reset = documents(B, T)
        want = results(version, x, dy, dsT, "reference", reset)
        got = results(
            version, {name: t.float() for name, t in x.items()}, dy.float(), dsT.float(), kernel, reset
        )
        for name, t in want.items():
            close(name, got[name], t, DW_TOLERANCE if (name, kernel) == ("dw", "cpu") else TOLERANCE)
        assert not got["ds0"][reset[:, 0]].any()


def drop(x, name):
    return {key: t for key, t in x.items() if key != name}


def check(version, kernel, **shape):
    x, dy, dsT = make(version, **shape)
    for state in (True, False):
        got = (
            results(version, x, dy, dsT, kernel)
            if state
            else results(version, drop(x, "s0"), dy, None, kernel)
        )
        for name, want in exact(version, state, **shape).items():
            tolerance = DW_TOLERANCE if (name, kernel) == ("dw", "cpu") else TOLERANCE
            close(f"{name} ({'with' if state else 'without'} state)", got[name], want, tolerance)


def golden_cases(data_dir, version):
    """Yield (title, inputs, all golden tensors) of the three cases of a version."""
    cases = torch.load(data_dir / "golden/wkv.golden.pt", weights_only=True)
    cases = {name: case for name, case in cases.items() if name.startswith(f"v{version}")}
    assert len(cases) == 3
    for title, golden in cases.items():
        if version == 7:
            golden = {{"x": "w", "dx": "dw"}.get(name, name): t for name, t in golden.items()}
        yield title, {name: golden[name] for name in [*NAMES[version], "s0"] if name in golden}, golden


@every_kernel
@both
def test_golden(data_dir, version, kernel):
    for title, x, golden in golden_cases(data_dir, version):
        for name, got in results(version, x, golden["dy"], golden.get("dsT"), kernel).items():
            # the goldens' README
            close(f"{title}: {name}", got, golden[name], 2e-5 if name in ("y", "sT") else 4e-4)


@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 33, 129])
@pytest.mark.parametrize(
    "sizes", [dict(B=2, H=3, N=5), dict(B=3, H=2, N=8), dict(B=2, H=3, N=16), dict(B=1, H=2, N=64)], ids=str
)
@every_kernel
@both
def test_odd_sizes(version, kernel, T, sizes):
    if kernel == "cpu" and sizes["N"] % 8:
        pytest.skip("native kernels take multiples of 8; see test_head_sizes_of_the_native_kernels")
    check(version, kernel, T=T, **sizes)


@pytest.mark.parametrize("version, decay", REGIMES)
@every_kernel
def test_extreme_decays(version, kernel, decay):
    check(version, kernel, T=300, N=16, B=1, decay=decay)


def test_decay_is_the_formula():
    w = torch.tensor([-torch.inf, -20, -3, 0, 1, 4, 6, 6.6, 6.7, 100, torch.inf], dtype=torch.float64)
    assert torch.equal(decay6(w), torch.exp(-torch.exp(w)))
    close("log_decay7", log_decay7(w), -torch.exp(-torch.nn.functional.softplus(-w) - 0.5), 1e-15)


@plain_kernel
@both
def test_parts_equal_the_whole(version, kernel):
    """Handing the state over, at any cut, is the same function and has the same gradients."""
    x, dy, dsT = make(version, 75, dtype=torch.float64)
    whole = results(version, x, dy, dsT, kernel)
    x = {name: t.requires_grad_() for name, t in x.items()}
    s, parts, start = x["s0"], [], 0
    for T in (1, 16, 5, 2, 33, 17, 1):
        piece = {name: t if name == "u" else t[:, start : start + T] for name, t in drop(x, "s0").items()}
        y, s = OPS[version](**piece, s0=s, kernel=kernel)
        parts.append(y)
        start += T
    gradients = torch.autograd.grad([torch.cat(parts, 1), s], list(x.values()), [dy, dsT])
    got = {"y": torch.cat(parts, 1), "sT": s} | {
        f"d{name}": gradient for name, gradient in zip(x, gradients, strict=True)
    }
    for name, want in whole.items():
        close(name, got[name], want, 1e-13)


@pytest.mark.parametrize("T", [3, 35])
@both
def test_gradcheck(version, T):
    """Numerical derivatives: the reference is not its own judge. 35 tokens are more than one chunk."""
    x, _, _ = make(version, T, N=2, B=1, H=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(OPS[version], [t.requires_grad_() for t in x.values()], fast_mode=T > 3)


def test_one_fp32_input_does_not_keep_a_gpu_from_its_tensor_cores():
    """A decay that autocast left in fp32. Where r, and so the result, is fp32, the exact kernel is right and
    its price is told; on a CPU and with cuda-exact all is fp32, as it costs nothing or was asked for.
    """
    half = {name: torch.zeros(1, dtype=torch.bfloat16) for name in ("r", "w", "k")}
    one_exact, result_exact = half | {"w": torch.zeros(1)}, half | {"r": torch.zeros(1)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ops.native_dtype("wkv7", "cuda", half) == torch.bfloat16
        assert ops.native_dtype("wkv7", "cuda", one_exact) == torch.bfloat16
        for kernel in ("cpu", "cuda-exact"):
            assert ops.native_dtype("wkv7", kernel, one_exact) == torch.float32
            assert ops.native_dtype("wkv7", kernel, result_exact) == torch.float32
    with pytest.warns(UserWarning, match="r is torch.float32 and w is torch.bfloat16, so that the exact"):
        assert ops.native_dtype("wkv7", "cuda", result_exact) == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_kernel
@both
def test_half_precision_rounds_inputs_and_outputs_only(version, kernel, dtype):
    x, dy, dsT = make(version, 40)
    half = {name: t if name == "s0" else t.to(dtype) for name, t in x.items()}
    got = results(version, half, dy.to(dtype), dsT, kernel)
    want = results(version, {name: t.float() for name, t in half.items()}, dy.to(dtype).float(), dsT, kernel)
    assert got["sT"].dtype == got["ds0"].dtype == torch.float32
    for name, t in want.items():
        assert torch.equal(got[name], t.to(got[name].dtype)), name
        assert got[name].dtype == (torch.float32 if name in ("sT", "ds0") else dtype), name
    # fp32 parameters and half activations, as autocast makes them; it does not reach the arithmetic
    mixed = half | {name: half[name].float() for name in ("w", "u", "k") if name in half}
    with torch.autocast("cpu", torch.bfloat16):
        y, sT = OPS[version](**mixed, kernel=kernel)
    assert torch.equal(y, got["y"]) and torch.equal(sT, got["sT"])


@pytest.mark.parametrize("T", [1, 17])
@every_kernel
@both
def test_strided_inputs(version, kernel, T):
    x, dy, dsT = make(version, T)
    want = results(version, x, dy, dsT, kernel)
    strided = {name: torch.stack([t, t.new_full(t.shape, torch.nan)], -1)[..., 0] for name, t in x.items()}
    strided["r"] = x["r"].transpose(1, 2).contiguous().transpose(1, 2)
    strided["s0"] = x["s0"].mT.contiguous().mT
    assert not any(t.is_contiguous() for name, t in strided.items() if (name, T) != ("r", 1))
    for name, got in results(version, strided, dy, dsT, kernel).items():
        # not bit for bit: the strides choose the order of sums inside matmul
        close(name, got, want[name], 1e-6)


@both
def test_inputs_are_left_alone(version):
    x, _, _ = make(version, 20)
    before = {name: t.clone() for name, t in x.items()}
    OPS[version](**x)
    assert all(torch.equal(t, before[name]) for name, t in x.items())


@pytest.mark.parametrize(
    "name, change, seen",
    [
        ("r", lambda t: t[0], r"r is torch.float32 \(17, 3, 8\)"),
        ("r", lambda t: t[:, :0], r"r is torch.float32 \(2, 0, 3, 8\)"),
        ("r", lambda t: t.long(), r"r is torch.int64"),
        (
            "r",
            lambda t: t.to(torch.float8_e4m3fn),
            r"r is torch.float8_e4m3fn .*; expected float32, bfloat16, float16 or float64",
        ),
        (
            "k",
            lambda t: t[:, 1:],
            r"k is torch.float32 \(2, 16, 3, 8\) .* expected torch.float32 \(2, 17, 3, 8\)",
        ),
        ("v", lambda t: t[..., :1], r"v is torch.float32 \(2, 17, 3, 1\)"),
        ("w", lambda t: t.bfloat16(), r"w is torch.bfloat16 .* expected torch.float32"),
        ("k", lambda t: t.double(), r"k is torch.float64"),
        ("k", lambda t: t.to("meta"), r"k is torch.float32 .* on meta; .* on cpu"),
        ("s0", lambda t: t[:1], r"s0 is torch.float32 \(1, 3, 8, 8\)"),
        ("s0", lambda t: t.bfloat16(), r"s0 is torch.bfloat16"),
        ("reset", lambda t: t[:, 1:], r"reset is torch.bool \(2, 16\) .* expected torch.bool \(2, 17\)"),
        ("reset", lambda t: t.int(), r"reset is torch.int32 .* expected torch.bool"),
        ("u", lambda t: t[:1], r"u is torch.float32 \(1, 8\) .* expected torch.float32 \(3, 8\)"),
        ("b", lambda t: t.half(), r"b is torch.float16"),
    ],
)
@both
def test_errors_at_the_door(version, name, change, seen):
    x, _, _ = make(version, 17)
    x["reset"] = documents(2, 17)
    if name in x:
        with pytest.raises(ValueError, match=f"^wkv{version}: {seen}"):
            OPS[version](**x | {name: change(x[name])})


@both
def test_kernel_names(version):
    x, _, _ = make(version, 2)
    with pytest.raises(
        ValueError,
        match=f"wkv{version}: no kernel 'warp'; expected one of cuda, cuda-exact, cpu, torch, reference",
    ):
        OPS[version](**x, kernel="warp")
    with pytest.raises(
        UserError, match="--wkv warp: expected one of auto, cuda, cuda-exact, cpu, torch, reference"
    ):
        ops.choose("warp", "cpu")
    for name in ["auto", *KERNELS]:
        kernel, reason = ops.choose(name, "cpu")
        assert kernel == (name if name != "auto" else "cpu") and reason


def test_choice_when_a_native_kernel_does_not_fit():
    for name in ("cuda", "cuda-exact"):
        with pytest.raises(UserError, match=f"--wkv {name} runs on cuda, this run is on cpu"):
            ops.choose(name, "cpu")
    with pytest.raises(UserError, match="--wkv cpu runs on cpu, this run is on cuda"):
        ops.choose("cpu", "cuda")
    kernel, reason = ops.choose("auto", "cpu", head_size=20)
    assert kernel == "torch" and "multiples of 8 up to 256, not 20" in reason
    with pytest.raises(
        UserError, match="--wkv cpu: the native kernels take head sizes that are multiples of 8"
    ):
        ops.choose("cpu", "cpu", head_size=264)


def test_no_compiler_is_one_line_and_the_torch_form(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("RWKV_KERNEL_CACHE", str(tmp_path))
    native.library.cache_clear(), self_test.status.cache_clear()
    kernel, reason = ops.choose("auto", "cpu")
    assert kernel == "torch" and "no C++ compiler" in reason and "\n" not in reason
    with pytest.raises(UserError, match="--wkv cpu: no C"):
        ops.choose("cpu", "cpu")
    native.library.cache_clear(), self_test.status.cache_clear()


def test_a_wrong_kernel_is_not_used(monkeypatch, tmp_path):
    """The self-test runs once for a library, sees a wrong kernel, and does not forget a verdict."""
    shutil.copy(native.library("cpu").path, tmp_path)  # which nothing has been said of there
    monkeypatch.setenv("RWKV_KERNEL_CACHE", str(tmp_path))
    native.library.cache_clear(), self_test.status.cache_clear()
    true_call = native.call
    monkeypatch.setattr(
        native,
        "call",
        lambda function, like, *tensors: true_call(function, like, *tensors) or tensors[-1].zero_() is None,
    )
    status = self_test.status("cpu")
    assert status.built and not status.passed and "are wrong on this machine" in status.reason
    assert ops.choose("auto", "cpu")[0] == "torch"
    monkeypatch.setattr(native, "call", true_call)
    self_test.status.cache_clear()
    with torch.inference_mode():  # the test needs gradients, whatever its caller does
        status = self_test.status("cpu")
    assert status.passed and status.error < 1e-5
    monkeypatch.setattr(
        self_test, "largest_error", None
    )  # a second process finds the verdict next to the library
    self_test.status.cache_clear()
    assert self_test.status("cpu")[:4:2] == status[:4:2]
    open(f"{status.path}.tested", "w").close()  # and one that finds it empty tests again

    def largest_error(*_):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(self_test, "largest_error", largest_error)
    self_test.status.cache_clear()
    kernel, reason = ops.choose("auto", "cpu")
    assert kernel == "torch" and "do not run on this machine (out of memory); please report it" in reason
    native.library.cache_clear(), self_test.status.cache_clear()


class Cards:
    """Two GPUs of different kinds; `current` is the one that this process works on."""

    def __init__(self, monkeypatch, tmp_path):
        self.current, self.tested, self.code = 0, [], 0
        kinds = [("NVIDIA T4", (7, 5)), ("NVIDIA H100", (9, 0))]
        library = types.SimpleNamespace(path=str(tmp_path / "wkv_cuda.so"))
        monkeypatch.setattr(native, "library", lambda device: library)
        monkeypatch.setattr(self_test, "largest_error", self.largest_error)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: kinds[self.current][0])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: kinds[self.current][1])

    def largest_error(self, device, chunked):
        self.tested.append((self.current, chunked))
        native.require_started("wkv7", self.code)
        return 1e-6

    def status(self, current, code=0):
        """As a new process on this GPU finds it."""
        self.current, self.code = current, code
        self_test.status.cache_clear()
        return self_test.status("cuda")


@pytest.fixture
def cards(monkeypatch, tmp_path):
    yield Cards(monkeypatch, tmp_path)
    self_test.status.cache_clear()


def test_each_kind_of_gpu_has_a_self_test_of_its_own(cards):
    for card in (0, 1, 0, 1):
        assert cards.status(card).passed
    assert cards.tested == [(0, False), (1, False), (1, True)], "one without tensor cores, one with"


def test_a_gpu_on_which_the_kernels_fail_does_not_speak_for_another(cards):
    assert not cards.status(1, code=700).passed and cards.status(0).passed
    assert cards.status(1).passed, "and a failure is not kept"


@pytest.mark.parametrize(
    "code, words, report",
    [
        (35, "the driver is older than the CUDA", False),
        (209, "no code for this GPU's architecture", False),
        (2, "memory is full", False),
        (700, "read or wrote where it must not", True),
        (12345, "without words", True),
    ],
)
def test_a_code_of_cuda_is_told_in_words(cards, code, words, report):
    reason = cards.status(0, code).reason
    assert f"error {code}: " in reason and words in reason and "use --wkv torch" in reason
    assert ("please report it" in reason) == report and "\n" not in reason
    assert reason.count("--wkv torch") == 1


@pytest.mark.parametrize("N", [8, 16, 24, 32, 48, 64, 96, 128, 256])
@both
def test_head_sizes_of_the_native_kernels(version, N):
    check(version, "cpu", T=19, N=N, B=1, H=2)
    x, _, _ = make(version, 3, N=12)
    with pytest.raises(
        ValueError,
        match=f"wkv{version}: the native kernels take head sizes that are multiples of 8 up to 256, not 12",
    ):
        OPS[version](**x, kernel="cpu")


@pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the other vector widths of this source need an x86-64"
)
@pytest.mark.parametrize("flags", [slow(["-mavx2", "-mfma"]), ["-msse2"]], ids=" ".join)
def test_narrower_vectors(flags, monkeypatch):
    """The builds that other CPUs get. 4 lanes also stand for NEON, with the code paths of 16 registers
    instead of 32.
    """
    command = [toolchain.find_cxx(), "-std=c++17", "-O2", *flags, "-ffp-contract=off", "-fPIC", "-pthread"]
    path = build.build(
        "wkv_narrow",
        "the CPU kernels",
        10,
        sorted(build.CUDA.glob("wkv?_cpu.cpp")),
        build.headers(),
        command,
        ["-pthread"],
    )
    library = ctypes.CDLL(str(path))
    library.device = "cpu"
    monkeypatch.setattr(native, "library", lambda device: library)
    for version in OPS:
        for N in (8, 24, 64):
            check(version, "cpu", T=19, N=N, B=1, H=2)


@both
def test_float64_is_not_for_the_native_kernels(version):
    x, _, _ = make(version, 3, dtype=torch.float64)
    with pytest.raises(
        ValueError,
        match=f"wkv{version}: r is torch.float64; kernel 'cpu' takes float32, bfloat16 and float16",
    ):
        OPS[version](**x, kernel="cpu")
    with pytest.raises(ValueError, match=f"wkv{version}: kernel 'cuda' runs on cuda, r is on cpu"):
        OPS[version](**make(version, 3)[0], kernel="cuda")


@pytest.mark.parametrize("threads", [2, 3, 16])
@both
def test_more_threads_than_heads(version, threads):
    """With fewer heads than threads a head's rows are shared out, and its gradients are sums of parts."""
    for B, H, N in ((1, 1, 64), (1, 3, 32), (2, 4, 8)):
        x, dy, dsT = make(version, 37, N=N, B=B, H=H)
        reset = documents(B, 37)
        want = results(version, x, dy, dsT, "cpu", reset)
        torch.set_num_threads(threads)
        got = results(version, x, dy, dsT, "cpu", reset)
        torch.set_num_threads(1)
        for name, t in want.items():
            close(name, got[name], t, DW_TOLERANCE if name == "dw" else TOLERANCE)


@pytest.mark.parametrize("decay", ["real", "to zero", "to one", "minimum"])
@both
def test_long_rows(version, decay):
    """The goal for the exact kernels at 4096 tokens: y and gradients 1e-6 (v6: 2e-6) in the rms norm, the log
    decay's 5e-5.
    """
    if decay not in DECAYS[version]:
        pytest.skip(f"RWKV-{version} has no such decay")
    x, dy, dsT = make(version, 4096, N=16, B=1, H=1, decay=decay, dtype=torch.float64)
    x = {name: t.float().double() for name, t in x.items()}
    want = results(version, x, dy.float().double(), dsT, "torch" if version == 7 else "reference")
    got = results(version, {name: t.float() for name, t in x.items()}, dy.float(), dsT.float(), "cpu")
    for name, t in want.items():
        error = ((got[name].double() - t).norm() / t.norm()).item()
        allowed = 5e-5 if name == "dw" else {6: 2e-6, 7: 1e-6}[version]
        assert error < allowed, f"{name}: {error:.1e}"


class Saved(TorchDispatchMode):
    """The numbers that each forward of WKV saves."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        if op._opname in ("wkv6", "wkv7"):
            self.counts.append(result[2].numel())
        return result

    def __enter__(self):
        self.counts = []
        return super().__enter__()


@both
def test_only_what_a_backward_reads_is_saved(version):
    """The op saves it where the gradient is asked for, and not for a layer that the backward runs again."""
    x, dy, _ = make(version, 5)
    run = functools.partial(OPS[version], kernel="cpu")
    with Saved() as saved:
        run(**x)
        with torch.no_grad():
            run(**{name: t.requires_grad_() for name, t in x.items()})
        y, _ = run(**x)
        with ops.nothing_saved():
            run(**x)
    numbers = native.saved_floats(version, False, *dy.shape)
    assert saved.counts == [0, 0, numbers, 0]

    torch.manual_seed(0)
    model = RWKV(make_arch(version, head_size=8))
    model.set_kernel("cpu")
    ids = torch.arange(10).view(2, 5)
    found, gradients = [], []
    for model.grad_cp in (0, 1, 2):
        model.zero_grad()
        with Saved() as saved:
            logits, _ = model(ids)
            logits.square().mean().backward()
        found.append(saved.counts)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.equal(gradients[1], gradients[0]) and torch.equal(gradients[2], gradients[0])
    numbers = native.saved_floats(version, False, 2, 5, 6, 8)
    assert found == [[numbers] * 2, [0, 0, numbers, numbers], [0, 0, numbers, numbers]]


@pytest.mark.parametrize("optional", [True, False])
@both
def test_the_op_keeps_the_rules_of_torch_library(version, optional):
    x, _, _ = make(version, 5)
    inputs = [x[name].requires_grad_() for name in NAMES[version]]
    s0, reset = (x["s0"].requires_grad_(), documents(2, 5).to(torch.uint8)) if optional else (None, None)
    torch.library.opcheck(getattr(torch.ops.rwkv, f"wkv{version}").default, (*inputs, s0, reset, False))


@both
def test_the_op_follows_no_pointer_into_another_layout(version):
    x, _, _ = make(version, 5)
    x["v"] = x["v"].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(
        ValueError,
        match=f"wkv{version}_forward: an argument is on cpu with strides .* expected a contiguous one on cpu",
    ):
        getattr(torch.ops.rwkv, f"wkv{version}")(*(x[name] for name in NAMES[version]), None, None, False)


@both
@pytest.mark.parametrize("shape", [(1, 5, 2, 264), (1, 5, 2, 12), (1, 0, 2, 8)])
def test_the_op_takes_no_shape_that_the_kernels_do_not(version, shape):
    inputs = [torch.zeros(shape[2:] if name == "u" else shape) for name in NAMES[version]]
    with pytest.raises(ValueError, match=f"wkv{version}_forward: activations are .* expected .B, T, H, N."):
        getattr(torch.ops.rwkv, f"wkv{version}")(*inputs, None, None, False)


@both
def test_torch_compile_sees_one_graph(version):
    x, dy, _ = make(version, 6)
    x = {name: t.requires_grad_() for name, t in x.items()}

    def loss(x):
        y, state = OPS[version](**x, kernel="cpu")
        return (y * dy).sum() + state.square().sum()

    want = torch.autograd.grad(loss(x), list(x.values()))
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), list(x.values()))
    for a, b in zip(got, want, strict=True):
        close("gradient", a, b, 1e-6)


@every_kernel
@both
def test_nan_is_named(version, kernel):
    for name in (*NAMES[version], "s0"):
        x, _, _ = make(version, 5)
        x[name][(0,) * (x[name].dim() - 1)][3] = torch.nan
        with pytest.raises(
            ValueError,
            match=rf"wkv{version}: {name} holds 1 NaN of \d+ numbers, the first at \(0, .*3\); expected none",
        ):
            OPS[version](**x, kernel=kernel)
        with ops.nan_passes():
            assert OPS[version](**x, kernel=kernel)[0].isnan().any()
    x, _, _ = make(version, 5)
    x["v"] *= 1e38  # an overflow is no NaN of the caller
    x["k"] *= 1e38
    OPS[version](**x, kernel=kernel)


@pytest.mark.parametrize("kernel", ["cpu", "torch"])
@both
def test_nan_is_named_where_documents_meet(version, kernel):
    """There the native kernels leave the decay out, and a, but the backward multiplies by them."""
    for name in drop(dict.fromkeys(NAMES[version]), "u"):
        for t in range(4):
            x, _, _ = make(version, 4)
            x[name][0, t, 1, 3] = torch.nan
            with pytest.raises(ValueError, match=rf"wkv{version}: {name} holds 1 NaN"):
                OPS[version](**x, reset=torch.ones(2, 4, dtype=torch.bool), kernel=kernel)
