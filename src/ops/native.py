"""The native WKV kernels as torch.library ops, `rwkv::wkv6` and `rwkv::wkv7`, for CPU and CUDA tensors.

There is a library for each device. Both have the C interface that cuda/wkv6.cu and cuda/wkv7.cu describe: raw
pointers of contiguous tensors and no torch in it. Activations (B, T, H, N) share one dtype; u, states and
what a forward saves for its backward are fp32; reset is uint8 (B, T). `chunked` asks for the tensor-core
form, which only a GPU has. `src.ops` checks and casts the arguments; here only tensors that a pointer cannot
describe are refused.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .build import cpu_library, cuda_library
from .launch_errors import require_started
from .toolchain import BuildError

INPUTS = {6: ("r", "k", "v", "w", "u"), 7: ("r", "w", "k", "v", "a", "b")}
NATIVE = {"cuda": "cuda", "cuda-exact": "cuda", "cpu": "cpu"}  # kernel -> the device type of its library
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as the C interface numbers them
# dtypes of the activations, by the device of the library
ACTIVATION_DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": tuple(DTYPE_CODES)}
LARGEST_HEAD = 256
TENSOR_CORE_CHUNK = 16
ALIGNMENT = 16  # bytes; what a lane of a GPU loads at once
# torch.compile may not change the layout of an argument; older versions of torch have the second tag only
EXACT_STRIDES = (getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order),)


def architectures() -> list[str]:
    """List the compute capabilities of the GPUs that torch sees: "90" for 9.0."""
    if not torch.cuda.is_available():
        return []
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return sorted(f"{major}{minor}" for major, minor in capabilities)


@functools.cache
def library(device: str) -> ctypes.CDLL:
    """Return the library for "cpu" or "cuda", built by the first process that asks. Raises BuildError."""
    if device == "cuda" and not architectures():
        raise BuildError("torch sees no CUDA GPU; use --wkv auto, cpu or torch")
    path = cpu_library() if device == "cpu" else cuda_library(architectures())
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(
            f"{path} cannot be loaded ({error}); delete it to build it again, or use --wkv torch"
        ) from None
    loaded.path, loaded.device = str(path), device
    return loaded


_PLANNED = [False]  # whether a plan counts what tensor cores take, on tensors without values of a CPU


@contextlib.contextmanager
def tensor_cores_planned(planned: bool):
    """Declare whether the WKV in the block is counted in its tensor-core form."""
    before, _PLANNED[0] = _PLANNED[0], planned
    try:
        yield
    finally:
        _PLANNED[0] = before


def on_tensor_cores(kernel: str, r: Tensor) -> bool:
    """Tell whether a native kernel has a tensor-core form for these activations.

    Below one chunk the recurrence is faster.
    """
    _, T, _, N = r.shape
    if N != 64 or T < TENSOR_CORE_CHUNK or r.dtype == torch.float32:
        return False
    return _PLANNED[0] or kernel == "cuda" and torch.cuda.get_device_capability(r.device) >= (8, 0)


def saved_floats(version: int, chunked: bool, B: int, T: int, H: int, N: int) -> int:
    """Count the fp32 numbers that a forward keeps for its backward.

    The recurrence keeps nothing for v6, and sa_t = S_{t-1} a_t for v7. The tensor-core form (N = 64) keeps
    the state before every chunk in bf16, as wkv*_chunked_saved in cuda/ count them.
    """
    if not chunked:
        return B * T * H * N if version == 7 else 0
    return B * H * N * N // 2 * -(-T // TENSOR_CORE_CHUNK)


_SAVES = [True]  # whether a forward may keep what a backward reads


@contextlib.contextmanager
def nothing_saved():
    """Declare that the forward in the block will run again before its backward, as activation checkpoints
    do."""
    before, _SAVES[0] = _SAVES[0], False
    try:
        yield
    finally:
        _SAVES[0] = before


def saves(*inputs: Tensor | None) -> bool:
    """Tell whether a forward has to keep what a backward reads."""
    return _SAVES[0] and torch.is_grad_enabled() and any([x is not None and x.requires_grad for x in inputs])


def once_differentiable(backward: Callable) -> Callable:
    """Decorate the backward of an operator without a second derivative: RuntimeError if one is asked for."""

    @functools.wraps(backward)
    def run(ctx, *gradients):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "create_graph=True asks for a second derivative, and the native kernels have none; call"
                " model.set_kernel('torch') before the forward"
            )
        return backward(ctx, *gradients)

    return run


def vector_dtypes(vectors: Sequence[Tensor]) -> int:
    """Return the dtypes of the model's vectors as the C interface takes them: two bits for each."""
    return sum(DTYPE_CODES[v.dtype] << 2 * i for i, v in enumerate(vectors))


def call(function: str, like: Tensor, *tensors: Tensor | list[Tensor] | None) -> int:
    """Call a function of the C interface on the device of `like`, with its sizes and dtype.

    A list among the tensors has vectors of the model.
    """
    numbers = [vector_dtypes(x) for x in tensors if type(x) is list]
    copies: list[Tensor] = []
    pointers = addresses(function, like.device, tensors, copies)
    if like.dim() != 4 or like.shape[3] % 8 or not 8 <= like.shape[3] <= LARGEST_HEAD or not like.numel():
        raise ValueError(
            f"{function}: activations are {tuple(like.shape)}; expected (B, T, H, N), none of them 0, N a"
            f" multiple of 8 up to {LARGEST_HEAD}"
        )
    return getattr(library(like.device.type), function)(
        *(p if type(x) is list else ctypes.c_void_p(p) for p, x in zip(pointers, tensors)),
        *map(ctypes.c_int64, numbers),
        *sizes(like),
        DTYPE_CODES[like.dtype],
        *context(like),
    )


def addresses(
    function: str, device: torch.device, tensors: Sequence[Tensor | list[Tensor] | None], copies: list[Tensor]
) -> list:
    """Return the tensors' addresses in as few calls as possible: a C array for a list, null for None.

    A kernel loads 16 bytes at once. A view that begins between two multiples is copied; `copies` keeps the
    copy until the kernel was called. Outputs are new, and none of them is such a view. Raises ValueError with
    the first tensor that is not contiguous, or on another device.
    """
    places: list = list(tensors)
    for i, x in enumerate(tensors):
        if x is None:
            continue
        if type(x) is list:
            places[i] = (ctypes.c_void_p * len(x))(*addresses(function, device, x, copies))
            continue
        if x.device != device or not x.is_contiguous():
            raise ValueError(
                f"{function}: an argument is on {x.device} with strides {x.stride()}; expected a contiguous"
                f" one on {device}"
            )
        places[i] = x.data_ptr()
        if places[i] % ALIGNMENT:
            copies.append(x.clone())
            places[i] = copies[-1].data_ptr()
    return places


def sizes(like: Tensor) -> Iterable[ctypes.c_int64]:
    return map(ctypes.c_int64, like.shape)


def context(like: Tensor) -> tuple:
    """Return the last arguments of a function of the C interface, for tensors on the device of `like`.

    They are index and stream of a GPU, or the number of threads of a CPU.
    """
    if like.is_cuda:
        stream = torch.cuda.current_stream(like.device).cuda_stream
        return ctypes.c_int(like.device.index), ctypes.c_void_p(stream)
    return (ctypes.c_void_p(torch.get_num_threads()),)


def scratch(symbol: str, like: Tensor) -> Tensor:
    """Allocate the working memory that a function of the C interface asks for."""
    function = getattr(library(like.device.type), symbol)
    function.restype = ctypes.c_int64
    return like.new_empty(function(*sizes(like), *context(like)), dtype=torch.float32)


class WkvOp:
    """Ops rwkv::wkv<version> and rwkv::wkv<version>_backward: their code, shapes and gradient.

    forward: inputs, s0, reset, chunked, save -> y, final state, saved. Without `save`, saved is empty, and
    there is no backward. backward: inputs, s0, reset, saved, dy, dstate, chunked -> the gradients of inputs
    and s0.
    """

    def __init__(self, version: int):
        self.version, self.inputs = version, INPUTS[version]
        self.op = f"wkv{version}"

    def symbol(self, chunked: bool, part: str) -> str:
        """Name the function of the C interface for "forward", "backward", "scratch" or "forward_scratch"."""
        return f"{self.op}{'_chunked' * chunked}_{part}"

    def kept(self, saved: Tensor | None, chunked: bool) -> tuple[Tensor | None, ...]:
        """Return `saved` as the C interface takes it: null if there is nothing to save."""
        return (saved,) if chunked or self.version == 7 else ()

    def empty_outputs(self, r: Tensor, chunked: bool, save: bool) -> tuple[Tensor, Tensor, Tensor]:
        B, T, H, N = r.shape
        state = r.new_empty(B, H, N, N, dtype=torch.float32)
        floats = saved_floats(self.version, chunked, B, T, H, N) if save else 0
        return torch.empty_like(r), state, r.new_empty(floats, dtype=torch.float32)

    def empty_gradients(self, r: Tensor) -> list[Tensor]:
        """Allocate the gradients of the inputs and of s0; u's has one part for each row."""
        B, _, H, N = r.shape
        of_inputs = [
            r.new_empty(B, H, N, dtype=torch.float32) if name == "u" else torch.empty_like(r)
            for name in self.inputs
        ]
        return [*of_inputs, r.new_empty(B, H, N, N, dtype=torch.float32)]

    def sum_u(self, gradients: list[Tensor]) -> tuple[Tensor, ...]:
        """Add up the parts of u's gradient; the other gradients stay."""
        if "u" in self.inputs:
            u = self.inputs.index("u")
            gradients[u] = gradients[u].sum(0)
        return tuple(gradients)

    def forward(self, *arguments, save: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        *tensors, chunked = arguments
        r = tensors[0]
        gpu = library(r.device.type).device == "cuda"
        # a CPU's kernel writes `saved` in any case
        y, state, written = self.empty_outputs(r, chunked, save or not gpu and not chunked)
        saved = written if save else r.new_empty(0, dtype=torch.float32)
        pointed_to = [*tensors, y, state, *self.kept(written if written.numel() else None, chunked)]
        if chunked:
            pointed_to.append(scratch(self.symbol(chunked, "forward_scratch"), r))
        code = call(self.symbol(chunked, "forward"), r, *pointed_to)
        if gpu:
            require_started(self.op, code)
        elif code:
            require_finite(self.op, dict(zip((*self.inputs, "s0"), tensors)))
        return y, state, saved

    def backward(self, *arguments) -> tuple[Tensor, ...]:
        *tensors, saved, dy, dstate, chunked = arguments
        r, gradients = tensors[0], self.empty_gradients(tensors[0])
        self.require_saved(saved, r, chunked)
        pointed_to = (*tensors, *self.kept(saved, chunked), dy, dstate)
        workspace = scratch(self.symbol(chunked, "scratch"), r)
        code = call(self.symbol(chunked, "backward"), r, *pointed_to, *gradients, workspace)
        require_started(f"{self.op} backward", code)
        return self.sum_u(gradients)

    def require_saved(self, saved: Tensor, r: Tensor, chunked: bool) -> None:
        """Raise RuntimeError unless a forward saved what its backward reads."""
        if saved.numel() != (floats := saved_floats(self.version, chunked, *r.shape)):
            raise RuntimeError(
                f"{self.op}: the forward saved {saved.numel()} numbers, its backward reads {floats}; call the"
                " forward with save=True"
            )

    def save_for_backward(self, ctx, inputs, keyword_only_inputs, output) -> None:
        *tensors, ctx.chunked = inputs
        ctx.save_for_backward(*tensors, output[2])
        ctx.set_materialize_grads(False)

    def differentiate(self, ctx, dy: Tensor | None, dstate: Tensor | None, _):
        *tensors, saved = ctx.saved_tensors
        *_, s0, _ = tensors
        dy = torch.zeros_like(tensors[0]) if dy is None else dy.contiguous()
        dstate = None if dstate is None else dstate.contiguous()
        backward = getattr(torch.ops.rwkv, f"{self.op}_backward")
        *gradients, ds0 = backward(*tensors, saved, dy, dstate, ctx.chunked)
        return *gradients, None if s0 is None else ds0, None, None

    def fake_forward(self, *arguments, save: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        return self.empty_outputs(arguments[0], arguments[-1], save)

    def fake_backward(self, *arguments) -> tuple[Tensor, ...]:
        return self.sum_u(self.empty_gradients(arguments[0]))

    def register(self) -> None:
        # not torch.library.custom_op, whose first call imports torch._dynamo: 0.9 s in every process
        name, devices = f"rwkv::{self.op}", ("cpu", "cuda")
        given = ", ".join(f"Tensor {x}" for x in self.inputs) + ", Tensor? s0, Tensor? reset"
        outputs = "Tensor y, Tensor state, Tensor saved"
        flags = "bool chunked, *, bool save=True"
        torch.library.define(name, f"({given}, {flags}) -> ({outputs})", tags=EXACT_STRIDES)
        torch.library.impl(name, devices, self.forward)
        torch.library.register_fake(name, self.fake_forward)
        torch.library.register_autograd(
            name, once_differentiable(self.differentiate), setup_context=self.save_for_backward
        )

        name += "_backward"
        given += ", Tensor saved, Tensor dy, Tensor? dstate"
        outputs = ", ".join(f"Tensor d{x}" for x in (*self.inputs, "s0"))
        torch.library.define(name, f"({given}, bool chunked) -> ({outputs})", tags=EXACT_STRIDES)
        torch.library.impl(name, devices, self.backward)
        torch.library.register_fake(name, self.fake_backward)


_NAMED = [True]  # whether a NaN on a CPU is an error


@contextlib.contextmanager
def nan_passes():
    """Let a NaN pass into the outputs inside the block, as on a GPU.

    It is for a training that checks the loss of every step and rolls back.
    """
    before, _NAMED[0] = _NAMED[0], False
    try:
        yield
    finally:
        _NAMED[0] = before


def require_finite(op: str, inputs: dict[str, Tensor | None]) -> None:
    """Raise ValueError with the first argument that holds a NaN.

    An infinity may pass: it may be a raw decay, or an overflow of the arithmetic.
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
    WkvOp(_version).register()
