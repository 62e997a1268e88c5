"""The WKV recurrences, `wkv6` and `wkv7`, and the choice of the code that runs them.

Imports common only. reference.py has the equations, elementwise.py the other functions of a layer.

Shapes: B batch, T tokens >= 1, H heads, N head size. States are fp32 in the layout of the `rwkv` package.
Where `reset` (B, T), bool, is set, a document starts with that token: neither state nor gradient crosses from
the tokens before. `initial_state` (H, N, N) is the state that documents start from; None is zero. It is also
the state before the first token, unless `s0` (B, H, N, N) gives the rows other states.

Arithmetic is fp32 whatever the dtype of the activations, also under autocast, and float64 when r is float64;
tensor cores multiply in bf16 and add in fp32. Gradients flow to and through every argument. A NaN in an
argument is a ValueError on a CPU only: looking for one on a GPU would mean waiting for it. With `cuda`,
inputs are cast to r's dtype if that is fp16 or bf16, because the tensor cores need one dtype. Inside
torch.func the kernel `torch` takes a native one's place.

| kernel     | what runs                                                                  | takes
|------------|----------------------------------------------------------------------------|----------------
| cuda       | cuda/*_chunked.cu on tensor cores where they have the shape, or cuda-exact | CUDA, N % 8 = 0
| cuda-exact | cuda/wkv6.cu and wkv7.cu, the recurrence in fp32                           | CUDA, N % 8 = 0
| cpu        | cuda/wkv6_cpu.cpp and wkv7_cpu.cpp, the recurrence in fp32                 | CPU, N % 8 = 0
| torch      | the chunked forms in plain torch                                           | any, float64 too
| reference  | token by token in plain torch: the specification                           | any, float64 too
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from rwkv_miss.errors import UserError
from rwkv_miss.gemm import in_torch_func

from . import native, quantised, self_test  # noqa: F401  (quantised registers a kernel)
from .chunked6 import chunked6
from .chunked7 import chunked7
from .native import NATIVE, nan_passes, nothing_saved  # noqa: F401  (the two are for a training's own use)
from .per_document import by_document
from .reference import recurrent6, recurrent7

# (tensors of one dtype, fp32 or float64, contiguous or not; then state and resets) -> (y, state)
PLAIN = {"torch": {6: chunked6, 7: chunked7}, "reference": {6: recurrent6, 7: recurrent7}}
KERNELS = (*NATIVE, *PLAIN)


def choose(name: str, device: str, head_size: int = 64) -> tuple[str, str]:
    """Choose (kernel, the reason in words) for `--wkv name` on "cpu" or "cuda".

    A native kernel is built and tested here, if it has not been.
    """
    if name != "auto" and name not in KERNELS:
        raise UserError(f"--wkv {name}: expected one of auto, {', '.join(KERNELS)}")
    if name in PLAIN:
        return name, "as asked"
    if name != "auto" and NATIVE[name] != device:
        raise UserError(
            f"--wkv {name} runs on {NATIVE[name]}, this run is on {device}; use --wkv auto, or another"
            " --accelerator"
        )
    problem = head_size_problem(head_size)
    if not problem:
        status = self_test.status(device)
        problem = status.reason
    if not problem:
        details = f"self-test error {status.error:.0e}, library {status.path}"
        if name == "auto":
            return device, f"auto: the native kernel of this device; {details}"
        return name, f"as asked; {details}"
    if name != "auto":
        raise UserError(f"--wkv {name}: {problem}")
    return "torch", f"auto: the chunked form in plain torch, because {problem}"


def head_size_problem(head_size: int) -> str:
    """Say why the native kernels do not take this head size, or ""."""
    if head_size % 8 == 0 and head_size <= native.LARGEST_HEAD:
        return ""
    return (
        f"the native kernels take head sizes that are multiples of 8 up to {native.LARGEST_HEAD}, not"
        f" {head_size}"
    )


def wkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    s0: Tensor | None = None,
    reset: Tensor | None = None,
    kernel: str = "torch",
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run RWKV-6's recurrence: (y (B, T, H, N) in r's dtype, the final state).

    r, k, v and w are (B, T, H, N), u (H, N), s0 and the final state (B, H, N, N) [key, value]. w is the raw
    decay, delta = exp(-exp(w)). y_t reads the state before the decay; the current token enters through u.
    Raises ValueError.
    """
    return _run(6, kernel, {"r": r, "k": k, "v": v, "w": w, "u": u}, s0, reset, initial_state)


def wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    s0: Tensor | None = None,
    reset: Tensor | None = None,
    kernel: str = "torch",
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run RWKV-7's recurrence: (y (B, T, H, N) in r's dtype, the final state).

    r, w, k, v, a and b are (B, T, H, N), s0 and the final state (B, H, N, N) [value, key]. w is the raw decay
    omega, log delta = -exp(-1/2) sigmoid(omega). a = -kappa, b = kappa * in-context learning rate. y_t reads
    the state after the update. Raises ValueError.
    """
    return _run(7, kernel, {"r": r, "w": w, "k": k, "v": v, "a": a, "b": b}, s0, reset, initial_state)


def _run(
    version: int,
    kernel: str,
    inputs: dict[str, Tensor],
    s0: Tensor | None,
    reset: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Check the arguments, cast them for the kernel, and run it."""
    if kernel not in KERNELS:
        raise ValueError(f"wkv{version}: no kernel {kernel!r}; expected one of {', '.join(KERNELS)}")
    check(version, inputs, s0, reset, initial_state)
    if initial_state is not None and reset is not None:
        return by_document(
            lambda parts, state: _compute(version, kernel, parts, state, None),
            inputs,
            s0,
            reset,
            initial_state,
        )
    if initial_state is not None and s0 is None:
        s0 = initial_state.expand(len(inputs["r"]), *initial_state.shape)
    return _compute(version, kernel, inputs, s0, reset)


def check(
    version: int,
    inputs: dict[str, Tensor],
    s0: Tensor | None,
    reset: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    """Raise ValueError with the first argument that does not fit r in dtype, shape and device.

    It names r itself if no kernel takes its dtype or shape.
    """
    op, r = f"wkv{version}", inputs["r"]
    if r.dim() != 4 or 0 in r.shape or r.dtype not in (*native.DTYPE_CODES, torch.float64):
        raise ValueError(
            f"{op}: r is {r.dtype} {tuple(r.shape)}; expected float32, bfloat16, float16 or float64 (batch,"
            " tokens, heads, head size), none of them 0"
        )
    B, T, H, N = r.shape
    exact = torch.float64 if r.dtype == torch.float64 else torch.float32
    # with a half-precision r an input may be in fp32: autocast and fp32 parameters make such mixtures
    allowed = {name: (tuple(r.shape), [exact] if r.dtype == exact else [r.dtype, exact]) for name in inputs}
    allowed |= {
        "s0": ((B, H, N, N), [exact]),
        "reset": ((B, T), [torch.bool]),
        "initial_state": ((H, N, N), [exact]),
    }
    if version == 6:
        allowed["u"] = ((H, N), allowed["u"][1])
    for name, x in (inputs | {"s0": s0, "reset": reset, "initial_state": initial_state}).items():
        shape, dtypes = allowed[name]
        if x is not None and (tuple(x.shape) != shape or x.dtype not in dtypes or x.device != r.device):
            raise ValueError(
                f"{op}: {name} is {x.dtype} {tuple(x.shape)} on {x.device}; expected"
                f" {' or '.join(map(str, dtypes))} {shape} on {r.device}, because r is {r.dtype}"
                f" {tuple(r.shape)} there"
            )


def _compute(
    version: int, kernel: str, inputs: dict[str, Tensor], s0: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    op, r = f"wkv{version}", inputs["r"]
    followed, plain = in_torch_func(), PLAIN.get(kernel, PLAIN["torch"])
    if kernel in NATIVE and not followed:
        return _run_native(op, kernel, inputs, s0, reset)
    exact = torch.float64 if r.dtype == torch.float64 else torch.float32
    if s0 is None:
        B, _, H, N = r.shape
        s0 = r.new_zeros(B, H, N, N, dtype=exact)
    with torch.autocast(r.device.type, enabled=False):
        y, state = plain[version](*(x.to(exact) for x in inputs.values()), s0, reset)
    if (
        r.device.type == "cpu"
        and not (torch.compiler.is_compiling() or followed)
        and not (y.sum() + state.sum()).isfinite()
    ):
        native.require_finite(op, inputs | {"s0": s0})
    return y.to(r.dtype), state


def _run_native(
    op: str, kernel: str, inputs: dict[str, Tensor], s0: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    r = inputs["r"]
    if r.device.type != NATIVE[kernel]:
        raise ValueError(
            f"{op}: kernel {kernel!r} runs on {NATIVE[kernel]}, r is on {r.device}; expected another kernel"
            " or tensors there"
        )
    if problem := head_size_problem(r.shape[-1]):
        raise ValueError(f"{op}: {problem}; use kernel 'torch'")
    if r.dtype == torch.float64:
        raise ValueError(
            f"{op}: r is torch.float64; kernel {kernel!r} takes float32, bfloat16 and float16, use kernel"
            " 'torch'"
        )
    activations = {name: x for name, x in inputs.items() if name != "u"}
    dtype = native_dtype(op, kernel, activations)
    ready = [x.to(torch.float32 if name == "u" else dtype).contiguous() for name, x in inputs.items()]
    chunked = native.on_tensor_cores(kernel, ready[0])
    reset = None if reset is None else reset.contiguous().view(torch.uint8)
    s0 = None if s0 is None else s0.contiguous()
    y, state, _ = getattr(torch.ops.rwkv, op)(*ready, s0, reset, chunked, save=native.saves(*ready, s0))
    return y.to(r.dtype), state


def native_dtype(op: str, kernel: str, activations: dict[str, Tensor]) -> torch.dtype:
    """Return the dtype in which a native kernel gets r and the other activations, which may have several."""
    r = activations["r"].dtype
    other = next((name for name, x in activations.items() if x.dtype != r), None)
    if kernel == "cuda" and other and r != torch.float32:
        # if one of them is in fp32, as a caller's autocast makes a decay, the exact kernel would run
        return r
    if kernel == "cuda" and other:
        warnings.warn(
            f"{op}: r is {r} and {other} is {activations[other].dtype}, so that the exact kernel runs, which"
            " is about four times slower than the tensor cores; give both in half precision",
            stacklevel=2,
        )
    return torch.float32 if other or r == torch.float16 and kernel == "cpu" else r
