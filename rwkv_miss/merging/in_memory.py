"""Merge of an adapter into the model in memory, with the same sums and single rounding as a merged file."""

from __future__ import annotations

import types

import torch
from torch import nn

from ..adapter import AdapterLinear, adapted_linears
from ..errors import UserError
from ..quantised import is_of_others
from ..sharding import is_sharded
from ..targets import put_parameters, renewing, take_off
from ..wrappers import injected
from .rounding import round_to


def merge(model: nn.Module, keep_base: bool = True) -> None:
    """Merge the model's adapter into its weights, in place, each rounded once to its own dtype.

    The merged weights are merge_file()'s, bit for bit, except with PiSSA, whose base is rounded in memory.
    Whole tensors have the base's dtype. A forward costs what the base's costs. A forward in training is a
    UserError, because no gradient would reach the adapter; save_adapter() still writes the adapter.

    keep_base: keep a copy of the base's weights, for unmerge(). With False a merge needs the memory of one
    weight more, and afterwards only unload() is possible.

    Raises UserError for weights that are quantised, sharded or on the meta device, and for a value beyond
    fp16's range. With keep_base the model is unchanged after the error; without it save_adapter() still
    works, and unload() is refused.
    """
    injection, layers = (model := injected(model)).injection, adapted_linears(model)
    if injection.kept is not None:
        raise UserError("the adapter is merged already; call unmerge(model) or unload(model)")
    for name, layer in layers.items():
        _check(layer.key(name), layer.stored)
    parameters, rounded = dict(model.named_parameters(remove_duplicate=False)), {}
    for name, dtype in injection.dtypes.items():
        _check(name, p := parameters[name])
        rounded[name] = nn.Parameter(round_to(name, p.detach(), dtype), requires_grad=False)
    injection.kept = {}
    try:
        with torch.no_grad(), renewing(layers.values()):
            for name, layer in layers.items():
                merged = round_to(layer.key(name), layer.changed_weight(), layer.stored.dtype)
                injection.kept.setdefault(layer.key(name), layer.stored.data if keep_base else None)
                layer.put_matrix(merged)
                layer.forward = types.MethodType(AdapterLinear.merged_forward, layer)
            injection.kept |= put_parameters(model, rounded)
    except BaseException:  # also for an interrupt: only some layers would be merged
        injection.half_merged = bool(injection.kept) and not keep_base
        if not injection.half_merged:
            unmerge(model)
        raise


def _check(name: str, tensor: torch.Tensor) -> None:
    """Raise UserError for a tensor that can't be merged in this process."""
    quantised = is_of_others(tensor) or not tensor.is_floating_point()
    elsewhere = is_sharded(tensor) or not tensor.numel()
    if quantised or elsewhere or tensor.is_meta:
        what = (
            "quantised" if quantised else "shared out over processes" if elsewhere else "on the meta device"
        )
        raise UserError(f"{name} is {what}; save the adapter and merge the files instead (merge_file)")


def unmerge(model: nn.Module) -> None:
    """Undo merge(): the base's weights are back, bit for bit, and the layers add the adapter again."""
    injection, layers = (model := injected(model)).injection, adapted_linears(model)
    if injection.kept is None:
        raise UserError("the adapter is not merged; call merge(model) first")
    kept, injection.kept = injection.kept, None
    if lost := next((key for key, before in kept.items() if before is None), ""):
        injection.kept = kept
        raise UserError(f"merge(keep_base=False) did not keep {lost}; load the base again")
    for name, layer in layers.items():
        if (before := kept.get(layer.key(name))) is not None:
            layer.stored.data = before.to(layer.stored.device)
            layer.__dict__.pop("forward", None)
    put_parameters(model, {name: kept[name] for name in injection.dtypes if name in kept})


@torch.no_grad()
def unload(model: nn.Module) -> nn.Module:
    """Take the adapter off: plain modules again, with the merged weights if it is merged, else the base's.

    The base is as it was before inject(), bit for bit, with the same names and the same parameters trained;
    with PiSSA, which changed the weights, the last bits may differ. Whole tensors keep their trained values
    unless inject(train_parts=..., keep_first=True) kept the first ones. Returns the model.
    """
    injection, layers = (model := injected(model)).injection, adapted_linears(model)
    if injection.half_merged:
        raise UserError("merge(keep_base=False) failed amid the layers; load the base again")
    if injection.kept is None:
        for name, layer in layers.items():
            if not is_of_others(layer.stored):  # another package's module is back with its own weight
                _check(layer.key(name), layer.stored)
        with renewing(layers.values()):
            for layer in layers.values():
                layer.revert()
        put_parameters(model, injection.first)
        for name, before in injection.statistics.items():
            model.get_buffer(name).copy_(before)
    take_off(model, layers)
    for name, p in model.named_parameters():
        p.requires_grad_(name in injection.trained_before)
    del model.injection
    return model
