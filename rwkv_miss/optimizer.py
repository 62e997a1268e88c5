"""Parameter groups of an optimizer: which tensors are trained, at which rate, with which weight decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .adapter import adapted_linears
from .adapter_file import adapter_tensors
from .wrappers import unwrapped


def parameter_groups(
    model: nn.Module, lr: float | Callable[[str], float], weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Make an optimizer's groups over the trainable parameters; each has `params`, `lr` and `weight_decay`.

    lr: the rate, or a function of a parameter's name. A method may multiply the rate of its tensors (LoRA+).
    Tensors that layers share are called shared.NAME, as in the adapter file.

    Weight decay acts on matrices named `.weight`, and on the adapter's matrices, which it pulls towards the
    base. It does not act on PiSSA's matrices, because PiSSA at zero is not the base, nor on vectors and other
    tensors.
    """
    model = unwrapped(model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    factors: dict[int, float] = {}
    decaying: set[int] = set()
    for layer in adapted_linears(model).values():
        for key, tensor in layer.own_tensors().items():
            factors[id(tensor)] = layer.rate_factor(key)
            if layer.decays:
                decaying.add(id(tensor))
    for name, p in adapter_tensors(model).items():
        if not p.requires_grad:
            continue
        rate = (lr(name) if callable(lr) else lr) * factors.get(id(p), 1.0)
        decays = p.dim() >= 2 and (name.endswith(".weight") or id(p) in decaying)
        groups.setdefault((rate, weight_decay if decays else 0.0), []).append(p)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]
