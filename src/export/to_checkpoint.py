"""From an exported form to a checkpoint: the same file again, where the form keeps a record of it, and the
canonical one from other projects.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_miss.errors import UserError
from rwkv_miss.files.checkpoint import Arch, check_finite, write_checkpoint
from rwkv_miss.files.output import require_writable
from rwkv_miss.files.safetensors_io import is_safetensors, read_safetensors
from rwkv_miss.files.untrusted import first_bytes, read_json
from rwkv_miss.progress import tensors_with_progress

from ..common.formatting import counted
from ..model import RWKV
from . import gguf_reader, gguf_table, hugging_face
from .gguf import LN_EPS
from .provenance import KEY, Entry, Record, check_dtypes
from .tensor_map import Row, restore

LARGEST_DEPTH = 1 << 12  # layers
INDEX = "model.safetensors.index.json"
VALUE_RESIDUAL = [f"blocks.0.att.v{i}" for i in range(3)]


class Stored(NamedTuple):
    """What was found: the checkpoint's tensors, views of the mapped file, the record that came with them or
    None, and what the user should know.
    """

    form: str
    tensors: dict[str, Tensor]
    record: Record | None
    notes: list[str]


def form_of(path) -> str:
    """ "gguf", "hf", "safetensors", or "pth" for any other file. UserError for what is no file."""
    if os.path.isdir(path):
        return "hf"
    return (
        "gguf"
        if first_bytes(path, 4) == gguf_reader.MAGIC
        else "safetensors"
        if is_safetensors(path)
        else "pth"
    )


def to_checkpoint(path, out) -> tuple[str, Arch, list[str]]:
    """Write the checkpoint that the model at `path` was made from; (its form, what it is, notes). UserError,
    before anything is written, for a damaged or incomplete model, and for types that keep no values.
    """
    stored = READERS[form_of(path)](path)
    record = stored.record
    if record:
        record.check(stored.tensors, path)
    arch = Arch.detect(stored.tensors)
    with torch.device("meta"):
        canonical = RWKV(arch)
    canonical.check(stored.tensors, path)
    check_dtypes(stored.tensors, path)
    notes = list(stored.notes)
    if record is None:
        record = Record(
            {
                name: Entry(stored.tensors[name].dtype, tuple(p.shape))
                for name, p in canonical.named_parameters()
            },
            None,
        )
        notes.append(
            "another program wrote this: order and shapes of the tensors are RWKV's usual ones, dtypes as"
            " they were found"
        )
    elif rounded := record.rounded({name: tensor.dtype for name, tensor in stored.tensors.items()}):
        notes.append(
            f"{counted(len(rounded), 'tensor')}, {rounded[0]} first, were rounded in the export: these values"
            " are not the checkpoint's own"
        )
    check_finite(stored.tensors)
    size = sum(entry.dtype.itemsize * stored.tensors[name].numel() for name, entry in record.entries.items())
    require_writable(out, size)
    restored = tensors_with_progress(record.restored(stored.tensors), "writing the checkpoint", size)
    write_checkpoint(out, restored, record.metadata)
    return stored.form, arch, notes


def _from_gguf(path) -> Stored:
    keys, stored = gguf_reader.read(path)
    name = keys.get("general.architecture")
    if name not in ("rwkv6", "rwkv7"):
        raise UserError(f"{path} is a GGUF file of {str(name)[:60]!r}, expected rwkv6 or rwkv7")
    version = int(name[-1])
    n_layer, head_size, halved = (
        _number(path, keys, f"{name}.{key}")
        for key in ("block_count", "wkv.head_size", "rescale_every_n_layers")
    )
    if halved:
        raise UserError(
            f"{path} has weights that were halved every {halved} layers for fp16 (rescale_every_n_layers),"
            " which is not undone here"
        )
    eps = keys.get(f"{name}.attention.layer_norm_epsilon")
    if not isinstance(eps, float) or not abs(eps - LN_EPS) <= 1e-9:  # NaN is neither
        raise UserError(
            f"{path} has layers with an eps of {str(eps)[:60]}; RWKV's is {LN_EPS:g}, so a checkpoint would"
            " compute something else"
        )
    record = Record.parse(keys[KEY], path) if KEY in keys else None
    tensors = _restored(path, gguf_table.rows(version, n_layer), stored, head_size)
    notes = []
    if version == 7:
        tensors, notes = _without_filling(tensors, record)
    return Stored("GGUF", tensors, record, notes)


def _without_filling(
    tensors: dict[str, Tensor], record: Record | None
) -> tuple[dict[str, Tensor], list[str]]:
    """Undo gguf_table.fill_block_0()."""
    if record is None:
        note = (
            "block 0 has no value residual: nothing reads one there, and GGUF holds other numbers in its"
            " place"
        )
        return gguf_table.restore_block_0(tensors, None), [note]
    kept = record.entries.get("blocks.0.att.v1")
    rank = kept.shape[-1] if kept and kept.shape else None
    if rank is not None and rank > tensors["blocks.0.att.v1"].shape[1]:
        return (
            (
                gguf_table.restore_block_0(tensors, rank)
                if rank <= tensors["blocks.0.att.v1"].shape[0]
                else tensors
            ),
            [
                "the value residual of block 0, which nothing reads, did not fit into GGUF whole: its last"
                " columns are zeros"
            ],
        )
    return gguf_table.restore_block_0(tensors, rank), []


def _from_safetensors(path) -> Stored:
    tensors, header = read_safetensors(path)
    if "model.embeddings.weight" in tensors:
        raise UserError(
            f"{path} belongs to a Hugging Face folder; give the folder, {os.path.dirname(path) or '.'}"
        )
    return Stored("safetensors", tensors, Record.parse(header[KEY], path) if KEY in header else None, [])


def _from_folder(path) -> Stored:
    folder = Path(path)
    if not (folder / hugging_face.CONFIG).exists():
        raise UserError(
            f"{path} is a folder without {hugging_face.CONFIG}; give a model's file, or a Hugging Face folder"
        )
    config = read_json(folder / hugging_face.CONFIG)
    if config.get("model_type") != "rwkv7":
        raise UserError(f"{path} is a folder of {str(config.get('model_type'))[:60]!r}, expected rwkv7")
    n_layer, head_size = (_number(path, config, key) for key in ("num_hidden_layers", "head_dim"))
    if (head_size, config.get("norm_eps", LN_EPS)) != (64, LN_EPS):
        raise UserError(
            f"{path} has heads of {head_size} and an eps of {str(config.get('norm_eps'))[:60]}: its ln_x has"
            f" their product; RWKV's is 64 * {LN_EPS:g}, so a checkpoint would compute something else"
        )
    stored: dict[str, Tensor] = {}
    header: dict[str, str] = {}
    for name in _weight_files(folder):
        found, header = read_safetensors(folder / name)
        stored |= found
    record = Record.parse(header[KEY], path) if KEY in header else None
    tensors = _restored(path, hugging_face.rows(n_layer), stored, head_size)
    if record is None or VALUE_RESIDUAL[0] not in record.entries:
        return Stored("Hugging Face", tensors, record, [])
    if (folder / hugging_face.UNREAD).exists():
        return Stored("Hugging Face", tensors | read_safetensors(folder / hugging_face.UNREAD)[0], record, [])
    notes = [f"{hugging_face.UNREAD} is absent: the value residual of block 0, which nothing reads, is zero"]
    return Stored("Hugging Face", tensors | _zeros(path, record, tensors), record, notes)


def _weight_files(folder: Path) -> list[str]:
    """One file, or those that an index names: files of this folder only."""
    if (folder / hugging_face.WEIGHTS).exists():
        return [hugging_face.WEIGHTS]
    if not (folder / INDEX).exists():
        raise UserError(f"{folder} has neither {hugging_face.WEIGHTS} nor {INDEX}")
    named = read_json(folder / INDEX).get("weight_map")
    files = (
        sorted(set(named.values()))
        if isinstance(named, dict) and all(isinstance(name, str) for name in named.values())
        else []
    )
    if not files or any(os.path.basename(name) != name for name in files):
        raise UserError(f"{folder / INDEX} is damaged: its weight_map is no table of files in this folder")
    return files


def _zeros(path, record: Record, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    entries = {name: record.entries[name] for name in VALUE_RESIDUAL if name in record.entries}
    if any(math.prod(entry.shape) > tensors["blocks.0.att.key.weight"].numel() for entry in entries.values()):
        raise UserError(
            f"{path} is damaged: its {KEY} gives block 0 a value residual that is larger than its matrices"
        )
    return {name: torch.zeros(entry.shape, dtype=entry.dtype) for name, entry in entries.items()}


def _number(path, keys: Mapping[str, Any], key: str) -> int:
    value = keys.get(key, 0 if key.endswith("rescale_every_n_layers") else None)
    least = 0 if key.endswith("rescale_every_n_layers") else 1
    if type(value) is not int or not least <= value <= LARGEST_DEPTH:
        raise UserError(
            f"{path}: its {key} is {str(value)[:60]}, expected a number from {least} to {LARGEST_DEPTH}"
        )
    return value


def _restored(path, rows: list[Row], stored: dict[str, Tensor], head_size: int) -> dict[str, Tensor]:
    expected = {row.stored for row in rows}
    for kind, names in (("lacks", expected - stored.keys()), ("has the unknown", stored.keys() - expected)):
        if names:
            raise UserError(
                f"{path} {kind} {min(names)[:100]}"
                + (f" and {len(names) - 1} more" if len(names) > 1 else "")
            )
    try:
        return restore(rows, stored, head_size)
    except (RuntimeError, IndexError, ValueError) as error:  # torch's, for shapes that do not fit
        raise UserError(f"{path} is damaged: its shapes do not fit ({str(error)[:100]})") from None


READERS = {"gguf": _from_gguf, "hf": _from_folder, "safetensors": _from_safetensors}
