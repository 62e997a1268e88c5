"""Errors of a device's native code: outputs and gradients against plain torch in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rwkv_miss.functional import shard_sum

from . import elementwise
from .native import INPUTS
from .reference import recurrent6, recurrent7

TOKENS = 37  # no multiple of a block
# sizes for the elementwise functions
ROWS, WIDTH, HEADS, EPS, RANK = 2, 128, 2, 64e-5, 16


def largest_error(device: str, chunked: bool) -> float:
    """Return the largest relative error (rms) of WKV in the form asked for.

    With the recurrence it includes the other functions. NaN if any result is NaN.
    """
    errors = [wkv_error(version, device, chunked) for version in INPUTS]
    return worst(errors if chunked else [*errors, elementwise_error(device)])


def worst(errors: list[float]) -> float:
    """Return the largest error; NaN if one is, which max() may pass over."""
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def worst_of(got: list[Tensor], want: list[Tensor]) -> float:
    """Return the largest relative error (rms) of these tensors."""
    return worst([((a - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True)])


def wkv_error(version: int, device: str, chunked: bool) -> float:
    """Return the error of one version of WKV.

    A document starts among the tokens, there is an initial state and a gradient of the final one.
    """
    dtype = torch.bfloat16 if chunked else torch.float32
    generator = torch.Generator().manual_seed(0)
    B, T, H, N = 1, TOKENS, 2, 64

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x = {name: random(H, N) if name == "u" else random(B, T, H, N).to(dtype) for name in INPUTS[version]}
    if version == 7:
        kappa = torch.nn.functional.normalize(x["a"].float(), dim=-1)
        x |= {"a": (-kappa).to(dtype), "b": (kappa * torch.sigmoid(x["b"].float())).to(dtype)}
    x["s0"], dstate, dy = random(B, H, N, N), random(B, H, N, N), random(B, T, H, N).to(dtype)
    reset = torch.arange(T).expand(B, T) == 21

    def results(function: Callable, move: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaves = [move(t).requires_grad_() for t in x.values()]
        y, state = function(*leaves)
        gradients = torch.autograd.grad([y, state], leaves, [move(dy), move(dstate)])
        return [t.detach().cpu().double() for t in (y, state, *gradients)]

    def kernel(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        starts = reset.to(device, torch.uint8).contiguous()
        y, state, _ = getattr(torch.ops.rwkv, f"wkv{version}")(*leaves, starts, chunked)
        return y, state

    reference = {6: recurrent6, 7: recurrent7}[version]
    want = results(lambda *leaves: reference(*leaves, reset), torch.Tensor.double)
    got = results(kernel, lambda t: t.to(device, copy=True))
    return worst_of(got, want)


def elementwise_error(device: str) -> float:
    """Return the error of the elementwise functions in fp32."""
    return worst([_error_of(name, device) for name in _functions()])


def _functions() -> dict[str, tuple[Callable, int, list[tuple[int, ...]]]]:
    """Map name -> (function of native, activations, reset and vectors; activations; the vectors' shapes)."""
    channels, heads = (WIDTH,), (HEADS, WIDTH // HEADS)
    return {
        "shift_mix": (
            lambda on, z, reset, *v: elementwise.shift_mix(
                z, z[:, 0], reset, [*v], on, ranks=[RANK, 0, RANK, RANK, RANK, 0]
            ),
            1,
            [channels] * 6,
        ),
        "shift_mix_low_rank": (
            lambda on, z, q, reset, maps, *v: elementwise.shift_mix_low_rank(
                z, z[:, 0], reset, [*v], q[:, :, :7].reshape(-1, 7).expand(5, -1, 7), maps, on, [RANK] * 5
            ),
            2,
            [(5, 7, WIDTH), *[channels] * 5],
        ),
        "gated": (lambda on, x, gate, _: elementwise.gated(x, gate, on), 2, []),
        "value_residual": (
            lambda on, v, first, gate, _: elementwise.value_residual(v, first, gate, on),
            3,
            [],
        ),
        "delta_inputs": (
            lambda on, k, a, _, *v: elementwise.delta_inputs(k, a, *v, HEADS, on),
            2,
            [channels] * 2,
        ),
        "readout6": (
            lambda on, y, g, _, *v: elementwise.readout6(y, g, *v, HEADS, EPS, on, RANK),
            2,
            [channels] * 2,
        ),
        "readout7": (
            lambda on, y, r, k, v, g, _, *w: elementwise.readout7(y, r, k, v, g, *w, EPS, on),
            5,
            [heads, channels, channels],
        ),
        "add_layer_norm": (
            lambda on, x, mixed, _, *v: elementwise.add_layer_norm(x, mixed, *v, EPS, on),
            2,
            [channels] * 2,
        ),
        "relu_squared": (lambda on, x, _: elementwise.relu_squared(x, on, RANK), 1, []),
    }


def _error_of(name: str, device: str) -> float:
    function, activations, vectors = _functions()[name]
    generator = torch.Generator().manual_seed(0)
    shapes = [(ROWS, TOKENS, WIDTH)] * activations + vectors
    numbers = [torch.randn(shape, generator=generator) for shape in shapes]
    reset = torch.arange(TOKENS).expand(ROWS, TOKENS) == 21

    def results(native: str, move: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaves = [move(x) for x in numbers]
        for x in leaves[:activations]:
            x.requires_grad_()
        there = reset.to(leaves[0].device)
        out = function(native, *leaves[:activations], there, *leaves[activations:])
        out = [*out] if isinstance(out, (list, tuple)) else [out]
        out += [getattr(y, "shard_sums", shard_sum(y, RANK)) for y in out]
        weights = [torch.linspace(-1, 1, y.numel()).view(y.shape).to(y) for y in out]
        gradients = torch.autograd.grad(out, leaves[:activations], weights)
        return [t.detach().cpu().double() for t in (*out, *gradients)]

    want = results("", torch.Tensor.double)
    got = results(device, lambda x: x.to(device, copy=True))
    return worst_of(got, want)
