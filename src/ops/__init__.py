"""The WKV recurrences, `wkv6` and `wkv7`, and the choice of the code that runs them.

Shapes: B batch, T tokens >= 1, H heads, N head size. States are fp32 in the layout of the `rwkv` package. Everything is computed in fp32
whatever the dtype of the activations, also under autocast, and in float64 when r is float64; gradients flow to and through every argument.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rwkv_miss.errors import UserError

from .reference import recurrent6, recurrent7
from .wkv6 import chunked6
from .wkv7 import chunked7

# name -> version -> a function of tensors of one dtype, fp32 or float64, contiguous or not, the state last -> (y, state)
KERNELS = {"torch": {6: chunked6, 7: chunked7}, "reference": {6: recurrent6, 7: recurrent7}}


def choose(name: str, device: str) -> tuple[str, str]:
    """(kernel, the reason in words) for `--wkv name` on cpu or cuda."""
    if name == "auto":
        return "torch", f"auto: the chunked form in plain torch, differentiable, no compiler needed; there is no native {device} kernel yet"
    if name not in KERNELS:
        raise UserError(f"--wkv {name}: expected one of auto, {', '.join(KERNELS)}")
    return name, "as asked"


def wkv6(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, s0: Tensor | None = None, kernel: str = "torch") -> tuple[Tensor, Tensor]:
    """RWKV-6: r, k, v, w (B, T, H, N), u (H, N), s0 (B, H, N, N) [key, value] -> y (B, T, H, N) in r's dtype, final state.

    w is the raw decay, delta = exp(-exp(w)). y_t reads the state before the decay, the current token enters through u.
    """
    return _run(6, kernel, {"r": r, "k": k, "v": v, "w": w, "u": u}, s0)


def wkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, s0: Tensor | None = None, kernel: str = "torch"
) -> tuple[Tensor, Tensor]:
    """RWKV-7: r, w, k, v, a, b (B, T, H, N), s0 (B, H, N, N) [value, key] -> y (B, T, H, N) in r's dtype, final state.

    w is the raw decay omega, log delta = -exp(-1/2) sigmoid(omega). a = -kappa, b = kappa * in-context learning rate.
    y_t reads the state after the update.
    """
    return _run(7, kernel, {"r": r, "w": w, "k": k, "v": v, "a": a, "b": b}, s0)


def _run(version: int, kernel: str, inputs: dict[str, Tensor], s0: Tensor | None) -> tuple[Tensor, Tensor]:
    """The arguments checked by name, then cast to the dtype of the arithmetic and given to the kernel."""
    op, r = f"wkv{version}", inputs["r"]
    if kernel not in KERNELS:
        raise ValueError(f"{op}: no kernel {kernel!r}; expected one of {', '.join(KERNELS)}")
    if r.dim() != 4 or 0 in r.shape or not r.is_floating_point():
        raise ValueError(f"{op}: r is {r.dtype} {tuple(r.shape)}; expected a float (batch, tokens, heads, head size), none of them 0")
    B, _, H, N = r.shape
    exact = torch.float64 if r.dtype == torch.float64 else torch.float32
    if s0 is None:
        s0 = r.new_zeros(B, H, N, N, dtype=exact)
    for name, x in (inputs | {"s0": s0}).items():
        shape = {"u": (H, N), "s0": (B, H, N, N)}.get(name, tuple(r.shape))
        # beside a half-precision r an input may stay in fp32: autocast and fp32 parameters make such mixtures
        dtypes = [exact] if name == "s0" or r.dtype == exact else [r.dtype, exact]
        if tuple(x.shape) != shape or x.dtype not in dtypes or x.device != r.device:
            raise ValueError(
                f"{op}: {name} is {x.dtype} {tuple(x.shape)} on {x.device}; expected {' or '.join(map(str, dtypes))} {shape} "
                f"on {r.device}, because r is {r.dtype} {tuple(r.shape)} there"
            )
    with torch.autocast(r.device.type, enabled=False):
        y, state = KERNELS[kernel][version](*(x.to(exact) for x in inputs.values()), s0)
    return y.to(r.dtype), state
