"""The elementwise parts of a layer as one native function each, forward and backward.

They are torch.library ops, `rwkv::NAME`, for CPU tensors. Every function here has the formula of its namesake
in elementwise_reference.py, and runs that unless `native` is set and the native code has the case: see
`serves`.

The native backward computes again what it needs from the activations that are kept. These are the inputs, of
relu_squared the output, and of the token shift with fixed mixes none. It gives gradients for activations, not
for vectors of the model, which are frozen in most runs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_miss.gemm import product

from . import elementwise_reference
from .native import ACTIVATION_DTYPES, DTYPE_CODES, EXACT_STRIDES, LARGEST_HEAD, library


def serves(
    native: bool, activations: Sequence[Tensor], vectors: Sequence[Tensor] = (), head_size: int = 8
) -> bool:
    """Whether the native code computes this.

    It does on the CPU in fp32 or bf16, in multiples of 8 channels, without gradients for vectors.
    """
    x = activations[0]
    return (
        native
        and x.device.type == "cpu"
        and x.dtype in ACTIVATION_DTYPES["cpu"]
        and all(other.dtype == x.dtype for other in activations)
        and x.shape[-1] % 8 == head_size % 8 == 0
        and head_size <= LARGEST_HEAD
        and x.numel() > 0
        and not (torch.is_grad_enabled() and any(v.requires_grad for v in vectors))
    )


def call(
    function: str,
    like: Tensor,
    *arguments: Tensor | list[Tensor] | int | None,
    heads: int = 1,
    eps: float = 0.0,
) -> None:
    """Run a function of cuda/elementwise_cpu.cpp with the sizes and the dtype of `like`.

    `like` is (B, T, C) or (tokens, C).
    """
    for x in arguments:
        for t in x if isinstance(x, list) else [x]:
            if isinstance(t, Tensor) and (t.device.type != "cpu" or not t.is_contiguous()):
                raise ValueError(
                    f"{function}: an argument is on {t.device} with strides {t.stride()}; expected a"
                    " contiguous one on cpu"
                )
    converted = [_convert(x) for x in arguments]
    batch = like.shape[0] if like.dim() == 3 else 1
    sizes = [
        ctypes.c_int64(n) for n in (batch, like.numel() // (batch * like.shape[-1]), like.shape[-1], heads)
    ]
    getattr(library("cpu"), function)(
        *converted, *sizes, ctypes.c_float(eps), DTYPE_CODES[like.dtype], torch.get_num_threads()
    )


def _convert(x):
    if isinstance(x, Tensor):
        return ctypes.c_void_p(x.data_ptr())
    if isinstance(x, list):
        return (ctypes.c_void_p * len(x))(*(t.data_ptr() for t in x))
    return x


def vector(v: Tensor) -> Tensor:
    """A vector of the model as the native code takes it."""
    return v.detach().reshape(-1).float()


def ready(*activations: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in activations]


def _library_op(name: str, arguments: str, run: Callable, shapes: Callable) -> Callable:
    """rwkv::name(arguments) -> Tensor[] on a CPU, with its shapes for tracing and for the count of memory."""
    # not torch.library.custom_op, whose first use imports torch._dynamo: 0.9 s in every process
    torch.library.define(f"rwkv::{name}", f"({arguments}) -> Tensor[]", tags=EXACT_STRIDES)
    torch.library.impl(f"rwkv::{name}", "cpu", run)
    torch.library.register_fake(f"rwkv::{name}", shapes)
    return getattr(torch.ops.rwkv, name).default


def _differentiable(forward: Callable, backward: Callable, keep: Callable) -> Callable:
    """forward(*arguments) -> outputs, as a function that autograd knows.

    backward(kept, gradients of the outputs) gives the gradients of the first arguments, with kept =
    keep(arguments, outputs). It is a Function around two ops, not torch.library.register_autograd, which
    takes half of the 43 us of a call (torch 2.13).
    """

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            outputs = tuple(forward(*arguments))
            kept = keep(arguments, outputs)
            ctx.save_for_backward(*(x for x in kept if isinstance(x, Tensor)))
            ctx.others = [None if isinstance(x, Tensor) else (x,) for x in kept]
            ctx.count = len(arguments)
            return outputs

        @staticmethod
        @once_differentiable
        def backward(ctx, *gradients):
            tensors = iter(ctx.saved_tensors)
            found = backward(
                [next(tensors) if other is None else other[0] for other in ctx.others], ready(*gradients)
            )
            return *found, *[None] * (ctx.count - len(found))

    return Differentiable.apply


def _define(name: str, activations: int, outputs: int = 1, keeps_output: bool = False) -> Callable:
    """The function (activations of one shape, vectors of the model, heads, eps) -> outputs.

    It is made of two ops, rwkv::name and rwkv::name_backward. Their C functions have the arguments in this
    order: inputs, outputs; for the backward what is kept, the outputs' gradients, the inputs'.
    """

    def op(name: str, symbol: str, results: int) -> Callable:
        def shapes(tensors, heads, eps):
            return [torch.empty_like(tensors[0]) for _ in range(results)]

        def run(tensors, heads, eps):
            like, made = tensors[0], shapes(tensors, heads, eps)
            if any(t.shape != like.shape and t.shape != like.shape[-1:] for t in tensors):
                raise ValueError(
                    f"{symbol}: arguments are {[tuple(t.shape) for t in tensors]}; expected one shape, and"
                    " vectors of its last axis"
                )
            call(symbol, like, *tensors, *made, heads=heads, eps=eps)
            return made

        return _library_op(name, "Tensor[] tensors, int heads, float eps", run, shapes)

    forward, backward = (
        op(name, f"{name}_forward", outputs),
        op(f"{name}_backward", f"{name}_backward", activations),
    )
    return _differentiable(
        lambda *arguments: forward(arguments[:-2], *arguments[-2:]),
        lambda kept, gradients: backward([*kept[:-2], *gradients], *kept[-2:]),
        lambda arguments, made: [*made, *arguments[-2:]] if keeps_output else arguments,
    )


_relu_squared = _define("relu_squared", 1, keeps_output=True)
_value_residual = _define("value_residual", 3)
_delta_inputs = _define("delta_inputs", 2, outputs=3)
_readout6 = _define("readout6", 2)
_readout7 = _define("readout7", 5)


def relu_squared(x: Tensor, native: bool) -> Tensor:
    if serves(native, [x]):
        return _relu_squared(x.contiguous(), 1, 0.0)[0]
    return elementwise_reference.relu_squared(x)


def value_residual(v: Tensor, v_first: Tensor, gate: Tensor, native: bool) -> Tensor:
    if serves(native, [v, v_first, gate]):
        return _value_residual(*ready(v, v_first, gate), 1, 0.0)[0]
    return elementwise_reference.value_residual(v, v_first, gate)


def delta_inputs(
    k: Tensor, a: Tensor, k_k: Tensor, k_a: Tensor, heads: int, native: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if serves(native, [k, a], [k_k, k_a], k.shape[-1] // heads):
        return _delta_inputs(*ready(k, a), vector(k_k), vector(k_a), heads, 0.0)
    return elementwise_reference.delta_inputs(k, a, k_k, k_a, heads)


def readout6(
    y: Tensor, g: Tensor, weight: Tensor, bias: Tensor, heads: int, eps: float, native: bool
) -> Tensor:
    if serves(native, [y, g], [weight, bias], y.shape[-1] // heads):
        return _readout6(*ready(y, g), vector(weight), vector(bias), heads, eps)[0]
    return elementwise_reference.readout6(y, g, weight, bias, heads, eps)


def readout7(
    y: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    r_k: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    native: bool,
) -> Tensor:
    heads, head_size = r_k.shape
    if serves(native, [y, r, k, v, g], [r_k, weight, bias], head_size):
        return _readout7(*ready(y, r, k, v, g), vector(r_k), vector(weight), vector(bias), heads, eps)[0]
    return elementwise_reference.readout7(y, r, k, v, g, r_k, weight, bias, eps)


# The token shift's outputs are tensors of their own, one for each mix: what keeps one does not keep all.


def _shift_shapes(z, last, reset, mix):
    return [torch.empty_like(z) for _ in range(len(mix))]


def _shift_gradient_shapes(z):
    return [torch.empty_like(z), z.new_empty(z.shape[0], z.shape[2])]


def _check_shift(z, last, reset, mix):
    B, T, C = z.shape
    expected = [(B, C), reset if reset is None else (B, T), (len(mix), C)]
    if (found := [x if x is None else tuple(x.shape) for x in (last, reset, mix)]) != expected:
        raise ValueError(
            f"shift_mix: last, reset and mixes are {found}; expected {expected}, because z is"
            f" {tuple(z.shape)}"
        )


def _shift_forward(z, last, reset, mix):
    _check_shift(z, last, reset, mix)
    out = _shift_shapes(z, last, reset, mix)
    call("shift_mix_forward", z, z, last, reset, mix, out, len(out))
    return out


def _shift_backward(reset, mix, gradients):
    found = _shift_gradient_shapes(gradients[0])
    call("shift_mix_backward", gradients[0], reset, mix, gradients, *found, len(gradients))
    return found


_shift_op = _library_op(
    "shift_mix", "Tensor z, Tensor last, Tensor? reset, Tensor mix", _shift_forward, _shift_shapes
)
_shift_backward_op = _library_op(
    "shift_mix_backward",
    "Tensor? reset, Tensor mix, Tensor[] gradients",
    _shift_backward,
    lambda reset, mix, gradients: _shift_gradient_shapes(gradients[0]),
)
_shift_mix = _differentiable(
    _shift_op,
    lambda kept, gradients: _shift_backward_op(*kept, gradients),
    lambda arguments, _: arguments[2:],
)


def _low_rank_mixes(z, q, maps):
    return [product(part, map_.t()).view(z.shape) for part, map_ in zip(q, maps, strict=True)]


def _low_rank_forward(z, last, q, reset, mix, maps):
    _check_shift(z, last, reset, mix)
    out = _low_rank_mixes(z, q, maps)
    call("shift_mix_token_forward", z, z, last, reset, mix, out, len(out))
    return out


def _low_rank_backward(z, last, q, reset, mix, maps, gradients):
    dz, dlast = _shift_gradient_shapes(z)
    m = _low_rank_mixes(z, q, maps)
    # m is its gradient now
    call("shift_mix_token_backward", z, z, last, reset, mix, m, gradients, dz, dlast, len(m))
    return [
        dz,
        dlast,
        torch.stack([product(part.flatten(0, 1), map_) for part, map_ in zip(m, maps, strict=True)]),
    ]


_LOW_RANK = "Tensor z, Tensor last, Tensor q, Tensor? reset, Tensor mix, Tensor maps"
_low_rank_op = _library_op(
    "shift_mix_low_rank",
    _LOW_RANK,
    _low_rank_forward,
    lambda z, last, q, reset, mix, maps: _shift_shapes(z, last, reset, mix),
)
_low_rank_backward_op = _library_op(
    "shift_mix_low_rank_backward",
    f"{_LOW_RANK}, Tensor[] gradients",
    _low_rank_backward,
    lambda z, last, q, *_: [*_shift_gradient_shapes(z), q.new_empty(q.shape)],
)
_shift_mix_low_rank = _differentiable(
    _low_rank_op,
    lambda kept, gradients: _low_rank_backward_op(*kept, gradients),
    lambda arguments, _: arguments,
)


def shift_mix(
    z: Tensor, last: Tensor, reset: Tensor | None, mixes: list[Tensor], native: bool
) -> Sequence[Tensor]:
    if serves(native, [z, last], mixes):
        return _shift_mix(*ready(z, last, reset), stacked(mixes))
    return elementwise_reference.shift_mix(z, last, reset, mixes)


def shift_mix_low_rank(
    z: Tensor, last: Tensor, reset: Tensor | None, mixes: list[Tensor], q: Tensor, maps: Tensor, native: bool
) -> Sequence[Tensor]:
    if serves(native, [z, last], [*mixes, maps]) and q.dtype == z.dtype:
        return _shift_mix_low_rank(
            *ready(z, last), q, *ready(reset), stacked(mixes), maps.detach().to(z.dtype)
        )
    return elementwise_reference.shift_mix_low_rank(z, last, reset, mixes, q, maps)


def stacked(vectors: list[Tensor]) -> Tensor:
    return torch.stack([vector(v) for v in vectors])
