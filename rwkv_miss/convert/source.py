"""Source of a conversion: a file or a folder with an adapter."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from torch import Tensor

from ..adapter_file import ADAPTER_FORMAT, read_described
from ..errors import UserError
from ..files.hf_folder import is_folder
from ..files.safetensors_io import is_safetensors, read_safetensors
from ..files.untrusted import read_json

# configuration of a folder -> names of the file with its tensors; the first that exists is read
FOLDERS = {
    "adapter_config.json": ("adapter_model.safetensors", "adapter_model.bin"),
    "adapter.json": ("adapter.pth", "adapter-final.pth"),
    "checkpoint.json": ("training.pth",),
}


@dataclasses.dataclass(frozen=True)
class Source:
    """A file or a folder.

    tensors: mapped from the file. config: the metadata in the file's header, or the folder's JSON
    configuration; {} without any. config_name: the configuration's name, "" for a header. header: the header
    of the tensors' file in a folder.
    """

    path: str
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    config_name: str = ""
    header: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def describes_itself(self) -> bool:
        """Tell whether this package wrote the file.

        The metadata that read_described() makes up for a file of initial states have no version.
        """
        return (
            not self.config_name
            and self.config.get("format") == ADAPTER_FORMAT
            and "format_version" in self.config
        )


def open_source(path: str | os.PathLike[str]) -> Source:
    """Read a .pth or .safetensors file, a folder with such a file and its configuration, or a model's folder.

    No code of the file runs. Raises UserError for anything else.
    """
    path = os.fspath(path)
    if not os.path.isdir(path):
        tensors, metadata = read_safetensors(path) if is_safetensors(path) else read_described(path)
        return Source(path, tensors, metadata)
    for config_name, files in FOLDERS.items():
        if not os.path.exists(os.path.join(path, config_name)):
            continue
        file = next((name for name in files if os.path.exists(os.path.join(path, name))), None)
        if file is None:
            raise UserError(f"{path} has {config_name}, but neither {' nor '.join(files)}")
        config = read_json(os.path.join(path, config_name))
        file = os.path.join(path, file)
        tensors, header = read_safetensors(file) if is_safetensors(file) else read_described(file)
        return Source(path, tensors, config, config_name, header)
    if is_folder(path):
        return Source(path, *read_described(path, any_folder=True))
    of_run = os.path.join(path, "adapter.pth")
    way = f"give {of_run}" if os.path.exists(of_run) else "give an adapter's file or folder"
    raise UserError(f"{path} is a folder without {' or '.join(FOLDERS)}; {way}")
