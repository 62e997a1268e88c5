"""Way back from an exported form to a checkpoint.

It gives the same file again if the form keeps a record of the checkpoint. From another project's file it
makes the usual checkpoint of RWKV.
"""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_miss.errors import UserError
from rwkv_miss.files.checkpoint import Arch, check_finite, write_checkpoint
from rwkv_miss.files.hf_folder import LN_EPS, number, restored
from rwkv_miss.files.model_files import read_model
from rwkv_miss.files.output import require_writable
from rwkv_miss.files.provenance import Entry, Provenance, check_dtypes
from rwkv_miss.files.safetensors_io import is_safetensors
from rwkv_miss.files.untrusted import first_bytes
from rwkv_miss.progress import tensors_with_progress

from ..common.formatting import counted
from ..model import RWKV
from . import gguf_reader, gguf_table


class Stored(NamedTuple):
    """Model in another form, as it was found."""

    form: str
    tensors: dict[str, Tensor]  # the checkpoint's, views of the mapped file
    provenance: Provenance | None  # the record that came with the tensors
    notes: list[str]  # sentences for the user


def form_of(path) -> str:
    """Tell the form of a model: gguf, hf, safetensors, or pth for any other. Raises UserError without a
    file."""
    if os.path.isdir(path):
        return "hf"
    if first_bytes(path, 4) == gguf_reader.MAGIC:
        return "gguf"
    return "safetensors" if is_safetensors(path) else "pth"


def to_checkpoint(path, out) -> tuple[str, Arch, list[str]]:
    """Write the checkpoint that the model at `path` was made from; returns (its form, its sizes, notes).

    Raises UserError, before it writes, for a damaged or incomplete model, and for types that lost values.
    """
    stored = READERS[form_of(path)](path)
    provenance = stored.provenance
    if provenance:
        provenance.check(stored.tensors, path)
    arch = Arch.detect(stored.tensors)
    with torch.device("meta"):
        canonical = RWKV(arch)
    canonical.check(stored.tensors, path)
    check_dtypes(stored.tensors, path)
    notes = list(stored.notes)
    if provenance is None:
        usual = canonical.named_parameters()
        entries = {name: Entry(stored.tensors[name].dtype, tuple(p.shape)) for name, p in usual}
        provenance = Provenance(entries, None)
        notes.append(
            "another program wrote this: order and shapes of the tensors are RWKV's usual ones, dtypes as"
            " they were found"
        )
    elif rounded := provenance.rounded({name: tensor.dtype for name, tensor in stored.tensors.items()}):
        notes.append(
            f"{counted(len(rounded), 'tensor')}, {rounded[0]} first, were rounded in the export: these values"
            " are not the checkpoint's own"
        )
    check_finite(stored.tensors)
    size = sum(
        entry.dtype.itemsize * stored.tensors[name].numel() for name, entry in provenance.entries.items()
    )
    require_writable(out, size)
    written = tensors_with_progress(provenance.restored(stored.tensors), "writing the checkpoint", size)
    write_checkpoint(out, written, provenance.metadata)
    return stored.form, arch, notes


def _from_gguf(path) -> Stored:
    keys, stored = gguf_reader.read(path)
    name = keys.get("general.architecture")
    if name not in ("rwkv6", "rwkv7"):
        raise UserError(f"{path} is a GGUF file of {str(name)[:60]!r}, expected rwkv6 or rwkv7")
    version = int(name[-1])
    n_layer = number(path, keys, f"{name}.block_count")
    head_size = number(path, keys, f"{name}.wkv.head_size")
    halved = number(path, keys, f"{name}.rescale_every_n_layers", least=0, default=0)
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
    provenance = Provenance.found(keys, path)
    tensors = restored(path, gguf_table.table(version, n_layer), stored, head_size)
    notes = []
    if version == 7:
        tensors, notes = _without_filling(tensors, provenance)
    return Stored("GGUF", tensors, provenance, notes)


def _without_filling(
    tensors: dict[str, Tensor], provenance: Provenance | None
) -> tuple[dict[str, Tensor], list[str]]:
    """Undo gguf_table.fill_block_0()."""
    if provenance is None:
        note = (
            "block 0 has no value residual: nothing reads one there, and GGUF holds other numbers in its"
            " place"
        )
        return gguf_table.restore_block_0(tensors, None), [note]
    kept = provenance.entries.get("blocks.0.att.v1")
    rank = kept.shape[-1] if kept and kept.shape else None
    stored = tensors["blocks.0.att.v1"]
    if rank is None or rank <= stored.shape[1]:
        return gguf_table.restore_block_0(tensors, rank), []
    note = (
        "the value residual of block 0, which nothing reads, did not fit into GGUF whole: its last"
        " columns are zeros"
    )
    # a rank above the width is damage, which the check of the provenance reports
    if rank <= stored.shape[0]:
        tensors = gguf_table.restore_block_0(tensors, rank)
    return tensors, [note]


def _from_file(form: str, path) -> Stored:
    """Read a model from a form that can be a base everywhere."""
    model = read_model(path)
    return Stored(form, model.tensors, model.provenance, model.notes)


READERS = {
    "gguf": _from_gguf,
    "hf": functools.partial(_from_file, "Hugging Face"),
    "safetensors": functools.partial(_from_file, "safetensors"),
}
