"""The WKV recurrences, `wkv6` and `wkv7`, and the choice of the code that runs them.

Shapes: B batch, T tokens, H heads, N head size. States are fp32 in the layout of the `rwkv` package.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rwkv_miss.errors import UserError

from .reference import recurrent6, recurrent7
from .wkv6 import chunked6
from .wkv7 import chunked7

# kernel name -> (RWKV-6, RWKV-7); each takes contiguous-or-not tensors of one dtype, fp32 or float64, and a state
KERNELS = {"torch": (chunked6, chunked7), "reference": (recurrent6, recurrent7)}


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
    _check("wkv6", {"r": r, "k": k, "v": v, "w": w}, s0, u)
    return _run(KERNELS[kernel][0], (r, k, v, w, u), r, s0)


def wkv7(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, s0: Tensor | None = None, kernel: str = "torch") -> tuple[Tensor, Tensor]:
    """RWKV-7: r, w, k, v, a, b (B, T, H, N), s0 (B, H, N, N) [value, key] -> y (B, T, H, N) in r's dtype, final state.

    w is the raw decay omega, log delta = -exp(-1/2) sigmoid(omega). y_t reads the state after the update.
    """
    _check("wkv7", {"r": r, "w": w, "k": k, "v": v, "a": a, "b": b}, s0)
    return _run(KERNELS[kernel][1], (r, w, k, v, a, b), r, s0)


def _run(kernel, inputs: tuple[Tensor, ...], r: Tensor, s0: Tensor | None) -> tuple[Tensor, Tensor]:
    """State and sums in fp32 whatever the dtype of the activations (float64 for float64)."""
    exact = torch.float64 if r.dtype == torch.float64 else torch.float32
    B, _, H, N = r.shape
    s0 = r.new_zeros(B, H, N, N, dtype=exact) if s0 is None else s0.to(exact)
    y, state = kernel(*(x.to(exact) for x in inputs), s0)
    return y.to(r.dtype), state


def _check(name: str, tensors: dict[str, Tensor], s0: Tensor | None, u: Tensor | None = None) -> None:
    r = tensors["r"]
    if r.dim() != 4 or r.shape[1] < 1:
        raise ValueError(f"{name}: r is {tuple(r.shape)}, expected (batch, tokens >= 1, heads, head size)")
    for key, x in tensors.items():
        if x.shape != r.shape:
            raise ValueError(f"{name}: {key} is {tuple(x.shape)}, r is {tuple(r.shape)}; all share one shape")
        if x.dtype != r.dtype or x.device != r.device:
            raise ValueError(f"{name}: {key} is {x.dtype} on {x.device}, r is {r.dtype} on {r.device}; all share dtype and device")
    B, _, H, N = r.shape
    if u is not None and u.shape != (H, N):
        raise ValueError(f"{name}: u is {tuple(u.shape)}, expected (heads, head size) = {(H, N)}")
    if s0 is not None and s0.shape != (B, H, N, N):
        raise ValueError(f"{name}: s0 is {tuple(s0.shape)}, expected (batch, heads, head size, head size) = {(B, H, N, N)}")
