"""Elementwise parts of a layer, each as one native function if there is one.

Every function here has the formula of its namesake in elementwise_reference.py. It runs that, unless `native`
asks for the native code of a device (elementwise_ops.py) and this covers the case: see `serves`.

`rank` and `ranks`: the linears that read the outputs want this many shard sums, 0 for none. On a GPU the
outputs then carry them (rwkv_miss.functional.with_shard_sums).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_miss.functional import with_shard_sums
from rwkv_miss.gemm import in_torch_func

from . import elementwise_ops, elementwise_reference
from .add_layer_norm import LARGEST_NORM, AddLayerNorm, NormShift
from .elementwise_ops import ready, summable
from .native import ACTIVATION_DTYPES, LARGEST_HEAD, NATIVE


def native_functions(kernel: str) -> str:
    """Return the device of the native functions for a kernel of src.ops: "cpu", "cuda", or "" for none."""
    return NATIVE.get(kernel, "")


def serves(
    native: str, activations: Sequence[Tensor], vectors: Sequence[Tensor] = (), head_size: int = 8
) -> bool:
    """Tell whether the native code of the device `native` computes this.

    It does for multiples of 8 channels, and for the dtypes of the library on the tensors' device; on a CPU
    without gradients for vectors; not inside torch.func. `native` is not read from the tensors: a plan counts
    a GPU's step on tensors that torch takes for a CPU's.
    """
    x = activations[0]
    for other in activations[1:]:
        if other.dtype != x.dtype:
            return False
    return (
        native != ""
        and not in_torch_func()
        and x.dtype in ACTIVATION_DTYPES.get(x.device.type, ())
        and x.shape[-1] % 8 == head_size % 8 == 0
        and head_size <= LARGEST_HEAD
        and x.numel() > 0
        and (native == "cuda" or not (any([v.requires_grad for v in vectors]) and torch.is_grad_enabled()))
    )


def relu_squared(x: Tensor, native: str, rank: int = 0) -> Tensor:
    if serves(native, [x]):
        return elementwise_ops.relu_squared(1, 0.0, *ready(x), rank=summable(rank, native))
    return elementwise_reference.relu_squared(x)


def gated(x: Tensor, gate: Tensor, native: str) -> Tensor:
    # a CPU has no native one: torch's own runs there
    if native == "cuda" and serves(native, [x, gate]):
        return elementwise_ops.gated(1, 0.0, *ready(x, gate))
    return elementwise_reference.gated(x, gate)


def value_residual(v: Tensor, v_first: Tensor, gate: Tensor, native: str) -> tuple[Tensor, Tensor]:
    if serves(native, [v, v_first, gate]):
        return elementwise_ops.ValueResidual.apply(*ready(v, v_first, gate))
    return elementwise_reference.value_residual(v, v_first, gate)


def delta_inputs(
    k: Tensor, a: Tensor, k_k: Tensor, k_a: Tensor, heads: int, native: str
) -> tuple[Tensor, Tensor, Tensor]:
    if serves(native, [k, a], [k_k, k_a], k.shape[-1] // heads):
        return elementwise_ops.delta_inputs(heads, 0.0, *ready(k, a, k_k, k_a))
    return elementwise_reference.delta_inputs(k, a, k_k, k_a, heads)


def readout6(
    y: Tensor, g: Tensor, weight: Tensor, bias: Tensor, heads: int, eps: float, native: str, rank: int = 0
) -> Tensor:
    head_size = y.shape[-1] // heads
    if serves(native, [y, g], [weight, bias], head_size):
        rank = summable(rank, native, head_size)
        return elementwise_ops.readout6(heads, eps, *ready(y, g, weight, bias), rank=rank)
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
    native: str,
) -> Tensor:
    heads, head_size = r_k.shape
    if serves(native, [y, r, k, v, g], [r_k, weight, bias], head_size):
        return elementwise_ops.readout7(heads, eps, *ready(y, r, k, v, g, r_k, weight, bias))
    return elementwise_reference.readout7(y, r, k, v, g, r_k, weight, bias, eps)


def _summed(ranks: Sequence[int]) -> tuple[list[int], int]:
    """List the numbers of the outputs whose shard sums a GPU computes; also return their rank."""
    rank = next((rank for rank in ranks if summable(rank, "cuda")), 0)
    return [i for i, other in enumerate(ranks) if other == rank > 0], rank


def _carrying(made: Sequence[Tensor], summed: Sequence[int]) -> Sequence[Tensor]:
    """Have the outputs numbered `summed` carry their shard sums, which are the last of what was made."""
    count = len(made) - len(summed)
    for i, sums in zip(summed, made[count:], strict=True):
        with_shard_sums(made[i], sums)
    return made[:count]


def shift_mix(
    z: Tensor,
    last: Tensor,
    reset: Tensor | None,
    mixes: list[Tensor],
    native: str,
    again: Sequence[int] = (),
    ranks: Sequence[int] = (),
) -> Sequence[Tensor]:
    """Mix z with the token before. The outputs numbered `again` are returned twice, for a second use of each.

    A GPU then adds up the gradients of both uses where it reads them.
    """
    if not serves(native, [z, last], mixes):
        out = elementwise_reference.shift_mix(z, last, reset, mixes)
    elif native == "cuda":
        summed, rank = _summed(ranks)
        made = elementwise_ops.ShiftMix.apply(again, summed, rank, *ready(z, last, reset, *mixes))
        return _carrying(made, summed)
    else:
        mixes = elementwise_ops.stacked(mixes)
        out = elementwise_ops.ShiftMix.apply((), (), 0, *ready(z, last, reset, mixes))
    return *out, *(out[i] for i in again)


def shift_mix_low_rank(
    z: Tensor,
    last: Tensor,
    reset: Tensor | None,
    mixes: list[Tensor],
    q: Tensor,
    maps: Tensor,
    native: str,
    ranks: Sequence[int] = (),
) -> Sequence[Tensor]:
    if serves(native, [z, last, q], [*mixes, maps]):
        z, last, reset, *mixes = ready(z, last, reset, *mixes)
        if native == "cuda":
            summed, rank = _summed(ranks)
            tensors = z, last, q, reset, maps, *mixes
            return _carrying(elementwise_ops.ShiftMixLowRank.apply(summed, rank, *tensors), summed)
        mixes, maps = elementwise_ops.stacked(mixes), maps.detach().to(z.dtype)
        return elementwise_ops.ShiftMixLowRankCpu.apply(z, last, q, reset, maps, mixes)
    return elementwise_reference.shift_mix_low_rank(z, last, reset, mixes, q, maps)


def add_layer_norm(
    x: Tensor, mixed: Tensor | None, weight: Tensor, bias: Tensor, eps: float, native: str
) -> tuple[Tensor, Tensor]:
    if mixed is None:
        return x, elementwise_reference.layer_norm(x, weight, bias, eps)
    # a CPU has no native one: torch's own runs there
    if native == "cuda" and x.shape[-1] <= LARGEST_NORM and serves(native, [x, mixed], [weight, bias]):
        return AddLayerNorm.apply(*ready(x, mixed, weight, bias), eps)
    return elementwise_reference.add_layer_norm(x, mixed, weight, bias, eps)


class TokenShift(NamedTuple):
    """Arguments of shift_mix after z."""

    last: Tensor
    reset: Tensor | None
    mixes: list[Tensor]
    again: Sequence[int] = ()
    ranks: Sequence[int] = ()


def norm_shift(
    x: Tensor,
    mixed: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    shift: TokenShift,
    native: str,
) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    """Return x + mixed, the last tokens (B, C) of its LayerNorm z, and the token shift of z.

    A GPU writes no z. Without `mixed` the sum is x.
    """
    last, reset, mixes, again, ranks = shift
    fused = native == "cuda" and mixed is not None and x.shape[-1] <= LARGEST_NORM
    if fused and serves(native, [x, mixed, last], [weight, bias, *mixes]):
        summed, rank = _summed(ranks)
        tensors = *ready(x, mixed), weight, bias, *ready(last, reset, *mixes)
        total, z_last, *made = NormShift.apply(again, summed, rank, eps, *tensors)
        return total, z_last, _carrying(made, summed)
    x, z = add_layer_norm(x, mixed, weight, bias, eps, native)
    # for the state a copy of the last token: a view would keep all of z
    return x, z[:, -1].clone(), shift_mix(z, last, reset, mixes, native, again, ranks)
