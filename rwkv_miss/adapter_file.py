"""Content of an adapter file: its tensors by name, and its metadata."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .adapter import METHODS, AdapterLinear, adapted_linears
from .errors import UserError
from .files.checkpoint import refuse_run_checkpoint
from .files.model_files import read_model
from .files.untrusted import check_sums
from .methods.whole_tensors import PARTS, state_names
from .progress import print_notes
from .targets import views_of

ADAPTER_FORMAT = "rwkv-miss adapter"
# the fields of an adapter file's metadata, and their types
FIELDS = {
    "method": str,
    "options": dict,
    "linears": list,
    "targets": list,
    "train_parts": list,
    "layers": list,
    "tokens": list,
    "merged_linears": list,
    "tied": dict,
    "views": dict,
    "arch": dict,
    "base": str,
    "model_class": str,
    "base_fingerprint": str,
    "weights_fingerprint": str,
    "versions": dict,
    "tokenizer": str,
    "eod": str,
    "template": str,
    "bos": list,
}
# type of the items of a list; other lists hold names of tensors
ITEMS = {"bos": int, "layers": int, "tokens": int}
REQUIRED = ("method", "options", "linears")
# the value of a field that a file leaves out; `tied`: another name of a whole tensor -> its name in the file
DEFAULTS = {
    "targets": [],
    "train_parts": [],
    "layers": None,
    "tokens": [],
    "merged_linears": [],
    "tied": {},
    "views": {},
    "arch": None,
    "base": None,
    "model_class": None,
    "base_fingerprint": None,
    "weights_fingerprint": None,
    "versions": {},
}


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of an adapter file: what the method added, and every other trained parameter.

    Tensors that linears share are `shared.NAME`.
    """
    tensors: dict[str, Tensor] = {}
    own: set[int] = set()
    for name, layer in adapted_linears(model).items():
        for key, tensor in layer.own_tensors().items():
            tensors[name_in_file(layer, name, key)] = tensor
            own.add(id(tensor))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in own}
    # as in released files, the initial states of all layers are in a file, also those that are not trained
    if any(name.endswith(".time_state") for name in trained):
        trained |= {name: model.get_parameter(name) for name in state_names(model)}
    return {**tensors, **trained}


def name_in_file(layer: AdapterLinear, name: str, key: str) -> str:
    shared = layer.shared_names(layer.out_features, layer.in_features)
    return f"shared.{shared[key]}" if key in shared else f"{name}.{key}"


def by_owner(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Map name of a module -> its tensors, by their names in the module."""
    owned: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        owner, _, leaf = key.rpartition(".")
        owned.setdefault(owner, {})[leaf] = tensor
    return owned


def layer_tensors(
    cls: type[AdapterLinear], name: str, shape: tuple[int, int], owned: dict[str, dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Select one adapted linear's tensors from an adapter file, by their names in the layer; shape (out, in).

    Shared tensors are included. owned: by_owner() of the file's tensors.
    """
    own = {leaf: tensor for leaf, tensor in owned.get(name, {}).items() if leaf != "bias"}
    for key, of in cls.shared_names(*shape).items():
        owner, _, leaf = f"shared.{of}".rpartition(".")
        tensor = owned.get(owner, {}).get(leaf)
        if tensor is None:
            raise UserError(
                f"the adapter has no shared.{of}, which a linear of {shape[1]} inputs and {shape[0]} outputs"
                " needs"
            )
        if not tensor.is_floating_point():
            raise UserError(f"shared.{of} is {tensor.dtype}; expected are fp32, bf16 or fp16")
        own[key] = tensor
    return own


def read_described(
    path: str | os.PathLike[str], shown: bool = True, any_folder: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and metadata of any model or adapter file, or of a model's folder; {} without metadata.

    shown: say on stderr which wrapping of a trainer was taken off. any_folder: see read_model().

    A file with initial states alone, as other projects release them, is read as an adapter of the method
    "state" without a known base.
    """
    tensors, metadata, notes, _ = read_model(path, any_folder)
    if shown:
        print_notes(notes)
    if metadata is None and tensors and all(re.fullmatch(PARTS["state"], name) for name in tensors):
        metadata = {"format": ADAPTER_FORMAT, "method": "state", "options": {}, "linears": [], **DEFAULTS}
    return tensors, metadata or {}


def checked_metadata(path: str | os.PathLike[str], metadata: dict[str, Any]) -> dict[str, Any]:
    """Check and complete an adapter file's metadata. Raises UserError for a missing or wrong field."""
    version = metadata.get("format_version", 1)
    if version not in (1, 2, 3):
        raise UserError(f"{path} has format_version {version!r}, this package reads 1 to 3; update it")
    for name, kind in FIELDS.items():
        value = metadata.get(name)
        item_kind = ITEMS.get(name, str)
        sound = isinstance(value, kind) and (
            kind is not list or all(type(item) is item_kind for item in value)
        )
        if not sound and (value is not None or name in REQUIRED):
            listed = "a list of names" if item_kind is str else "a list of numbers"
            wanted = listed if kind is list else kind.__name__
            raise UserError(f"{path} is damaged: its {name} is {str(value)[:60]!r}, expected {wanted}")
    tokens = metadata.get("tokens") or []
    if tokens != sorted({*tokens}) or min(tokens, default=0) < 0:
        raise UserError(
            f"{path} is damaged: its tokens are {str(tokens)[:60]}, expected ids of 0 or more, each once, in"
            " their order"
        )
    for name, view in (metadata.get("views") or {}).items():
        kinds = {"key": (str,), "transposed": (bool,), "index": (int, type(None)), "lookup": (bool,)}
        if not (
            isinstance(view, dict)
            and view.keys() == kinds.keys()
            and all(type(view[k]) in kinds[k] for k in kinds)
            and (view["index"] or 0) >= 0
        ):
            raise UserError(
                f"{path} is damaged: the view of {name} is {str(view)[:60]!r}, expected key, transposed,"
                " lookup, and an index of 0 or more, or none"
            )
    places: dict[tuple, str] = {}
    for name, view in views_of({**metadata, "views": metadata.get("views") or {}}).items():
        other = places.setdefault((view.key, view.index), name)
        if other != name:
            raise UserError(
                f"{path} is damaged: {other} and {name} are the same matrix of {view.key}, expected one"
                " linear for each"
            )
    for other, name in (metadata.get("tied") or {}).items():
        if not isinstance(name, str):
            raise UserError(
                f"{path} is damaged: {other} is tied to {str(name)[:60]!r}, expected the name of a tensor"
            )
    return {
        **DEFAULTS,
        **{name: value for name, value in metadata.items() if value is not None or name not in DEFAULTS},
    }


def read_adapter(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and metadata of an adapter file. Raises UserError for any other file."""
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder, and an adapter's file is expected; a model's folder is a base")
    tensors, metadata = read_described(path)
    refuse_run_checkpoint(path, metadata)
    if metadata.get("format") != ADAPTER_FORMAT:
        raise UserError(
            f"{path} is not an adapter file: it has no adapter metadata. It may be a base or a merged model,"
            " or another project's adapter, of which python -m rwkv_miss convert makes one"
        )
    metadata = checked_metadata(path, metadata)
    if metadata["method"] not in METHODS:
        raise UserError(
            f"{path} was made with method {metadata['method']!r}; there are: {', '.join(sorted(METHODS))}"
        )
    check_sums(path)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.itemsize == 1:
            raise UserError(f"{path}: {name} is {tensor.dtype}; expected are fp32, bf16 or fp16")
    return tensors, metadata
