"""Blended adapters: a live model of a base and weighted adapters, each with its own forward, none merged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rwkv_miss.adapter import AdapterLinear
from rwkv_miss.errors import UserError
from rwkv_miss.fit import check_whole
from rwkv_miss.merging.members import Member
from rwkv_miss.methods.whole_tensors import state_names
from rwkv_miss.targets import put_linears
from src.inference.adapters import put, zeros_of
from src.model import RWKV


class BlendedLinear(nn.Module):
    """y = V x + sum of w_i (f_i(x) - W x), with the forward f_i of each adapter's layer.

    For one adapter of weight 1, y is f(x). V is the base's weight W, unless another adapter has trained it as
    a whole (`moved`).
    """

    def __init__(self, linear: nn.Linear, layers: list[tuple[AdapterLinear, float]], moved: bool):
        super().__init__()
        self.linear = linear
        self.layers = nn.ModuleList(layer for layer, _ in layers)
        self.weights = [weight for _, weight in layers]
        self.alone = self.weights == [1] and not moved

    def forward(self, x: Tensor) -> Tensor:
        if self.alone:
            return self.layers[0](x)
        y = self.linear(x)
        for layer, weight in zip(self.layers, self.weights):
            y = y + weight * (layer(x) - layer.base_forward(x))
        return y

    def merged(self) -> Tensor:
        """Compute V + sum of w_i delta_i, (out, in) fp32."""
        exact = torch.promote_types(self.linear.weight.dtype, torch.float32)
        weight = self.linear.weight.to(exact, copy=True)
        for layer, factor in zip(self.layers, self.weights):
            weight.add_(layer.delta(), alpha=factor)
        return weight


@torch.no_grad()
def blend(model: RWKV, members: Sequence[Member]) -> dict[str, BlendedLinear]:
    """Put adapters with their weights onto a model, in place; returns the changed linears by name.

    The adapters may name other bases. Tensors T that were trained as a whole become base + sum of w_i
    (T_i - base), in fp32 as in training. Raises UserError for adapters that do not fit.
    """
    linears: dict[str, list[tuple[AdapterLinear, float]]] = {}
    whole: dict[str, list[tuple[Tensor, float]]] = {}
    states = {name: zeros_of(model, name) for name in state_names(model)}
    modules, tensors = dict(model.named_modules()), {**states, **dict(model.named_parameters())}
    for m in members:
        for name in m.metadata["linears"]:
            if not isinstance(modules.get(name), nn.Linear):
                raise UserError(f"{m.path} adapts {name}, which is no linear of this model")
            # detached, because a PiSSA layer replaces its weight
            _, layer = next(m.layers(f"{name}.weight", modules[name].weight.detach()))
            layer.eval()
            layer.prepare()
            linears.setdefault(name, []).append((layer, m.weight))
        check_whole(m.path, m.whole, tensors)
        for name, tensor in m.whole.items():
            whole.setdefault(name, []).append((tensor, m.weight))
    for name, values in whole.items():
        base = tensors[name].detach().to(torch.promote_types(tensors[name].dtype, torch.float32))
        change = sum(weight * (tensor.to(base.dtype).reshape(base.shape) - base) for tensor, weight in values)
        put(model, name, base + change)
    blended = {}
    for name, layers in linears.items():
        blended[name] = BlendedLinear(modules[name], layers, f"{name}.weight" in whole)
    put_linears(model, blended)
    return blended


@torch.no_grad()
def merge_blended(model: RWKV, blended: dict[str, BlendedLinear]) -> None:
    """Replace the linears of a blended model by plain ones with weight V + sum of w_i delta_i, fp32."""
    for name, layer in blended.items():
        layer.linear.weight = nn.Parameter(layer.merged(), requires_grad=False)
        put_linears(model, {name: layer.linear})
