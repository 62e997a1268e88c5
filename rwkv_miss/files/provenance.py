"""Provenance: an export's record of its checkpoint, so that the same file can be made from the export.

The record has the names in their order, dtypes, shapes, and the metadata. It is one JSON text under KEY, in
the header of safetensors, or among the keys of GGUF.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError

KEY = "rwkv_miss.checkpoint"
FLOATS = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# dtype -> wider dtypes that hold all its values
WITHIN = {
    torch.float32: (torch.float64,),
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float16: (torch.float32, torch.float64),
}

# largest dimension: multiplying numbers with thousands of digits takes hours
LARGEST_SIZE = 1 << 40


def check_dtypes(tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Raise UserError for a tensor whose dtype is not one of FLOATS."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS.values():
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{path}: {name} is {dtype}; expected one of {', '.join(FLOATS)}")


class Entry(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]


class Provenance(NamedTuple):
    """Record of a checkpoint: `entries` in the file's order, and read_metadata()'s `metadata`."""

    entries: dict[str, Entry]
    metadata: dict[str, Any] | None

    @staticmethod
    def of(tensors: Mapping[str, Tensor], metadata: dict[str, Any] | None) -> Provenance:
        return Provenance({name: Entry(t.dtype, tuple(t.shape)) for name, t in tensors.items()}, metadata)

    def text(self) -> str:
        tensors = {}
        for name, (dtype, shape) in self.entries.items():
            tensors[name] = [str(dtype).removeprefix("torch."), *shape]
        return json.dumps({"tensors": tensors, "metadata": self.metadata}, separators=(",", ":"))

    def header(self) -> dict[str, str]:
        """Return the texts for the header of a safetensors file with these tensors."""
        return {"format": "pt", KEY: self.text()}

    @staticmethod
    def parse(text: str, path: str | os.PathLike[str]) -> Provenance:
        """Parse a record that text() wrote. Raises UserError for anything else."""
        try:
            record = json.loads(text)
            entries = {}
            for name, (dtype, *shape) in record["tensors"].items():
                entries[name] = Entry(FLOATS[dtype], tuple(map(int, shape)))
            metadata = None if record["metadata"] is None else dict(record["metadata"])
            shapes = [entry.shape for entry in entries.values()]
            if not all(len(shape) <= 4 and all(0 <= n < LARGEST_SIZE for n in shape) for shape in shapes):
                raise ValueError("a size that no tensor has")
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise UserError(
                f"{path} is damaged: its {KEY} can't be read ({type(error).__name__}: {str(error)[:100]})"
            ) from None
        return Provenance(entries, metadata)

    @staticmethod
    def found(texts: Mapping[str, Any], path: str | os.PathLike[str]) -> Provenance | None:
        """Find the record among a header's texts, or among the keys of GGUF; None without one."""
        return Provenance.parse(texts[KEY], path) if KEY in texts else None

    def check(self, tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
        """Raise UserError unless the tensors have the record's names and sizes; shapes, dtypes may differ."""
        if missing := sorted(self.entries.keys() ^ tensors.keys()):
            raise UserError(
                f"{path} is damaged: {missing[0]} is either in the file or in its {KEY}, not in both"
            )
        for name, (_, shape) in self.entries.items():
            if math.prod(shape) != tensors[name].numel():
                raise UserError(
                    f"{path} is damaged: {name} has {tuple(tensors[name].shape)}, its {KEY} says {shape}"
                )

    def restored(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield the checkpoint's tensors, one after the other."""
        for name, (dtype, shape) in self.entries.items():
            yield name, tensors[name].to(dtype).reshape(shape)

    def rounded(self, dtypes: Mapping[str, torch.dtype]) -> list[str]:
        """Name the tensors whose values these dtypes cannot all hold."""
        names = []
        for name, (dtype, _) in self.entries.items():
            if dtypes[name] != dtype and dtypes[name] not in WITHIN.get(dtype, ()):
                names.append(name)
        return names
