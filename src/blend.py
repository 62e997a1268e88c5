"""Base + adapters with weights as a live model: every adapter's own forward, as in training, and no merged weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rwkv_miss.adapter import METHODS, AdapterLinear, put_linears
from rwkv_miss.inject import fit_adapter

from .adapters import find, put, zeros_of
from .model import RWKV


class BlendedLinear(nn.Module):
    """y = W x + sum of w_i (f_i(x) - W x) with the forward f_i of each adapter's layer; f(x) itself for one adapter of weight 1."""

    def __init__(self, linear: nn.Linear, layers: list[tuple[AdapterLinear, float]]):
        super().__init__()
        self.linear = linear
        self.layers = nn.ModuleList(layer for layer, _ in layers)
        self.weights = [weight for _, weight in layers]

    def forward(self, x: Tensor) -> Tensor:
        if self.weights == [1]:
            return self.layers[0](x)
        y = self.linear(x)
        for layer, weight in zip(self.layers, self.weights):
            y = y + weight * (layer(x) - layer.base_forward(x))
        return y

    def merged(self) -> Tensor:
        """W + sum of w_i delta_i, (out, in) fp32."""
        weight = self.linear.weight.to(torch.promote_types(self.linear.weight.dtype, torch.float32), copy=True)
        for layer, factor in zip(self.layers, self.weights):
            weight.add_(layer.delta(), alpha=factor)
        return weight


@torch.no_grad()
def blend(model: RWKV, adapters: Sequence[tuple[str, float]]) -> dict[str, BlendedLinear]:
    """Put adapter files with weights onto a model, in place, whichever base they name; returns the changed linears by name. UserError for files
    that do not fit. Whole tensors T become base + sum of w_i (T_i - base), fp32, as they are in training."""
    linears: dict[str, list[tuple[AdapterLinear, float]]] = {}
    whole: dict[str, list[tuple[Tensor, float]]] = {}
    for path, weight in adapters:
        with torch.device("meta"):
            shapes = RWKV(model.arch)
        own, replaced, metadata = fit_adapter(shapes, path, force=True)
        cls = METHODS[metadata["method"]]
        for name, tensors in own.items():
            frozen = nn.Parameter(model.get_submodule(name).weight.detach(), requires_grad=False)  # its own, as PiSSA gives it another value
            layer = cls.wrap(frozen, None, cls.Options.parse(metadata["options"]).at(name), {key: tensors[key] for key in cls.shared}).eval()
            layer.assign(tensors)
            layer.prepare()
            linears.setdefault(name, []).append((layer, weight))
        for name, tensor in replaced.items():
            whole.setdefault(name, []).append((tensor, weight))
    for name, values in whole.items():
        base = find(model, name)
        base = zeros_of(model, name) if base is None else base.detach().to(torch.promote_types(base.dtype, torch.float32))
        change = sum(weight * (tensor.to(base.dtype).reshape(base.shape) - base) for tensor, weight in values)
        put(model, name, base + change)
    blended = {name: BlendedLinear(model.get_submodule(name), layers) for name, layers in linears.items()}
    put_linears(model, blended)
    return blended


@torch.no_grad()
def merge_blended(model: RWKV, blended: dict[str, BlendedLinear]) -> None:
    """The linears of a blended model become plain ones, of W + sum of w_i delta_i in fp32 and not rounded."""
    for name, layer in blended.items():
        layer.linear.weight = nn.Parameter(layer.merged(), requires_grad=False)
        put_linears(model, {name: layer.linear})
