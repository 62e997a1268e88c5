"""Writing what a conversion makes, whole or not at all: safetensors files, and folders of a few files."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ..checkpoint import require_writable
from ..errors import UserError


def require_safetensors(out):
    """The function that writes a safetensors file. UserError without the packages that it takes."""
    try:
        import numpy  # noqa: F401  (save_file() needs it)
        from safetensors.torch import save_file
    except ImportError:
        raise UserError(f"{out} can't be written: the package safetensors or numpy is absent: pip install 'rwkv-miss[convert]'") from None
    return save_file


def write_safetensors(path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """One file, dtypes and bits as they are. It appears under its name only when it is complete."""
    save_file = require_safetensors(path)
    require_writable(path, sum(tensor.nbytes for tensor in tensors.values()))
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        # of its own memory each: the format has no views
        save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, temporary, header)
        synced(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, content: dict) -> None:
    """A JSON file for people as well as machines."""
    Path(path).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    synced(path)


def synced(path) -> None:
    """Have a file on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def check_folder(out, names: list[str]) -> None:
    """UserError unless a folder of these files can be made at `out`: nothing is there, or a folder with no other files, which is replaced."""
    if os.path.lexists(out) and not os.path.isdir(out):
        raise UserError(f"{out} is a file, expected the name of a folder to write")
    others = sorted(set(os.listdir(out)) - set(names)) if os.path.isdir(out) else []
    if others:
        raise UserError(f"{out} holds {others[0]}" + (f" and {len(others) - 1} more" if others[1:] else "")
                        + f" beside the files that would be written, {', '.join(names)}; choose another name, or empty the folder")
    require_writable(f"{os.path.realpath(out)}.tmp")


def write_folder(out, writers: dict[str, Callable[[str], None]]) -> None:
    """A folder of files, each made by a function of its path. It appears under its name when all are complete; a folder that is there is
    replaced if it has no other files (check_folder), and stays as it was after a failure."""
    check_folder(out, list(writers))
    out = os.path.realpath(out)
    temporary, old = (f"{out}.{secrets.token_hex(4)}.{kind}" for kind in ("tmp", "old"))
    try:
        os.mkdir(temporary)
        for name, write in writers.items():
            write(os.path.join(temporary, name))
        if os.path.isdir(out):
            os.rename(out, old)
        try:
            os.rename(temporary, out)
        except OSError:
            if os.path.isdir(old):
                os.rename(old, out)
            raise
    finally:
        for folder in (temporary, old):
            shutil.rmtree(folder, ignore_errors=True)
