"""Base model of an adapter, for conversions: the widths of its linears, and its identity."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from ..adapter import METHODS, AdapterLinear
from ..adapter_file import by_owner, read_described
from ..errors import UserError
from ..files.checkpoint import Arch
from ..files.hf_folder import is_folder
from ..files.identity import Identity, weights_fingerprint
from ..files.model_files import name_of
from ..files.stored_names import find_stored
from ..files.wrapped import is_model
from ..fit import check_layer, check_matrices, refuse_other_base, refuse_other_weights
from ..targets import views_of
from .formats import Adapter

# linear of a block -> its (out, in), as fields of Arch
RWKV_LINEARS = {
    "att.receptance": ("dim_att", "n_embd"),
    "att.key": ("dim_att", "n_embd"),
    "att.value": ("dim_att", "n_embd"),
    "att.gate": ("dim_att", "n_embd"),
    "att.output": ("n_embd", "dim_att"),
    "ffn.key": ("dim_ffn", "n_embd"),
    "ffn.value": ("n_embd", "dim_ffn"),
    "ffn.receptance": ("n_embd", "n_embd"),
    "head": ("vocab_size", "n_embd"),
}


class Base:
    """Model of any kind, a file or a folder: its tensors by their names in the loaded model."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        self.tensors = read_described(path, any_folder=True)[0]

    def find(self, names: Collection[str]) -> dict[str, Tensor]:
        """Return those named tensors that the model has, in the model's order.

        A stack of experts that a folder stores one by one is a tensor without values, on the meta device.
        """
        if not is_folder(self.path) or is_model(self.tensors):
            wanted = set(names)
            return {name: tensor for name, tensor in self.tensors.items() if name in wanted}
        found, order = {}, list(self.tensors)
        stored = find_stored(self.path, order, names)
        for name in sorted(stored, key=lambda name: order.index(stored[name].names[0])):
            parts = stored[name]
            first = self.tensors[parts.names[0]]
            if parts.experts:
                rows = sum(len(self.tensors[part]) for part in parts.experts[min(parts.experts)].values())
                found[name] = first.new_empty((len(parts.experts), rows, *first.shape[1:]), device="meta")
            elif len(parts.names) == 1:
                found[name] = first
        return found


def with_base(adapter: Adapter, path: str | os.PathLike[str]) -> Adapter:
    """Give the adapter a model, a file or a folder, as its base.

    Raises UserError if the adapter names another base, or if the base lacks one of the adapter's linears.
    """
    base = Base(path)
    identity = Identity(path, base.tensors)
    refuse_other_base("the adapter", adapter.metadata, path, None, lambda: identity.fingerprint)
    views = views_of(adapter.metadata)
    tensors = base.find({view.key: view for view in views.values()})
    check_matrices("the adapter", views.items(), tensors, path)
    weights = weights_fingerprint(tensors.values())
    refuse_other_weights("the adapter", adapter.metadata, path, lambda: weights)
    arch = Arch.record_of(base.tensors)
    about = {"base": name_of(path), "base_fingerprint": identity.fingerprint, "arch": arch}
    about["weights_fingerprint"] = weights
    shapes = {name: tuple(view.of(tensors[view.key]).shape) for name, view in views.items()}
    return dataclasses.replace(
        adapter, metadata={**adapter.metadata, **about}, base=os.fspath(path), shapes=shapes
    )


def linear_shapes(adapter: Adapter) -> dict[str, tuple[int, int]]:
    """Find (out, in) of each adapted linear.

    The widths come from the base, from the sizes in the adapter's metadata, or from tensors that have both
    widths. Raises UserError if none of these tells them.
    """
    if adapter.shapes:
        return adapter.shapes
    arch = adapter.metadata.get("arch")
    arch = arch and Arch.from_dict(arch)
    shapes = {}
    for name in adapter.metadata["linears"]:
        kind = name if name == "head" else ".".join(name.split(".")[2:])
        A, B = (adapter.tensors.get(f"{name}.lora_{factor}") for factor in "AB")
        if A is not None and B is not None and A.dim() == B.dim() == 2:
            shapes[name] = len(B), A.shape[1]
        elif arch and kind in RWKV_LINEARS:
            shapes[name] = tuple(getattr(arch, size) for size in RWKV_LINEARS[kind])
        else:
            raise UserError(
                f"the widths of {name} are in no file; give the model that the adapter belongs to,"
                " the base's file or folder: --base MODEL"
            )
    return shapes


def adapted_layers(adapter: Adapter) -> Iterator[tuple[str, AdapterLinear]]:
    """Yield each adapted linear by its name, with the adapter's tensors in fp32 and without a weight.

    Use the layers for low_rank() of methods that need no weight.
    """
    cls, options, owned = METHODS[adapter.method], adapter.options, by_owner(adapter.tensors)
    for name, shape in linear_shapes(adapter).items():
        tensors, _ = check_layer("the adapter", name, shape, cls, options.at(name), owned)
        weight = torch.zeros(1).expand(shape)  # one number in memory
        yield name, cls.of_file(weight, tensors, options.at(name))


def sha256(path: str | os.PathLike[str]) -> str:
    """Hash a file's bytes, in hex."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
