"""Native format: this package's own files."""

from __future__ import annotations

import os

from ..files.checkpoint import write_checkpoint
from ..inject import ADAPTER_FORMAT, read_adapter
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
