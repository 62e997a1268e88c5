"""safetensors files: read by the package of that name, and written as a stream, which the package can't."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .checkpoint import memory
from .mapped import keep
from .output import whole_file
from .untrusted import LARGEST_JSON, first_bytes, refuse_stand_in

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ALIGNMENT = 8
RECORD = "rwkv_miss"  # text in the header with the metadata of an adapter that this package wrote


def is_safetensors(path: str | os.PathLike[str]) -> bool:
    """Tell whether a file begins as safetensors do: the length of a JSON object, in 8 bytes, and `{`."""
    try:
        head = first_bytes(path, 9)
    except UserError:
        return False  # the next reader of the file reports the error
    return len(head) == 9 and head[8:] == b"{" and head[:4] != b"PK\x03\x04"


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors, mapped if the file is large, and the texts in the header.

    Raises UserError for a damaged file, or if the package is absent.
    """
    with _opened(path) as file:
        tensors = keep(path, {name: file.get_tensor(name) for name in file.keys()})
        return tensors, dict(file.metadata() or {})


def read_header(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the texts in the header alone."""
    with _opened(path) as file:
        return dict(file.metadata() or {})


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Open a safetensors file; errors inside the block become UserErrors."""
    refuse_stand_in(path)
    try:
        import safetensors
    except ImportError:
        raise UserError(
            f"{path} is a safetensors file, and the package that reads those is absent: pip install"
            " safetensors"
        ) from None
    header = int.from_bytes(first_bytes(path, 8), "little")
    if header > LARGEST_JSON:
        raise UserError(
            f"{path} has a header of {header:,} bytes, expected are {LARGEST_JSON:,} at the most; the file is"
            " refused"
        )
    try:
        with safetensors.safe_open(path, "pt") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is truncated or damaged: {str(error)[:200]}") from None


def file_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Sort names: larger dtypes first, so that each tensor is aligned; then by name, so that the same tensors
    give the same file."""
    return sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
    values: Iterator[tuple[str, Tensor]] | None = None,
) -> None:
    """Write tensors bit for bit, or in another dtype, whole or not at all, with texts in the header.

    values: (name, tensor) in file_order(), if `tensors` have shapes and dtypes alone.

    Raises UserError for a dtype that the format lacks.
    """
    tensors = {name: tensors[name] for name in file_order(tensors)}
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise UserError(
                f"{path} can't be written: {name} is {tensor.dtype}; safetensors has"
                f" {', '.join(DTYPE_NAMES.values())}"
            )
        kept = dtype or tensor.dtype
        begin, end = end, end + tensor.numel() * kept.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[kept],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with whole_file(path, 8 + len(text) + end) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        values = values or iter(tensors.items())
        for name, form in tensors.items():
            given, tensor = next(values)
            if (given, tensor.shape, tensor.dtype) != (name, form.shape, form.dtype):
                raise ValueError(f"write_safetensors: {given} comes in the place of {name}")
            tensor = tensor.detach().cpu().to(dtype or tensor.dtype).contiguous()
            file.write(memory(tensor))
