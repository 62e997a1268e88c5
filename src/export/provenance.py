"""What an export says of the checkpoint that it was made from, so that the way back gives the same file:
names in their order, dtypes, shapes, and the metadata. One JSON text under KEY, in the header of safetensors
and among the keys of GGUF.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_miss.errors import UserError

KEY = "rwkv_miss.checkpoint"
FLOATS = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}
# dtype -> those that hold all its values
WITHIN = {
    torch.float32: (torch.float64,),
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float16: (torch.float32, torch.float64),
}

LARGEST_SIZE = 1 << 40  # numbers beyond, of thousands of digits each, take hours to multiply


def check_dtypes(tensors: Mapping[str, Tensor], path) -> None:
    """UserError for a model whose tensors are not all of FLOATS."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS.values():
            raise UserError(
                f"{path}: {name} is {str(tensor.dtype).removeprefix('torch.')}; expected one of"
                f" {', '.join(FLOATS)}"
            )


class Entry(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]


class Record(NamedTuple):
    """`entries` in the checkpoint's order; `metadata` as read_metadata() gives them."""

    entries: dict[str, Entry]
    metadata: dict[str, Any] | None

    @staticmethod
    def of(tensors: Mapping[str, Tensor], metadata: dict[str, Any] | None) -> Record:
        return Record({name: Entry(t.dtype, tuple(t.shape)) for name, t in tensors.items()}, metadata)

    def text(self) -> str:
        tensors = {
            name: [str(entry.dtype).removeprefix("torch."), *entry.shape]
            for name, entry in self.entries.items()
        }
        return json.dumps({"tensors": tensors, "metadata": self.metadata}, separators=(",", ":"))

    def header(self) -> dict[str, str]:
        """The texts in the header of a safetensors file with these tensors."""
        return {"format": "pt", KEY: self.text()}

    @staticmethod
    def parse(text: str, path) -> Record:
        """UserError for what text() did not write."""
        try:
            told = json.loads(text)
            entries = {
                name: Entry(FLOATS[dtype], tuple(map(int, shape)))
                for name, (dtype, *shape) in told["tensors"].items()
            }
            metadata = None if told["metadata"] is None else dict(told["metadata"])
            if not all(
                len(entry.shape) <= 4 and all(0 <= n < LARGEST_SIZE for n in entry.shape)
                for entry in entries.values()
            ):
                raise ValueError("a size that no tensor has")
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise UserError(
                f"{path} is damaged: its {KEY} can't be read ({type(error).__name__}: {str(error)[:100]})"
            ) from None
        return Record(entries, metadata)

    def check(self, tensors: Mapping[str, Tensor], path) -> None:
        """UserError unless the tensors are those of the record, up to their shapes and dtypes."""
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
        """The checkpoint's tensors, one after the other."""
        for name, (dtype, shape) in self.entries.items():
            yield name, tensors[name].to(dtype).reshape(shape)

    def rounded(self, dtypes: Mapping[str, torch.dtype]) -> list[str]:
        """Names of the tensors whose values these dtypes cannot all hold."""
        return [
            name
            for name, (dtype, _) in self.entries.items()
            if dtypes[name] != dtype and dtypes[name] not in WITHIN.get(dtype, ())
        ]
