"""Adapters that are turned off inside a block."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import nn

from .adapter import AdapterLinear, adapted_linears, trained_outside_linears
from .disabled_layers import KEY, disabled_here
from .errors import UserError
from .sharding import is_sharded
from .targets import put_parameters
from .wrappers import unwrapped

_SWITCHING = threading.Lock()


def _switch(layers: list[AdapterLinear], here: dict[int, int], by: int) -> None:
    """Begin (by=1) or end (by=-1) a block of disabled(). Outside of blocks a layer has its usual forward."""
    for layer in layers:
        here[id(layer)] = here.get(id(layer), 0) + by
        if not here[id(layer)]:
            del here[id(layer)]
        layer.blocks += by
        if by == layer.blocks == 1:
            layer.outside = layer.__dict__.get("forward")
            layer.forward = layer.forward_here
        elif not layer.blocks:
            layer.__dict__.pop("forward", None)
            if layer.outside is not None:
                layer.forward = layer.outside


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Turn the adapters off inside the block: adapted linears compute as in the base.

    That holds in this thread, in a backward that it calls, and in DataParallel's replicas; for other threads
    nothing changes. The tensors that inject(train_parts=...) trains as a whole have their first values
    inside, in all threads. Raises UserError where other parameters are trained, because their first values
    are not in the model; also for a merged model, and for whole tensors that are sharded.
    """
    model = unwrapped(model)
    injection, layers = getattr(model, "injection", None), list(adapted_linears(model).values())
    first = injection.first if injection else {}
    trained = trained_outside_linears(model)
    if not layers and not first or trained.keys() - first.keys():
        raise UserError(
            "disabled() gives back the base of adapted linears and of train_parts only; this model "
            + (f"trains {min(trained.keys() - first.keys())}, too" if layers or first else "has none")
        )
    if injection and injection.kept is not None:
        raise UserError("the adapter is merged into the model; call rwkv_miss.unmerge(model) first")
    if any(map(is_sharded, trained.values())):
        raise UserError(f"{min(trained)} is sharded, and its first value is not; load the base a second time")
    here = disabled_here()  # looked up once, because another thread may end the block
    torch._C._stash_obj_in_tls(KEY, here)
    with _SWITCHING:
        if first and not injection.blocks:
            injection.replaced = put_parameters(model, first)
        if first:
            injection.blocks += 1
        _switch(layers, here, 1)
    try:
        yield
    finally:
        with _SWITCHING:
            _switch(layers, here, -1)
            if first:
                injection.blocks -= 1
            if first and not injection.blocks:
                replaced, injection.replaced = injection.replaced, {}
                put_parameters(model, replaced)
