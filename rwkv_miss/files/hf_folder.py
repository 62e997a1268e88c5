"""Hugging Face folders of RWKV-7: mapped, in one file or in several.

Two layouts have the same `model_type`; the names of the tensors tell which one it is. The official one has
the checkpoint's names, with `rwkv7.` before them, and its shapes. flash-linear-attention's has other names
and transposed low-rank maps, which are returned as views.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError, listed
from .hf_names import CONFIG, FLA_SIGN, INDEX, OFFICIAL, VALUE_RESIDUAL_FILE, plain_name, table
from .provenance import KEY, Entry, Provenance
from .safetensors_io import read_safetensors
from .tensor_map import VALUE_RESIDUAL, TensorMap, restore
from .untrusted import read_json
from .weight_files import of_all, read_weights, weight_files

MODEL_TYPE = "rwkv7"  # in config.json
LARGEST_DEPTH = 1 << 12  # layers
LN_EPS = 1e-5
# names of a norm's eps in configurations, and RWKV's value
EPS = {
    "norm_eps": LN_EPS,
    "layer_norm_eps": LN_EPS,
    "layer_norm_epsilon": LN_EPS,
    "group_norm_eps": 64 * LN_EPS,
    "group_norm_epsilon": 64 * LN_EPS,
}


class HfFolder(NamedTuple):
    """Model in a folder."""

    layout: str  # official or fla
    tensors: dict[str, Tensor]  # under the checkpoint's names, views of the mapped files
    provenance: Provenance | None  # the record in the files' header
    notes: list[str]  # messages for the user


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Tell whether a path is a folder with a model's config.json."""
    return os.path.isdir(path) and os.path.exists(os.path.join(path, CONFIG))


def refuse_file_of_folder(path: str | os.PathLike[str], names: Iterable[str]) -> None:
    """Raise UserError if the names of a file's tensors tell that it is a part of a Hugging Face folder."""
    if any(name == FLA_SIGN or name.startswith(OFFICIAL) for name in names):
        raise UserError(
            f"{path} belongs to a Hugging Face folder; give the folder, {os.path.dirname(path) or '.'}"
        )


def read_folder(path: str | os.PathLike[str]) -> HfFolder:
    """Read the model in a folder, with its low-rank maps as a checkpoint has them.

    Raises UserError for a folder of another model, for a file that is missing, truncated or outside of the
    folder, and for settings with which a checkpoint would compute something else.
    """
    path = os.fspath(path)
    config = read_config(path)
    if config.get("model_type") != MODEL_TYPE:
        raise UserError(
            f"{path} is a folder of {str(config.get('model_type'))[:60]!r}, expected {MODEL_TYPE}"
        )
    files, header = read_weights(path)
    stored = of_all(files)
    provenance = Provenance.found(header, path)
    if any(name.startswith(OFFICIAL) for name in stored):
        layout, tensors = "official", _official(path, config, stored)
    elif FLA_SIGN in stored:
        layout, tensors = "fla", _fla(path, config, stored)
    else:
        raise UserError(
            f"{path} has tensors such as {min(stored)[:100]!r}; expected are the names of the official layout"
            f" ({OFFICIAL}emb.weight) or of flash-linear-attention's ({FLA_SIGN})"
        )
    tensors, notes = _with_value_residual(path, tensors, provenance)
    return HfFolder(layout, tensors, provenance, notes)


def read_config(path: str) -> dict[str, Any]:
    """Read a folder's config.json. Raises UserError if it is absent."""
    if not os.path.exists(os.path.join(path, CONFIG)):
        raise UserError(f"{path} is a folder without {CONFIG}; give a model's file, or a Hugging Face folder")
    return read_json(os.path.join(path, CONFIG))


def folder_files(path: str) -> list[str]:
    """Name the files that read_folder() reads, the weights last."""
    return [
        name for name in (CONFIG, INDEX, VALUE_RESIDUAL_FILE) if os.path.exists(os.path.join(path, name))
    ] + weight_files(path)


def _official(path: str, config: Mapping[str, Any], stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the official layout. The model checks later that none is missing."""
    for name, eps in EPS.items():
        if (found := config.get(name, eps)) != eps:
            raise UserError(
                f"{path} has {name} {str(found)[:60]}; RWKV's is {eps:g}, so a checkpoint would compute"
                " something else"
            )
    if (head_size := config.get("head_dim", 64)) != 64:
        raise UserError(
            f"{path} has heads of {str(head_size)[:60]}: programs for this layout scale ln_x's eps with it;"
            f" RWKV's is 64 * {LN_EPS:g}, so a checkpoint would compute something else"
        )
    tensors = {plain_name(name): tensor for name, tensor in stored.items()}
    if len(tensors) < len(stored):
        raise UserError(f"{path} is damaged: some tensors have the same name with and without {OFFICIAL}")
    numbers = [int(found[1]) for name in tensors if (found := re.match(r"blocks\.(\d{1,9})\.", name))]
    layers = 1 + max(numbers, default=-1)
    if config.get("num_hidden_layers", layers) != layers:
        raise UserError(
            f"{path} has {layers} layers, and its {CONFIG} says num_hidden_layers"
            f" {str(config['num_hidden_layers'])[:60]}; a file is missing or of another model"
        )
    return tensors


def _fla(path: str, config: Mapping[str, Any], stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of flash-linear-attention's layout."""
    n_layer = number(path, config, "num_hidden_layers")
    head_size = number(path, config, "head_dim")
    if (head_size, config.get("norm_eps", LN_EPS)) != (64, LN_EPS):
        raise UserError(
            f"{path} has heads of {head_size} and an eps of {str(config.get('norm_eps'))[:60]}: its ln_x has"
            f" their product; RWKV's is 64 * {LN_EPS:g}, so a checkpoint would compute something else"
        )
    return restored(path, table(n_layer), stored, head_size)


def number(
    path: str | os.PathLike[str],
    keys: Mapping[str, Any],
    key: str,
    least: int = 1,
    default: int | None = None,
) -> int:
    """Read a number of a model's description. Raises UserError for a value that no model has."""
    value = keys.get(key, default)
    if type(value) is not int or not least <= value <= LARGEST_DEPTH:
        raise UserError(
            f"{path}: its {key} is {str(value)[:60]}, expected a number from {least} to {LARGEST_DEPTH}"
        )
    return value


def restored(
    path: str | os.PathLike[str], table: Iterable[TensorMap], stored: Mapping[str, Tensor], head_size: int
) -> dict[str, Tensor]:
    """Restore the checkpoint's tensors by a table. Raises UserError if it does not name all stored ones."""
    table = list(table)
    expected = {mapped.stored for mapped in table}
    for kind, names in (("lacks", expected - stored.keys()), ("has the unknown", stored.keys() - expected)):
        if names:
            raise UserError(f"{path} {kind} {listed([name[:100] for name in sorted(names)], 1)}")
    try:
        return restore(table, stored, head_size)
    except (RuntimeError, IndexError, ValueError) as error:  # torch's, for shapes that do not fit
        raise UserError(f"{path} is damaged: its shapes do not fit ({str(error)[:100]})") from None


def _with_value_residual(
    path: str, tensors: dict[str, Tensor], provenance: Provenance | None
) -> tuple[dict[str, Tensor], list[str]]:
    """Make block 0's value residual, which nothing reads, as the checkpoint had it; also returns notes."""
    if provenance is None:
        return tensors, []
    if VALUE_RESIDUAL[0] not in provenance.entries:  # the official layout always has one
        return {name: tensor for name, tensor in tensors.items() if name not in VALUE_RESIDUAL}, []
    if os.path.exists(os.path.join(path, VALUE_RESIDUAL_FILE)):
        return tensors | read_safetensors(os.path.join(path, VALUE_RESIDUAL_FILE))[0], []
    kept = [entry for name, entry in provenance.entries.items() if name in VALUE_RESIDUAL]
    extra = [tensors[name] for name in provenance.entries if name in VALUE_RESIDUAL and name in tensors]
    if [math.prod(entry.shape) for entry in kept] == [tensor.numel() for tensor in extra]:
        return tensors, []
    note = f"{VALUE_RESIDUAL_FILE} is absent: the value residual of block 0, which nothing reads, is zero"
    return tensors | _zeros(path, provenance.entries, tensors), [note]


def _zeros(path: str, entries: Mapping[str, Entry], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    entries = {name: entries[name] for name in VALUE_RESIDUAL if name in entries}
    largest = tensors["blocks.0.att.key.weight"].numel()
    if any(math.prod(entry.shape) > largest for entry in entries.values()):
        raise UserError(
            f"{path} is damaged: its {KEY} gives block 0 a value residual that is larger than its matrices"
        )
    return {name: torch.zeros(entry.shape, dtype=entry.dtype) for name, entry in entries.items()}
