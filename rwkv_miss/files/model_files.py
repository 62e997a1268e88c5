"""Model files in every form: all programs read a base or a merged file by this module.

The forms are a .pth, a trainer's file with the tensors inside, a safetensors file, and a Hugging Face folder
in either layout. All are mapped, and get RWKV's names, so that a model has the same fingerprint in each form.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from .architectures import refuse_newer
from .checkpoint import flat, load_dict, read_metadata
from .hf_folder import MODEL_TYPE, folder_files, is_folder, read_config, read_folder, refuse_file_of_folder
from .hf_names import in_usual_order
from .provenance import Provenance
from .safetensors_io import is_safetensors, read_header, read_safetensors
from .weight_files import of_all, read_weights
from .wrapped import contained, is_model, plain_names

FACTS = 4  # numbers of file_facts() for each file: size, time of the content, inode, time of any change


class ModelFile(NamedTuple):
    """Content of a model's file or folder."""

    tensors: dict[str, Tensor]  # mapped, under RWKV's names if the model is an RWKV
    metadata: dict[str, Any] | None  # written by this package; None if there are none
    notes: list[str]  # messages for the user
    provenance: Provenance | None = None  # record of the checkpoint that an export was made from


# inside reading_once(): (path, any_folder) -> (file_facts() before the reading, the content); None outside
_kept: dict[tuple[str, bool], tuple[list[int], ModelFile]] | None = None


@contextlib.contextmanager
def reading_once() -> Iterator[None]:
    """Read each file once in the block, unless it changes, until forget_readings()."""
    global _kept
    _kept = {}
    try:
        yield
    finally:
        forget_readings()


def forget_readings() -> None:
    """Forget the kept files, because a model takes their tensors and may change them."""
    global _kept
    _kept = None


def read_model(path: str | os.PathLike[str], any_folder: bool = False) -> ModelFile:
    """Read the model at `path`. Tensors of other models, and of adapters, keep their names.

    any_folder: also read a folder of another model.

    Raises UserError for a damaged or foreign file, a pickle that asks for code, a newer architecture, a model
    inside a larger one, and a folder of another model or with a missing file.
    """
    if _kept is None or not is_file_or_folder(path):
        return _read_model(path, any_folder)
    key, now = (os.path.abspath(path), any_folder), file_facts(path)
    if key not in _kept or _kept[key][0] != now:
        _kept[key] = now, _read_model(path, any_folder)
    model = _kept[key][1]
    return model._replace(tensors=dict(model.tensors))


def _read_model(path: str | os.PathLike[str], any_folder: bool) -> ModelFile:
    if os.path.isdir(path):
        model = _of_folder(path, any_folder)
    elif is_safetensors(path):
        model = _of_safetensors(path)
    else:
        loaded, notes = contained(path, load_dict(path))
        tensors, more = plain_names(path, flat(path, loaded))
        model = ModelFile(dict(tensors), read_metadata(path), notes + more)
    if is_model(model.tensors):
        refuse_newer(model.tensors, os.fspath(path))
    return model


def read_tensors(path: str | os.PathLike[str], any_folder: bool = False) -> dict[str, Tensor]:
    """Read the tensors of a model."""
    return read_model(path, any_folder).tensors


def model_metadata(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Read the metadata of a model, without its tensors."""
    if os.path.isdir(path):
        read_config(path)  # for its error if the folder has no configuration
        header = read_header(weight_paths(path)[-1])
    elif is_safetensors(path):
        header = read_header(path)
    else:
        return read_metadata(path)
    provenance = Provenance.found(header, path)
    return provenance.metadata if provenance else None


def _of_folder(path: str | os.PathLike[str], any_folder: bool) -> ModelFile:
    if any_folder and read_config(os.fspath(path)).get("model_type") != MODEL_TYPE:
        files, header = read_weights(path)
        provenance = Provenance.found(header, path)
        return ModelFile(of_all(files), provenance and provenance.metadata, [])
    folder = read_folder(path)
    return _as_recorded(path, in_usual_order(folder.tensors), folder.provenance, folder.notes)


def _of_safetensors(path: str | os.PathLike[str]) -> ModelFile:
    found, header = read_safetensors(path)
    refuse_file_of_folder(path, found)
    tensors, notes = plain_names(path, found)
    if is_model(tensors):
        tensors = in_usual_order(tensors)
    return _as_recorded(path, tensors, Provenance.found(header, path), notes)


def _as_recorded(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    provenance: Provenance | None,
    notes: list[str],
) -> ModelFile:
    """Restore the order and shapes of the exported checkpoint, if its record is there."""
    if provenance is None:
        return ModelFile(dict(tensors), None, notes)
    provenance.check(tensors, path)
    ordered = {name: tensors[name].reshape(entry.shape) for name, entry in provenance.entries.items()}
    return ModelFile(ordered, provenance.metadata, notes, provenance)


def is_file_or_folder(path: str | os.PathLike[str]) -> bool:
    """Tell whether a path is a file, or a folder with a model's config.json."""
    return os.path.isfile(path) or is_folder(path)


def weight_paths(path: str | os.PathLike[str]) -> list[str]:
    """List the files that read_model() reads, one or a folder's, the weights last."""
    if not os.path.isdir(path):
        return [os.fspath(path)]
    return [os.path.join(path, name) for name in folder_files(os.fspath(path))]


def file_facts(path: str | os.PathLike[str]) -> list[int]:
    """Return the FACTS numbers of a file, or of each file of a folder: they change whenever the file does."""
    stats = map(os.stat, weight_paths(path))
    return [fact for f in stats for fact in (f.st_size, f.st_mtime_ns, f.st_ino, f.st_ctime_ns)]


def name_of(path: str | os.PathLike[str]) -> str:
    """Return the name of a file or a folder in records: the last part of its path."""
    return os.path.basename(os.path.abspath(path))
