"""Layers and parameters in the places of a model's own, by their dotted names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from .targets import take_read


@contextlib.contextmanager
def renewing(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Let put_matrix() of these layers copy a weight that several have a part of, such as experts, once."""
    renewed = {}
    for layer in layers:
        layer.renewed = renewed
    try:
        yield
    finally:
        for layer in layers:
            layer.renewed = None


def take_off(model: nn.Module, names: Iterable[str]) -> None:
    """Put plain modules into the place of adapted layers."""
    for name in names:
        layer = model.get_submodule(name)
        if layer.owner is None:
            put_linears(model, {name: layer.plain()})
        else:
            take_read(layer.owner, layer.view)


def put_linears(model: nn.Module, linears: dict[str, nn.Linear]) -> None:
    """Replace the linears with these dotted names in a model."""
    for name, linear in linears.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, linear)


def put_parameters(
    model: nn.Module, parameters: Mapping[str, nn.Parameter | None]
) -> dict[str, nn.Parameter | None]:
    """Replace parameters of a model by their names; returns the old ones. None stands for no parameter.

    A parameter with several names is replaced under all of them.
    """
    before, places = {}, {}
    for module in model.modules() if parameters else ():
        for leaf, p in module._parameters.items():
            places.setdefault(id(p), []).append((module, leaf))
    for name, p in parameters.items():
        owner, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner)
        before[name] = old = owner._parameters[leaf]
        if p is not None and old is not None and p.device != old.device:
            p = nn.Parameter(p.to(old.device), p.requires_grad)
        for module, key in [(owner, leaf)] if old is None else places[id(old)]:
            module._parameters[key] = p
    return before
