"""The elementwise parts of a layer as one native function each, forward and backward: torch.library ops `rwkv::NAME` for CPU tensors.

Every function here has the formula of its namesake in plain.py, and runs that unless `native` is set and the native code has the case: see
`serves`. The native backward computes again what it needs from the activations that are kept, which are the inputs, of relu_squared the
output, and of the token shift with fixed mixes none. It gives gradients for activations, not for vectors of the model: those are frozen
in most runs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from rwkv_miss.gemm import product

from . import plain
from .native import LAYOUT, library

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
LARGEST_HEAD = 256


def serves(native: bool, activations: Sequence[Tensor], vectors: Sequence[Tensor] = (), head_size: int = 8) -> bool:
    """Whether the native code computes this: on the CPU in fp32 or bf16, in multiples of 8 channels, without gradients for vectors."""
    x = activations[0]
    return (
        native and x.device.type == "cpu" and x.dtype in DTYPES and all(other.dtype == x.dtype for other in activations)
        and x.shape[-1] % 8 == head_size % 8 == 0 and head_size <= LARGEST_HEAD and x.numel() > 0
        and not (torch.is_grad_enabled() and any(v.requires_grad for v in vectors))
    )


def call(function: str, like: Tensor, *arguments: Tensor | list[Tensor] | float | None, heads: int = 1) -> None:
    """A function of cuda/elementwise_cpu.cpp; sizes and dtype are those of `like`, (B, T, C) or (tokens, C)."""
    for x in arguments:
        for t in x if isinstance(x, list) else [x]:
            if isinstance(t, Tensor) and (t.device.type != "cpu" or not t.is_contiguous()):
                raise ValueError(f"{function}: an argument is on {t.device} with strides {t.stride()}; expected a contiguous one on cpu")
    converted = [_convert(x) for x in arguments]
    batch = like.shape[0] if like.dim() == 3 else 1
    sizes = [ctypes.c_int64(n) for n in (batch, like.numel() // (batch * like.shape[-1]), like.shape[-1], heads)]
    getattr(library("cpu"), function)(*converted, *sizes, DTYPES[like.dtype], torch.get_num_threads())


def _convert(x):
    if isinstance(x, Tensor):
        return ctypes.c_void_p(x.data_ptr())
    if isinstance(x, list):
        return (ctypes.c_void_p * len(x))(*(t.data_ptr() for t in x))
    return ctypes.c_float(x) if isinstance(x, float) else x


def vector(v: Tensor) -> Tensor:
    """A vector of the model as the native code takes it."""
    return v.detach().reshape(-1).float()


def ready(*activations: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in activations]


def _define(name: str, activations: str, vectors: str = "", outputs: int = 1, options: str = "", keeps: str = "inputs") -> None:
    """Register rwkv::name(activations, vectors, options) -> outputs, all activations of one shape, and rwkv::name_backward.

    Their C functions have the arguments in this order: inputs, outputs; for the backward what is kept, the outputs' gradients, the inputs'.
    """
    names, constants = activations.split(), vectors.split()
    kept = names if keeps == "inputs" else ["y"]
    many = len(names) + len(constants)

    def schema(tensors: list[str], count: int) -> str:
        given = ", ".join([*(f"Tensor {t}" for t in tensors), *filter(None, [options])])
        return f"({given}) -> ({', '.join(['Tensor'] * count)})"

    def run(suffix: str, count: int, arguments):
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        heads, *rest = [*arguments[len(tensors) :]] or [1]
        made = [torch.empty_like(tensors[0]) for _ in range(count)]
        call(f"{name}_{suffix}", tensors[0], *tensors, *made, *rest, heads=heads)
        return made[0] if count == 1 else tuple(made)

    def empty(count: int, like: Tensor):
        made = [torch.empty_like(like) for _ in range(count)]
        return made[0] if count == 1 else tuple(made)

    def keep(ctx, inputs, output):
        ctx.options = inputs[many:]
        ctx.save_for_backward(*((*inputs[:many],) if keeps == "inputs" else (output,)))

    def differentiate(ctx, *gradients):
        gradients = getattr(torch.ops.rwkv, f"{name}_backward")(*ctx.saved_tensors, *ready(*gradients), *ctx.options)
        gradients = gradients if isinstance(gradients, tuple) else (gradients,)
        return *gradients, *[None] * (len(constants) + len(ctx.options))

    # not torch.library.custom_op, whose first call imports torch._dynamo: 0.9 s in every process
    op = f"rwkv::{name}"
    torch.library.define(op, schema(names + constants, outputs), tags=LAYOUT)
    torch.library.impl(op, "cpu", lambda *arguments: run("forward", outputs, arguments))
    torch.library.register_fake(op, lambda *arguments: empty(outputs, arguments[0]))
    torch.library.register_autograd(op, differentiate, setup_context=keep)
    taken = [*kept, *constants, *(f"d{i}" for i in range(outputs))]
    torch.library.define(f"{op}_backward", schema(taken, len(names)), tags=LAYOUT)
    torch.library.impl(f"{op}_backward", "cpu", lambda *arguments: run("backward", len(names), arguments))
    torch.library.register_fake(f"{op}_backward", lambda *arguments: empty(len(names), arguments[0]))


_define("relu_squared", "x", keeps="output")
_define("sigmoid_gate", "x gate")
_define("value_residual", "v v_first gate")
_define("delta_inputs", "k a", "k_k k_a", outputs=3, options="int heads")
_define("readout6", "y g", "weight bias", options="int heads, float eps")
_define("readout7", "y r k v g", "r_k weight bias", options="int heads, float eps")


def relu_squared(x: Tensor, native: bool) -> Tensor:
    return torch.ops.rwkv.relu_squared(x.contiguous()) if serves(native, [x]) else plain.relu_squared(x)


def sigmoid_gate(x: Tensor, gate: Tensor, native: bool) -> Tensor:
    run = torch.ops.rwkv.sigmoid_gate if serves(native, [x, gate]) else plain.sigmoid_gate
    return run(*ready(x, gate))


def value_residual(v: Tensor, v_first: Tensor, gate: Tensor, native: bool) -> Tensor:
    run = torch.ops.rwkv.value_residual if serves(native, [v, v_first, gate]) else plain.value_residual
    return run(*ready(v, v_first, gate))


def delta_inputs(k: Tensor, a: Tensor, k_k: Tensor, k_a: Tensor, heads: int, native: bool) -> tuple[Tensor, Tensor, Tensor]:
    if serves(native, [k, a], [k_k, k_a], k.shape[-1] // heads):
        return torch.ops.rwkv.delta_inputs(*ready(k, a), vector(k_k), vector(k_a), heads)
    return plain.delta_inputs(k, a, k_k, k_a, heads)


def readout6(y: Tensor, g: Tensor, weight: Tensor, bias: Tensor, heads: int, eps: float, native: bool) -> Tensor:
    if serves(native, [y, g], [weight, bias], y.shape[-1] // heads):
        return torch.ops.rwkv.readout6(*ready(y, g), vector(weight), vector(bias), heads, eps)
    return plain.readout6(y, g, weight, bias, heads, eps)


def readout7(
    y: Tensor, r: Tensor, k: Tensor, v: Tensor, g: Tensor, r_k: Tensor, weight: Tensor, bias: Tensor, eps: float, native: bool
) -> Tensor:
    heads, head_size = r_k.shape
    if serves(native, [y, r, k, v, g], [r_k, weight, bias], head_size):
        return torch.ops.rwkv.readout7(*ready(y, r, k, v, g), vector(r_k), vector(weight), vector(bias), heads, eps)
    return plain.readout7(y, r, k, v, g, r_k, weight, bias, eps)


# The token shift has one output for each mix, none of them a part of another: what keeps one does not keep all.
_GIVEN = "Tensor z, Tensor last, Tensor? reset, Tensor mix"


def _shift_forward(z, last, reset, mix):
    out = [torch.empty_like(z) for _ in mix]
    call("shift_mix_forward", z, z, last, reset, mix, out, len(out))
    return out


def _shift_backward(reset, mix, gradients):
    dz, dlast = _empty_shift_gradients(gradients[0])
    call("shift_mix_backward", dz, reset, mix, gradients, dz, dlast, len(gradients))
    return dz, dlast


def _empty_shift_gradients(z):
    return torch.empty_like(z), z.new_empty(z.shape[0], z.shape[2])


def _keep_shift(ctx, inputs, output):
    ctx.save_for_backward(*inputs[2:])


def _differentiate_shift(ctx, gradients):
    return *torch.ops.rwkv.shift_mix_backward(*ctx.saved_tensors, ready(*gradients)), None, None


torch.library.define("rwkv::shift_mix", f"({_GIVEN}) -> Tensor[]", tags=LAYOUT)
torch.library.impl("rwkv::shift_mix", "cpu", _shift_forward)
torch.library.register_fake("rwkv::shift_mix", lambda z, last, reset, mix: [torch.empty_like(z) for _ in range(len(mix))])
torch.library.register_autograd("rwkv::shift_mix", _differentiate_shift, setup_context=_keep_shift)
torch.library.define("rwkv::shift_mix_backward", "(Tensor? reset, Tensor mix, Tensor[] dout) -> (Tensor, Tensor)", tags=LAYOUT)
torch.library.impl("rwkv::shift_mix_backward", "cpu", _shift_backward)
torch.library.register_fake("rwkv::shift_mix_backward", lambda reset, mix, gradients: _empty_shift_gradients(gradients[0]))


def _low_rank_mixes(z, q, maps):
    return [product(part, map_.t()).view(z.shape) for part, map_ in zip(q, maps, strict=True)]


def _low_rank_forward(z, last, reset, mix, q, maps):
    out = _low_rank_mixes(z, q, maps)
    call("shift_mix_token_forward", z, z, last, reset, mix, out, len(out))
    return out


def _low_rank_backward(z, last, reset, mix, q, maps, gradients):
    dz, dlast = _empty_shift_gradients(z)
    m = _low_rank_mixes(z, q, maps)
    call("shift_mix_token_backward", z, z, last, reset, mix, m, gradients, dz, dlast, len(m))
    dq = torch.stack([product(part.flatten(0, 1), map_) for part, map_ in zip(m, maps, strict=True)])
    return dz, dlast, dq


def _keep_low_rank(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate_low_rank(ctx, gradients):
    dz, dlast, dq = torch.ops.rwkv.shift_mix_low_rank_backward(*ctx.saved_tensors, ready(*gradients))
    return dz, dlast, None, None, dq, None


_LOW_RANK = f"{_GIVEN}, Tensor q, Tensor maps"
torch.library.define("rwkv::shift_mix_low_rank", f"({_LOW_RANK}) -> Tensor[]", tags=LAYOUT)
torch.library.impl("rwkv::shift_mix_low_rank", "cpu", _low_rank_forward)
torch.library.register_fake("rwkv::shift_mix_low_rank", lambda z, last, reset, mix, q, maps: [torch.empty_like(z) for _ in range(len(mix))])
torch.library.register_autograd("rwkv::shift_mix_low_rank", _differentiate_low_rank, setup_context=_keep_low_rank)
torch.library.define("rwkv::shift_mix_low_rank_backward", f"({_LOW_RANK}, Tensor[] dout) -> (Tensor, Tensor, Tensor)", tags=LAYOUT)
torch.library.impl("rwkv::shift_mix_low_rank_backward", "cpu", _low_rank_backward)
torch.library.register_fake(
    "rwkv::shift_mix_low_rank_backward", lambda z, last, reset, mix, q, *_: (*_empty_shift_gradients(z), q.new_empty(q.shape))
)


def shift_mix(z: Tensor, last: Tensor, reset: Tensor | None, mixes: list[Tensor], native: bool) -> list[Tensor]:
    if serves(native, [z, last], mixes):
        return torch.ops.rwkv.shift_mix(*ready(z, last, reset), stacked(mixes))
    return plain.shift_mix(z, last, reset, mixes)


def shift_mix_low_rank(
    z: Tensor, last: Tensor, reset: Tensor | None, mixes: list[Tensor], q: Tensor, maps: Tensor, native: bool
) -> list[Tensor]:
    if serves(native, [z, last], [*mixes, maps]) and q.dtype == z.dtype:
        return torch.ops.rwkv.shift_mix_low_rank(*ready(z, last, reset), stacked(mixes), q, maps.detach().to(z.dtype))
    return plain.shift_mix_low_rank(z, last, reset, mixes, q, maps)


def stacked(vectors: list[Tensor]) -> Tensor:
    return torch.stack([vector(v) for v in vectors])
