"""Adapters in files: what was trained is saved, and loaded onto a model that it fits."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import METHODS, adapted_linears, share
from .adapter_file import ADAPTER_FORMAT, adapter_tensors, by_owner, name_in_file, read_adapter
from .errors import UserError, listed
from .files.checkpoint import Arch, check_finite, write_checkpoint
from .files.file_kinds import may_replace
from .files.safetensors_io import is_safetensors
from .fit import check_layer, check_whole, refuse_other_base, refuse_other_weights
from .inject import Injection, attach, keep_first_values, statistics_of
from .methods.token_rows import layers_of_rows, method_of
from .methods.whole_tensors import PARTS, in_parts, state_names
from .progress import print_notes
from .sharding import class_of, gathered, is_sharded, local, put, require_whole, reshard, unsharded
from .target_checks import SharedMemory, refuse_unfit
from .targets import Target, View, all_targets, put_parameters, renewing, take_off, views_of
from .wrappers import injected, unwrapped


def _moved_statistics(model: nn.Module) -> dict[str, Tensor]:
    before = model.injection.statistics
    return {
        name: t
        for name, t in statistics_of(model).items()
        if name in before and not torch.equal(t.to(before[name]), before[name])
    }


@contextlib.contextmanager
def _trained(model: nn.Module) -> Iterator[None]:
    """Put the trained tensors that merge() has replaced back inside the block."""
    kept = model.injection.kept or {}
    whole = {name: value for name, value in kept.items() if isinstance(value, nn.Parameter)}
    linears = {  # adapted linears whose own weight is trained, too
        name: p for name, p in model.named_parameters() if p.requires_grad and name in kept.keys() - whole
    }
    if lost := next((name for name in linears if kept[name] is None), ""):
        raise UserError(
            f"{lost} is trained as well as its adapter, and merge(keep_base=False) did not keep it; save the"
            " adapter before such a merge"
        )
    merged, values = put_parameters(model, whole), {name: p.data for name, p in linears.items()}
    for name, p in linears.items():
        p.data = kept[name].to(p.device)
    try:
        yield
    finally:
        put_parameters(model, merged)
        for name, p in linears.items():
            p.data = values[name]


@torch.no_grad()
def _file_content(model: nn.Module) -> tuple[dict[str, Tensor], list[str], dict[str, str]]:
    """Return (tensors of an adapter file, linears with an adapter there, other names of tied tensors).

    A linear whose own weight is trained, too, is in the file as a whole tensor, weight plus change. Tensors
    that share memory with a trained one have changed with it, and are in the file as well.
    """
    tensors, linears = adapter_tensors(model), list(model.injection.linears)
    tied: dict[str, str] = {}
    memory = SharedMemory(model)
    everything = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for name in [name for name in tensors if name in everything]:
        for other in memory.overlapping(name, everything[name]):
            if _place(everything[other]) == _place(everything[name]):
                tied[other] = name
            else:
                tensors[other] = everything[other]
    layers = adapted_linears(model)
    merged = {name: layer for name, layer in layers.items() if layer.stored.requires_grad}
    needed: set[str] = set()  # tensors of the linears that keep their adapter
    for name, layer in layers.items():
        if name not in merged:
            needed |= {name_in_file(layer, name, key) for key in layer.own_tensors()}
    for name, layer in merged.items():
        for key in {name_in_file(layer, name, key) for key in layer.own_tensors()} - needed:
            tensors.pop(key, None)  # a shared tensor may have been popped with an earlier linear
        with unsharded(layer):
            key, value = layer.key(name), layer.base_weight() + layer.delta()
            if layer.view is None:
                tensors[key] = value
            else:
                tensors[key] = tensors[key].detach().to(value.dtype, copy=True)
                layer.view.of(tensors[key]).copy_(value)
        linears.remove(name)
    return {**tensors, **_moved_statistics(model)}, linears, tied


def _place(tensor: Tensor) -> tuple:
    tensor = local(tensor)
    return tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def _arch(model: nn.Module) -> Arch | None:
    """Return an RWKV's sizes; in another project's model `arch` may be anything."""
    return model.arch if isinstance(getattr(model, "arch", None), Arch) else None


def save_adapter(model: nn.Module, path: str | os.PathLike[str], **metadata: Any) -> None:
    """Write the trained tensors and the metadata that load and merge need, whole or not at all.

    path: a `.pth`, or a `.safetensors` with the metadata in its header.

    If the model is sharded over processes, all of them must call this; the first one writes.

    model: may be wrapped by torch.compile, DistributedDataParallel, DataParallel or DeepSpeed.
    metadata: keywords such as step and tokenizer, which are added. Raises UserError for a keyword that names
    a fact of the adapter, and if `path` is a model, which would be overwritten.
    """
    model = injected(model)
    injection: Injection = model.injection
    may_replace(path, ADAPTER_FORMAT)
    require_whole(model)
    reshard(model)
    with _trained(model):
        tensors, linears, tied = _file_content(model)
    views = {
        name: dataclasses.asdict(layer.view) for name, layer in adapted_linears(model).items() if layer.view
    }
    merged = injection.merged_linears + [name for name in injection.linears if name not in linears]
    described = {
        "format": ADAPTER_FORMAT,
        # an older version of this package would merge views, or rows of tokens, wrongly
        "format_version": 3 if injection.tokens else 2 if views else 1,
        "views": views,
        "method": injection.method,
        "options": injection.options,
        "layout": injection.options.get("layout"),
        "linears": linears,
        "merged_linears": merged,
        "tied": tied,
        "targets": injection.targets,
        "train_parts": injection.train_parts,
        "layers": injection.layers,
        "tokens": injection.tokens,
        "trainable": injection.trainable,
        "arch": arch.to_dict() if (arch := _arch(model)) else None,
        "base": _base_name(model),
        "model_class": "{0.__module__}.{0.__qualname__}".format(class_of(model)),
        "base_fingerprint": getattr(model, "base_fingerprint", None),
        "weights_fingerprint": None if merged else injection.weights,
    }
    if reserved := sorted(described.keys() & metadata.keys()):
        raise UserError(
            f"save_adapter(..., {reserved[0]}=...) would overwrite what the file says about the adapter; name"
            " your field otherwise"
        )
    described["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
    described |= metadata
    if not any(map(is_sharded, model.parameters())):
        _write(path, tensors, described)
        return
    tensors = {name: gathered(tensor.detach()).cpu() for name, tensor in tensors.items()}
    try:
        if torch.distributed.get_rank() == 0:
            _write(path, tensors, described)
    finally:
        torch.distributed.barrier()  # no process goes on before the file exists


def _base_name(model: nn.Module) -> str | None:
    """Name the model's file, or the folder or the hub's model that transformers loaded."""
    base_name = getattr(model, "base_name", None)
    return base_name or getattr(getattr(model, "config", None), "_name_or_path", None) or None


def _write(path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    if not os.fspath(path).endswith(".safetensors"):
        write_checkpoint(path, tensors.items(), metadata)
        return
    from .convert import Adapter, own_files  # the formats of all projects come too, and no training has one

    own_files.Safetensors.write(Adapter(tensors, metadata), path)


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read an adapter's tensors and metadata: our file, a .safetensors, or a folder such as peft's."""
    if not (os.path.isdir(path) or is_safetensors(path)):
        return read_adapter(path)
    from .convert import read_any

    adapter = read_any(path)[1]
    print_notes(adapter.notes)
    return adapter.tensors, adapter.metadata


@torch.no_grad()
def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    force: bool = False,
    keep_first: bool = True,
    content: tuple[dict[str, Tensor], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Put a saved adapter onto a model, injecting it first where needed; returns the file's metadata.

    path: a file of save_adapter(), or a folder that peft saved.

    Training can go on, and save_adapter() writes everything again: the file's whole tensors require
    gradients as the adapter's tensors do. If the model is sharded over processes, all of them must call this.

    Raises UserError for an adapter trained on another base, unless `force`, and for a missing layer or a
    wrong shape. keep_first: see inject(). content: the file's tensors and metadata, if it was read already.
    """
    is_new = not hasattr(unwrapped(model), "injection")
    model = unwrapped(model, to_inject=is_new)
    if hasattr(model, "injection") and model.injection.kept is not None:
        raise UserError("an adapter is merged into the model; call rwkv_miss.unmerge(model) first")
    if empty := next((name for name, p in model.named_parameters() if p.is_meta), ""):
        raise UserError(
            f"{empty} is on the meta device, where the adapter's values would be lost; give the model its own"
            " values first, with load_state_dict(assign=True) or to_empty()"
        )
    require_whole(model)
    linears, replaced, metadata = fit_adapter(model, path, force, content)
    if is_new:
        keep_first_values(model, keep_first)
    reshard(model)
    with renewing(adapted_linears(model).values()):
        for name, own in linears.items():
            layer = model.get_submodule(name)
            with unsharded(layer):
                layer.load(own)
    own = _replaceable(model)
    for name, tensor in replaced.items():
        if own[name].requires_grad or is_sharded(own[name]):
            put(own[name], tensor.view(own[name].shape))
        else:  # a base tensor gets new memory: the old one may belong to a file or to another model
            if keep_first and isinstance(own[name], nn.Parameter):
                model.injection.first[name] = nn.Parameter(own[name].data, requires_grad=False)
            own[name].data = tensor.view_as(own[name]).to(own[name], copy=True)
        if not re.fullmatch(PARTS["state"], name):  # some layers' initial states may be frozen
            own[name].requires_grad_(isinstance(own[name], nn.Parameter))
    return metadata


def _replaceable(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that a file's whole tensors may replace: parameters under all names, and buffers."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def fit_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    force: bool = False,
    content: tuple[dict[str, Tensor], dict[str, Any]] | None = None,
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, Any]]:
    """Return (tensors of each adapted linear by its name, whole tensors, metadata) of a file that fits.

    The model is injected where needed, and may be on the meta device. Raises UserErrors as in load_adapter().
    """
    tensors, metadata = content or _read(path)
    check_finite(tensors)
    refuse_other_base(
        path,
        metadata,
        getattr(model, "base_name", "this model"),
        _arch(model),
        lambda: getattr(model, "base_fingerprint", None),
        force=force,
    )
    tensors, metadata = _named_as_here(model, tensors, metadata)
    if not hasattr(model, "injection"):
        _inject_as_trained(model, path, tensors, metadata)
    if not force:
        base = _base_name(model) or "this model"
        refuse_other_weights(path, metadata, base, lambda: model.injection.weights)
    _check_same_adapter(model, path, tensors, metadata)
    whole, by_layer, owned = dict(tensors), {}, by_owner(tensors)
    for name, layer in adapted_linears(model).items():
        shape = layer.out_features, layer.in_features
        by_layer[name], _ = check_layer(path, name, shape, *method_of(metadata, name), owned)
        for key in layer.own_tensors():
            whole.pop(name_in_file(layer, name, key), None)
    parameters = _replaceable(model)
    for other, name in metadata["tied"].items():
        tied_here = parameters.get(other) is parameters.get(name)
        if name in whole and other in parameters and not tied_here:
            whole[other] = whole[name]
    check_whole(path, whole, parameters)
    return by_layer, whole, metadata


def _named_as_here(
    model: nn.Module, tensors: dict[str, Tensor], metadata: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Rename another project's linears to the layers of this model that change the same weights."""
    if hasattr(model, "injection"):
        layers = adapted_linears(model)
        here = {(layer.key(name), layer.view and layer.view.index): name for name, layer in layers.items()}
    else:
        here = {(target.view.key, target.view.index): name for name, target in all_targets(model).items()}
    views = views_of(metadata)
    names = {name: here.get((view.key, view.index), name) for name, view in views.items()}
    if all(name == new for name, new in names.items()):
        return tensors, metadata
    options = dict(metadata["options"])
    for option in [option for option, value in options.items() if isinstance(value, dict)]:
        options[option] = {names.get(name, name): part for name, part in options[option].items()}
    renamed = {}
    for key, tensor in tensors.items():
        owner, dot, leaf = key.rpartition(".")
        own = owner in names and leaf not in ("weight", "bias")
        renamed[f"{names[owner]}{dot}{leaf}" if own else key] = tensor
    described = {
        "options": options,
        "linears": [names[name] for name in metadata["linears"]],
        "views": {
            names[name]: dataclasses.asdict(view)
            for name, view in views.items()
            if not view.is_weight_of(names[name])
        },
    }
    return renamed, {**metadata, **described}


def _inject_as_trained(
    model: nn.Module, path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: dict[str, Any]
) -> None:
    """Inject the model as it was when the file was saved; its tensors have no values yet."""
    merged = metadata["merged_linears"]

    def find(model: nn.Module) -> dict[str, Target]:
        """Return the targets with exactly these names, and none whose name only ends so."""
        there, views = all_targets(model), metadata["views"]
        rows = layers_of_rows(metadata["tokens"], metadata["train_parts"])
        names = {*metadata["linears"], *merged}.difference(rows)
        if missing := sorted(names - there.keys()):
            raise UserError(f"{path} adapts layers that this model does not have: {listed(missing, 1)}")
        found = {name: target for name, target in there.items() if name in names}
        for name, target in found.items():
            if name in views and View(**views[name]) != target.view and "origin" not in metadata:
                raise UserError(
                    f"{path}: the weight of {name} is {View(**views[name])} there, and {target.view} in this"
                    " model; give it the base's model"
                )
        refuse_unfit(model, found)
        return found

    parts = metadata["train_parts"]
    if "origin" in metadata:  # another project's file may have a part's tensors in some layers only
        names = [*dict(model.named_parameters()), *state_names(model)]
        parts = [part for part in parts if tensors.keys() >= set(in_parts(names, [part]))]
    # including merged linears: options and shared tensors depend on the number and names of all linears
    layers = metadata["layers"]
    tokens = metadata["tokens"]
    attach(
        model, metadata["method"], find, ",".join(parts), metadata["options"], layers=layers, tokens=tokens
    )
    take_off(model, merged)
    share(adapted_linears(model).values())
    model.injection.targets, model.injection.merged_linears = metadata["targets"], merged
    model.injection.linears = [name for name in model.injection.linears if name not in merged]


def _check_same_adapter(
    model: nn.Module, path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: dict[str, Any]
) -> None:
    """Raise UserError unless the model's adapter has the file's method, options, linears and tensors."""
    # parsed, so that options that are newer than the file have their defaults
    options = dataclasses.asdict(METHODS[metadata["method"]].Options.parse(metadata["options"]))
    for name, there in (
        ("method", metadata["method"]),
        ("options", options),
        ("linears", metadata["linears"]),
        ("tokens", metadata["tokens"]),
    ):
        here = getattr(model.injection, name)
        # other projects' files list the linears in another order
        same = sorted(here) == sorted(there) if name == "linears" else here == there
        if not same:
            raise UserError(f"{path} has {name} {there}, the model carries an adapter with {here}")
    absent = [name for name in adapter_tensors(model) if name not in tensors]
    if absent:
        raise UserError(f"{path} lacks {listed(absent, 1)} of this model's adapter")
