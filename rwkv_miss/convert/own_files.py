"""This package's own adapters: a .pth, or one safetensors file with the metadata as JSON in the header."""

from __future__ import annotations

import json
import os

from ..adapter import METHODS
from ..adapter_file import ADAPTER_FORMAT, checked_metadata, read_adapter
from ..errors import UserError
from ..files.checkpoint import write_checkpoint
from ..files.safetensors_io import RECORD, write_safetensors
from ..files.untrusted import json_object
from .formats import Adapter, Format, Hints
from .source import Source


class Native(Format):
    """Format of the .pth files that save_adapter() writes."""

    name = "native"
    writes = keeps_all = True
    replaces = (ADAPTER_FORMAT,)

    @classmethod
    def reads(cls, source: Source) -> bool:
        return source.describes_itself

    @classmethod
    def read(cls, source: Source, hints: Hints) -> Adapter:
        return Adapter(*read_adapter(source.path))

    @classmethod
    def write(cls, adapter: Adapter, out: str | os.PathLike[str]) -> list[str]:
        write_checkpoint(out, adapter.tensors.items(), adapter.metadata)
        return []


class Safetensors(Format):
    """Format with save_adapter()'s content, bit for bit, as safetensors: no pickle, so no code can run."""

    name = "safetensors"
    writes = keeps_all = True
    replaces = (ADAPTER_FORMAT,)

    @classmethod
    def reads(cls, source: Source) -> bool:
        return RECORD in source.config and not source.config_name

    @classmethod
    def read(cls, source: Source, hints: Hints) -> Adapter:
        metadata = checked_metadata(source.path, json_object(source.path, source.config[RECORD]))
        if metadata["method"] not in METHODS:
            raise UserError(
                f"{source.path} was made with method {metadata['method']!r}; there are:"
                f" {', '.join(sorted(METHODS))}"
            )
        return Adapter(source.tensors, metadata)

    @classmethod
    def write(cls, adapter: Adapter, out: str | os.PathLike[str]) -> list[str]:
        write_safetensors(out, adapter.tensors, {RECORD: json.dumps(adapter.metadata)})
        return []
