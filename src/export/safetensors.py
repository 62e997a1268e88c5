"""safetensors files: the checkpoint under its own names, and the tensors of a Hugging Face folder. Written as a stream, which the package has no
function for; read by the package."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from .record import KEY, Record
from .whole import whole_file

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
PIECE = 1 << 22  # bytes written at once
ALIGNMENT = 8


def write(path, tensors: Mapping[str, Tensor], record: Record) -> None:
    """Write tensors in their order, whole or not at all, with the record in the header."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", KEY: record.text()}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with whole_file(path, 8 + len(text) + end) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            for piece in pieces(tensor):
                file.write(piece)


def pieces(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor in order, a few at a time."""
    data = tensor.contiguous().view(-1).view(torch.uint8)
    return (memoryview(part.numpy()) for part in data.split(PIECE))
