"""GGUF files, read within bounds: no more is allocated than the file holds, and tensors stay mapped."""

from __future__ import annotations

import mmap
import os
import struct
from typing import Any

import torch
from torch import Tensor

from rwkv_miss.errors import UserError

MAGIC = b"GGUF"
# type -> struct's letter
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
UINT64 = 10
DTYPE_OF_CODE = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
LARGEST_COUNT = 1 << 20  # keys, tensors, and strings in an array
LARGEST_TEXT = 1 << 24  # bytes
LARGEST_HEADER = 1 << 25  # bytes of all keys and the list of tensors; World's vocabulary takes 2 MB of it
ALIGNMENT = 32


def read(path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read (keys, tensors by their names) of a file of version 2 or 3, with tensors of F32, F16 or BF16.

    Raises UserError for a damaged file, and for other types.
    """
    try:
        with open(path, "rb") as file:
            # private, because torch's tensors can be written to
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return _Reader(path, data).read()
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    except UserError:
        raise
    except (ValueError, struct.error, RecursionError) as error:
        raise UserError(f"{path} is truncated or damaged: {str(error)[:100]}") from None


class _Reader:
    """Reader of the header from the place `at` on; a ValueError means damage."""

    def __init__(self, path, data: mmap.mmap):
        self.path, self.data, self.at = os.fspath(path), data, 0

    def read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if self.take(4) != MAGIC or self.scalar(4) not in (2, 3):
            raise UserError(f"{self.path} is no GGUF file of version 2 or 3, little-endian")
        tensor_count, field_count = self.count(UINT64), self.count(UINT64)
        fields = {self.text(): self.value(self.scalar(4)) for _ in range(field_count)}
        infos = [self.info() for _ in range(tensor_count)]
        alignment = fields.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 16:
            raise ValueError(f"an alignment of {alignment}")
        start = -(-self.at // alignment) * alignment
        tensors = {}
        for name, shape, type_, offset in infos:
            tensors[name] = self.tensor(name, shape, type_, start + offset)
        if len(tensors) != len(infos) or sum(tensor.nbytes for tensor in tensors.values()) > len(self.data):
            raise ValueError("tensors come twice, or lie over each other")
        return fields, tensors

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise ValueError(f"{size:,} bytes are announced where {len(self.data) - self.at:,} are left")
        self.at += size
        if self.at > LARGEST_HEADER:
            raise ValueError(f"a header beyond {LARGEST_HEADER:,} bytes")
        return self.data[self.at - size : self.at]

    def scalar(self, type_: int) -> Any:
        return self.scalars(type_, 1)[0]

    def scalars(self, type_: int, count: int) -> tuple:
        letter = SCALARS[type_]
        return struct.unpack(f"<{count}{letter}", self.take(count * struct.calcsize(letter)))

    def count(self, type_: int) -> int:
        count = self.scalar(type_)
        if count > LARGEST_COUNT:
            raise ValueError(f"a count of {count:,}")
        return count

    def text(self) -> str:
        size = self.scalar(UINT64)
        if size > LARGEST_TEXT:
            raise ValueError(f"a text of {size:,} bytes")
        return self.take(size).decode()

    def value(self, type_: int) -> Any:
        if type_ == STRING:
            return self.text()
        if type_ != ARRAY:
            if type_ not in SCALARS:
                raise ValueError(f"a value of type {type_}")
            return self.scalar(type_)
        of, count = self.scalar(4), self.count(UINT64)
        if of == STRING:
            return [self.text() for _ in range(count)]
        if of not in SCALARS:
            raise ValueError(f"an array of type {of}")
        return list(self.scalars(of, count))

    def info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dims = self.text(), self.scalar(4)
        if not 1 <= dims <= 4:
            raise ValueError(f"{name!r} has {dims} dimensions")
        shape = self.scalars(UINT64, dims)[::-1]
        return name, shape, self.scalar(4), self.scalar(UINT64)

    def tensor(self, name: str, shape: tuple[int, ...], type_: int, start: int) -> Tensor:
        if type_ not in DTYPE_OF_CODE:
            raise UserError(
                f"{self.path} holds {name[:100]} in GGUF's type {type_}, in which the checkpoint's values are"
                " lost; the way back is from F32, F16 and BF16 only"
            )
        count = 1
        for n in shape:
            count *= n
        if not 0 < count * DTYPE_OF_CODE[type_].itemsize <= len(self.data) - start:
            raise ValueError(f"{name[:100]!r} of {shape} lies outside of the file")
        flat = torch.frombuffer(self.data, dtype=DTYPE_OF_CODE[type_], count=count, offset=start)
        return flat.reshape(shape)
