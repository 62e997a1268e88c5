"""A file or a folder with an adapter, as it was found."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from torch import Tensor

from ..errors import UserError
from ..inject import ADAPTER_FORMAT, read_described
from ..untrusted import LARGEST_JSON, first_bytes, read_json

# configuration of a folder -> the tensors beside it, the first name that is there
FOLDERS = {
    "adapter_config.json": ("adapter_model.safetensors", "adapter_model.bin"),
    "adapter.json": ("adapter.pth", "adapter-final.pth"),
    "checkpoint.json": ("training.pth",),
}


@dataclasses.dataclass(frozen=True)
class Source:
    """`tensors` are mapped from the file. `config` is what its header or the JSON file beside it says, {} where nothing does; `config_name` is
    that file's name, or "" for a header. `header` is what the header of the tensors' file in a folder says."""

    path: str
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    config_name: str = ""
    header: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def describes_itself(self) -> bool:
        """Whether this package wrote the file. What read_described() says of a file of initial states has no version."""
        return not self.config_name and self.config.get("format") == ADAPTER_FORMAT and "format_version" in self.config


def open_source(path) -> Source:
    """Read a .pth or a .safetensors file, or a folder that holds one beside its configuration. Runs no code of the file. UserError for the rest."""
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
    raise UserError(f"{path} is a folder without {' or '.join(FOLDERS)}; give an adapter's file or folder")


def is_safetensors(path) -> bool:
    """Whether a file begins as safetensors do: the length of a JSON object, in 8 bytes, and its brace."""
    try:
        head = first_bytes(path, 9)
    except UserError:
        return False  # whoever reads it next says why
    return len(head) == 9 and head[8:] == b"{" and head[:4] != b"PK\x03\x04"


def read_safetensors(path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, mapped from the file, and the metadata of its header. UserError for a damaged file, or without the package."""
    try:
        import safetensors
    except ImportError:
        raise UserError(f"{path} is a safetensors file, and the package that reads those is absent: pip install 'rwkv-miss[convert]'") from None
    header = int.from_bytes(first_bytes(path, 8), "little")
    if header > LARGEST_JSON:
        raise UserError(f"{path} has a header of {header:,} bytes, expected are {LARGEST_JSON:,} at the most; the file is refused")
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is truncated or damaged: {str(error)[:200]}") from None
