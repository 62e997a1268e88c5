"""The self-test of the native elementwise functions of a device, beside that of WKV in native.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import elementwise, native
from .elementwise import native_functions

# a length that is no multiple of a block
B, T, C, HEADS, EPS = 2, 37, 128, 2, 64e-5


def self_error(device: str) -> float:
    """The largest relative error (rms) of outputs and gradients in fp32, against plain torch in float64."""
    return native.worst([_error(name, device) for name in _functions()])


def _functions() -> dict[str, tuple[Callable, int, list[tuple[int, ...]]]]:
    """name -> (function of native, activations, reset and vectors; activations; shapes of the vectors)."""
    channels, heads = (C,), (HEADS, C // HEADS)
    return {
        "shift_mix": (
            lambda on, z, reset, *v: elementwise.shift_mix(z, z[:, 0], reset, [*v], on),
            1,
            [channels] * 6,
        ),
        "shift_mix_low_rank": (
            lambda on, z, q, reset, maps, *v: elementwise.shift_mix_low_rank(
                z, z[:, 0], reset, [*v], q[:, :, :7].reshape(-1, 7).expand(5, -1, 7), maps, on
            ),
            2,
            [(5, 7, C), *[channels] * 5],
        ),
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
            lambda on, y, g, _, *v: elementwise.readout6(y, g, *v, HEADS, EPS, on),
            2,
            [channels] * 2,
        ),
        "readout7": (
            lambda on, y, r, k, v, g, _, *w: elementwise.readout7(y, r, k, v, g, *w, EPS, on),
            5,
            [heads, channels, channels],
        ),
        "relu_squared": (lambda on, x, _: elementwise.relu_squared(x, on), 1, []),
    }


def _error(name: str, device: str) -> float:
    function, activations, vectors = _functions()[name]
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, T, C)] * activations + vectors
    numbers = [torch.randn(shape, generator=generator) for shape in shapes]
    reset = torch.arange(T).expand(B, T) == 21

    def results(on: int, move: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaves = [move(x) for x in numbers]
        for x in leaves[:activations]:
            x.requires_grad_()
        there = reset.to(leaves[0].device)
        out = function(on, *leaves[:activations], there, *leaves[activations:])
        out = [*out] if isinstance(out, (list, tuple)) else [out]
        weights = [torch.linspace(-1, 1, y.numel()).view(y.shape).to(y) for y in out]
        gradients = torch.autograd.grad(out, leaves[:activations], weights)
        return [t.detach().cpu().double() for t in (*out, *gradients)]

    want = results(0, torch.Tensor.double)
    got = results(native_functions(device), lambda x: x.to(device, copy=True))
    return native.worst([((a - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True)])


native.ALSO_TESTED.append(self_error)
