"""Weights of a Hugging Face folder of any model: one safetensors file, or several that an index names.

A folder with the same files is written from the tensors in their order, one in memory at a time.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ..errors import UserError, listed
from .hf_names import CONFIG, INDEX, VALUE_RESIDUAL_FILE, WEIGHTS
from .output import check_folder, require_writable, write_folder, write_json, write_text
from .safetensors_io import read_safetensors, write_safetensors
from .untrusted import read_json

# endings of files with weights, which write_like() does not copy
WEIGHT_ENDINGS = (
    *(".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json"),
)
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
Files = Mapping[str, Mapping[str, Tensor]]  # file of weights -> its tensors by their names


def weight_files(path: str) -> list[str]:
    """Name the files with the weights: the one file, or those that the index names, all in this folder.

    Raises UserError if there is no such file, and for an index that names files elsewhere.
    """
    if os.path.lexists(os.path.join(path, WEIGHTS)):
        return [WEIGHTS]
    index = os.path.join(path, INDEX)
    if not os.path.exists(index):
        pickles = any(os.path.exists(os.path.join(path, name)) for name in PICKLES)
        advice = f" but {PICKLES[0]}; transformers' from_pretrained() and save_pretrained() write safetensors"
        raise UserError(f"{path} has neither {WEIGHTS} nor {INDEX}{advice if pickles else ''}")
    return sorted(set(weight_map(index).values()))


def weight_map(index: str) -> dict[str, str]:
    """Read tensor -> file from an index. Raises UserError for a bad one, and a file outside of its folder."""
    named = read_json(index).get("weight_map")
    sound = isinstance(named, dict) and named and all(isinstance(name, str) for name in named.values())
    if not sound or any(os.path.basename(name) != name or name in ("", ".", "..") for name in named.values()):
        raise UserError(f"{index} is damaged: its weight_map is no table of files in this folder")
    return named


def read_weights(path: str | os.PathLike[str]) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """Read the tensors of each file of weights, mapped, and the header of the last file.

    Raises UserError for a missing or damaged file, and for a tensor in two files.
    """
    path = os.fspath(path)
    found: dict[str, dict[str, Tensor]] = {}
    seen: set[str] = set()
    header: dict[str, str] = {}
    files = weight_files(path)
    for name in files:
        file = os.path.join(path, name)
        if not os.path.lexists(file):
            raise UserError(
                f"{file} is missing: {INDEX} names {len(files)} files of weights; download or copy the whole"
                " folder"
            )
        found[name], header = read_safetensors(file)
        if twice := seen & found[name].keys():
            raise UserError(f"{path} is damaged: {min(twice)[:100]} is in two of its files")
        seen |= found[name].keys()
    if not seen:
        raise UserError(f"{path} has no tensors")
    return found, header


def of_all(files: Files) -> dict[str, Tensor]:
    """Return the tensors of all files."""
    return {name: tensor for tensors in files.values() for name, tensor in tensors.items()}


def check_new_folder(out: str | os.PathLike[str], size: int = 0) -> None:
    """Raise UserError unless a new folder of `size` bytes can be made at `out`, where nothing or an empty
    folder may be."""
    check_folder(out, [])
    require_writable(f"{os.path.realpath(out)}.tmp", size)


def write_like(
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    files: Files,
    values: Iterator[tuple[str, Tensor]],
    header: Mapping[str, str],
    dtype: str = "",
) -> list[str]:
    """Write a folder with the configuration and the tokenizer of another one; returns notes.

    files: the tensors' shapes and dtypes. values: (name, tensor), file by file, each in file_order(). header:
    texts for the header of the last file. dtype: the configuration names it, unless it is empty.
    """
    *_, last = files
    writers = {}
    for file, forms in files.items():
        texts = {"format": "pt", **(header if file == last else {})}
        writers[file] = functools.partial(write_safetensors, tensors=forms, metadata=texts, values=values)
    if os.path.exists(os.path.join(base, INDEX)):
        names = {name: file for file, forms in files.items() for name in forms}
        size = sum(form.nbytes for forms in files.values() for form in forms.values())
        index = {"metadata": {"total_size": size}, "weight_map": names}
        writers[INDEX] = functools.partial(write_json, content=index)
    left_out = []
    for name in sorted(os.listdir(base)):
        file = os.path.join(base, name)
        if name in writers:
            continue
        if os.path.isfile(file) and (not name.endswith(WEIGHT_ENDINGS) or name == VALUE_RESIDUAL_FILE):
            writers[name] = functools.partial(shutil.copyfile, file)
        elif not name.startswith("."):
            left_out.append(name)
    if dtype:
        config = _with_dtype({"dtype": dtype, **read_json(os.path.join(base, CONFIG))}, dtype)
        writers[CONFIG] = functools.partial(write_text, text=json.dumps(config, indent=2) + "\n")
    write_folder(out, writers)
    return [f"{base} has more, which is left out: {listed(left_out, 4)}"] if left_out else []


def _with_dtype(config: Any, dtype: str) -> Any:
    """Replace the names of dtypes in a configuration, also in its parts."""
    if not isinstance(config, dict):
        return config
    return {
        key: dtype if key in ("dtype", "torch_dtype") else _with_dtype(value, dtype)
        for key, value in config.items()
    }
