"""The native WKV kernels as torch.library ops, `rwkv::wkv6` and `rwkv::wkv7`, for CPU and CUDA tensors: the
device picks the library.

Both libraries have the C interface that cuda/wkv6.cu and cuda/wkv7.cu describe: raw pointers of contiguous
tensors and no torch in it. Activations (B, T, H, N) share one dtype; u, states and what a forward saves for
its backward are fp32; reset is uint8 (B, T). `chunked` asks for the tensor-core form, which only a GPU has.
`src.ops` checks the arguments and makes them so; here only what is not where a pointer may be followed is
refused.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import math
import os
import time
from typing import NamedTuple

import torch
from torch import Tensor

from .build import BuildError, cpu_library, cuda_library
from .reference import recurrent6, recurrent7

INPUTS = {6: ("r", "k", "v", "w", "u"), 7: ("r", "w", "k", "v", "a", "b")}
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as the C interface numbers them
# the activations of a device's library
ACTIVATION_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": tuple(DTYPE_CODES),
}
LARGEST_HEAD = 256
TENSOR_CORE_CHUNK = 16
# torch.compile may not change the layout of an argument; older versions of torch have the second of these
# tags only
EXACT_STRIDES = (getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order),)
# Largest relative error that a self-test lets pass: rounding in fp32, and bf16 operands of tensor cores
LARGEST_ERROR = {False: 1e-5, True: 2e-2}


class Status(NamedTuple):
    """What is known of the kernels of a device after a try to build and test them."""

    built: bool
    passed: bool
    path: str = ""  # the library
    seconds: float = 0.0  # that the build and the test took; milliseconds when both are found done
    error: float | None = None  # the largest relative error of the self-test
    reason: str = ""  # why they are not to be used, and what to do, in one line


def architectures() -> list[str]:
    """Of the GPUs that torch sees: "90" for compute capability 9.0."""
    found = (
        {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        if torch.cuda.is_available()
        else set()
    )
    return sorted(f"{major}{minor}" for major, minor in found)


@functools.cache
def library(device: str) -> ctypes.CDLL:
    """The library for "cpu" or "cuda", built by the first process that asks for it. Raises BuildError."""
    if device == "cuda" and not architectures():
        raise BuildError("torch sees no CUDA GPU; use --wkv auto, cpu or torch")
    path = cpu_library() if device == "cpu" else cuda_library(architectures())
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(
            f"{path} cannot be loaded ({error}); delete it to build it again, or use --wkv torch"
        ) from None
    loaded.path = str(path)
    return loaded


@functools.cache
def status(device: str) -> Status:
    """Build the kernels of "cpu" or "cuda" and compare them with the reference, each once in the life of a
    library file.
    """
    started = time.perf_counter()
    try:
        path = library(device).path
    except BuildError as error:
        return Status(False, False, reason=str(error))
    verdict, error = f"{path}.tested", None
    with (
        contextlib.suppress(OSError, ValueError),
        open(verdict) as file,
    ):  # a power cut may have left it empty
        error = json.load(file)["error"]
    if error is None:
        forms = [False, True] if device == "cuda" and min(map(int, architectures())) >= 80 else [False]
        try:
            errors = {chunked: self_test(device, chunked) for chunked in forms}
            problem = f"are wrong on this machine (errors of the self-test: {errors})"
        except RuntimeError as failure:
            errors = dict.fromkeys(forms, math.nan)
            problem = f"do not run on this machine ({' '.join(str(failure).split())})"
        if not all(errors[chunked] < LARGEST_ERROR[chunked] for chunked in forms):  # NaN is not smaller
            reason = f"the {device} kernels {problem}; please report it, and use --wkv torch"
            return Status(True, False, path, time.perf_counter() - started, max(errors.values()), reason)
        error = errors[False]
        with contextlib.suppress(
            OSError
        ):  # a cache that others built may be read-only: each process then tests for itself
            temporary = f"{verdict}.{os.getpid()}"
            with open(temporary, "w") as file:
                json.dump({"error": error}, file)
            os.replace(temporary, verdict)
    return Status(True, True, path, time.perf_counter() - started, error)


def self_test(device: str, chunked: bool) -> float:
    """The largest relative error (rms) of outputs and gradients of both versions against the reference in
    float64: 37 tokens with a document that starts among them, two heads of 64, initial state and gradient of
    the final one.
    """
    return max(self_error(version, device, chunked) for version in INPUTS)


def self_error(version: int, device: str, chunked: bool) -> float:
    dtype = torch.bfloat16 if chunked else torch.float32
    generator = torch.Generator().manual_seed(0)
    B, T, H, N = 1, 37, 2, 64

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x = {name: random(H, N) if name == "u" else random(B, T, H, N).to(dtype) for name in INPUTS[version]}
    if version == 7:
        kappa = torch.nn.functional.normalize(x["a"].float(), dim=-1)
        x |= {"a": (-kappa).to(dtype), "b": (kappa * torch.sigmoid(x["b"].float())).to(dtype)}
    x["s0"], dstate, dy = random(B, H, N, N), random(B, H, N, N), random(B, T, H, N).to(dtype)
    reset = torch.arange(T).expand(B, T) == 21

    def results(function, move) -> list[Tensor]:
        leaves = [move(t).requires_grad_() for t in x.values()]
        y, state = function(*leaves)
        return [
            t.detach().cpu().double()
            for t in (y, state, *torch.autograd.grad([y, state], leaves, [move(dy), move(dstate)]))
        ]

    def kernel(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        y, state, _ = getattr(torch.ops.rwkv, f"wkv{version}")(
            *leaves, reset.to(device, torch.uint8).contiguous(), chunked
        )
        return y, state

    reference = {6: recurrent6, 7: recurrent7}[version]
    want = results(lambda *leaves: reference(*leaves, reset), torch.Tensor.double)
    got = results(kernel, lambda t: t.to(device, copy=True))
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True))


def has_tensor_core_form(r: Tensor) -> bool:
    """Whether the tensor-core form takes these activations; below one chunk the recurrence is faster."""
    _, T, _, N = r.shape
    return (
        N == 64
        and T >= TENSOR_CORE_CHUNK
        and r.dtype != torch.float32
        and torch.cuda.get_device_capability(r.device) >= (8, 0)
    )


def saved_floats(version: int, chunked: bool, B: int, T: int, H: int, N: int) -> int:
    """What a forward keeps for its backward: nothing for v6, sa_t = S_{t-1} a_t for v7; the tensor-core form
    (N = 64) keeps the state before every chunk in bf16 and the factors of one segment of chunks, as
    wkv*_chunked_saved count them.
    """
    if not chunked:
        return B * T * H * N if version == 7 else 0
    chunks = -(-T // TENSOR_CORE_CHUNK)
    segment = min(chunks, max(16, 1024 // (B * H)))
    return B * H * (2048 * chunks + (2368 if version == 7 else 1216) * segment)


def call(function: str, like: Tensor, *tensors: Tensor | None) -> int:
    """A function of the C interface on the device of `like`, with the sizes and the dtype of `like`."""
    for x in tensors:
        if x is not None and (x.device != like.device or not x.is_contiguous()):
            raise ValueError(
                f"{function}: an argument is on {x.device} with strides {x.stride()}; expected a contiguous"
                f" one on {like.device}"
            )
    if like.dim() != 4 or like.shape[3] % 8 or not 8 <= like.shape[3] <= LARGEST_HEAD or not like.numel():
        raise ValueError(
            f"{function}: activations are {tuple(like.shape)}; expected (B, T, H, N), none of them 0, N a"
            f" multiple of 8 up to {LARGEST_HEAD}"
        )
    # vectors of 16 bytes are loaded; a view may begin between two
    tensors = [x if x is None or x.data_ptr() % 16 == 0 else x.clone() for x in tensors]
    pointers = [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in tensors]
    with torch.cuda.device_of(like):
        return getattr(library(like.device.type), function)(
            *pointers, *sizes(like), DTYPE_CODES[like.dtype], context(like)
        )


def sizes(like: Tensor) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(n) for n in like.shape]


def context(like: Tensor) -> ctypes.c_void_p:
    """The stream of a GPU, the number of threads of a CPU."""
    return ctypes.c_void_p(
        torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else torch.get_num_threads()
    )


def scratch(symbol: str, like: Tensor) -> Tensor:
    function = getattr(library(like.device.type), f"{symbol}_scratch")
    function.restype = ctypes.c_int64
    return like.new_empty(function(*sizes(like), context(like)), dtype=torch.float32)


def define(version: int) -> None:
    """Register rwkv::wkv<version> and rwkv::wkv<version>_backward, with shapes for tracing and the
    gradient.
    """
    names = INPUTS[version]
    given = ", ".join(f"Tensor {name}" for name in names) + ", Tensor? s0, Tensor? reset"
    keeps = version == 7  # the C interface passes `saved` where there is something to save
    symbols = {False: f"wkv{version}", True: f"wkv{version}_chunked"}

    def empty(r: Tensor, chunked: bool) -> tuple[Tensor, Tensor, Tensor]:
        B, T, H, N = r.shape
        fp32 = functools.partial(r.new_empty, dtype=torch.float32)
        return torch.empty_like(r), fp32(B, H, N, N), fp32(saved_floats(version, chunked, B, T, H, N))

    def empty_gradients(r: Tensor) -> list[Tensor]:
        B, _, H, N = r.shape
        fp32 = functools.partial(r.new_empty, dtype=torch.float32)
        return [fp32(B, H, N) if name == "u" else torch.empty_like(r) for name in names] + [fp32(B, H, N, N)]

    def sum_u(gradients: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(
            g.sum(0) if name == "u" else g for name, g in zip((*names, "s0"), gradients, strict=True)
        )

    def forward(*arguments):
        *tensors, chunked = arguments
        y, state, saved = empty(tensors[0], chunked)
        kept = (saved,) if keeps or chunked else ()
        code = call(f"{symbols[chunked]}_forward", tensors[0], *tensors, y, state, *kept)
        if code and y.is_cuda:
            raise RuntimeError(f"wkv{version}: the CUDA kernel could not be started, error {code}")
        if code:
            require_finite(f"wkv{version}", dict(zip((*names, "s0"), tensors)))
        return y, state, saved

    def backward(*arguments):
        *tensors, saved, dy, dstate, chunked = arguments
        kept = (saved,) if keeps or chunked else ()
        gradients = empty_gradients(tensors[0])
        symbol = symbols[chunked]
        code = call(
            f"{symbol}_backward",
            tensors[0],
            *tensors,
            *kept,
            dy,
            dstate,
            *gradients,
            scratch(symbol, tensors[0]),
        )
        if code:
            raise RuntimeError(f"wkv{version}: the backward kernel could not be started, CUDA error {code}")
        return sum_u(gradients)

    def keep(ctx, inputs, output):
        *tensors, ctx.chunked = inputs
        ctx.save_for_backward(*tensors, output[2])
        ctx.set_materialize_grads(False)

    def differentiate(ctx, dy, dstate, _):
        *tensors, saved = ctx.saved_tensors
        dy = torch.zeros_like(tensors[0]) if dy is None else dy.contiguous()
        dstate = None if dstate is None else dstate.contiguous()
        *gradients, ds0 = getattr(torch.ops.rwkv, f"wkv{version}_backward")(
            *tensors, saved, dy, dstate, ctx.chunked
        )
        return *gradients, None if tensors[-2] is None else ds0, None, None

    # not torch.library.custom_op, whose first call imports torch._dynamo: 0.9 s in every process
    devices = ("cpu", "cuda")
    name = f"rwkv::wkv{version}"
    torch.library.define(
        name, f"({given}, bool chunked) -> (Tensor y, Tensor state, Tensor saved)", tags=EXACT_STRIDES
    )
    torch.library.impl(name, devices, forward)
    torch.library.register_fake(name, lambda *arguments: empty(arguments[0], arguments[-1]))
    torch.library.register_autograd(name, differentiate, setup_context=keep)

    gradients = ", ".join(f"Tensor d{name}" for name in (*names, "s0"))
    torch.library.define(
        f"{name}_backward",
        f"({given}, Tensor saved, Tensor dy, Tensor? dstate, bool chunked) -> ({gradients})",
        tags=EXACT_STRIDES,
    )
    torch.library.impl(f"{name}_backward", devices, backward)
    torch.library.register_fake(f"{name}_backward", lambda *arguments: sum_u(empty_gradients(arguments[0])))


_NAMED = [True]  # whether a NaN on a CPU is an error


@contextlib.contextmanager
def nan_passes():
    """Context in which a NaN flows on into the outputs, as on a GPU: for a training that judges every step by
    its loss and goes back.
    """
    before, _NAMED[0] = _NAMED[0], False
    try:
        yield
    finally:
        _NAMED[0] = before


def require_finite(op: str, inputs: dict[str, Tensor | None]) -> None:
    """Raises ValueError with the first argument that holds a NaN; an infinity may be a raw decay, or an
    overflow of the arithmetic.
    """
    if not _NAMED[0]:
        return
    for name, x in inputs.items():
        if x is not None and (bad := x.isnan()).any():
            where = tuple(bad.nonzero()[0].tolist())
            raise ValueError(
                f"{op}: {name} holds {int(bad.sum())} NaN of {x.numel()} numbers, the first at {where};"
                " expected none. A model that diverges makes them: lower the learning rate, or clip"
                " gradients"
            )


for _version in INPUTS:
    define(_version)
