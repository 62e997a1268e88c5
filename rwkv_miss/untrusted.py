"""What is asked of a file before and after it is read: nobody knows who wrote it. SECURITY.md says what follows from it for the user."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import UserError

LARGEST_INDEX = 1 << 24  # bytes of a pickle or of a JSON record; those of real files have a hundred or two for each tensor
BLOCK = 1 << 18


def open_archive(path) -> zipfile.ZipFile:
    """A checkpoint's zip archive. UserError for a truncated one, for compressed records, which torch never writes and would map as if they were
    not, and for an index so large that unpickling it could fill the memory."""
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        raise UserError(f"{path} is truncated or not a torch checkpoint ({str(error)[:100]}); download or copy it again") from None
    for record in archive.infolist():
        problem = ""
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
            problem = "is compressed, which no record of a checkpoint is; unpack the archive and save its tensors again with torch.save"
        elif record.filename.endswith((".pkl", ".json")) and record.file_size > LARGEST_INDEX:
            problem = f"has {record.file_size:,} bytes, far beyond what an index of tensors needs ({LARGEST_INDEX:,}); the file is refused"
        if problem:
            archive.close()
            raise UserError(f"{path}: {record.filename} {problem}")
    return archive


def parse_json(path, content: bytes) -> dict[str, Any]:
    """The JSON object in some bytes of a file."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is truncated or damaged: its JSON can't be read ({str(error)[:100]})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, expected a JSON object")
    return values


def check_sums(path) -> None:
    """UserError unless every record of a checkpoint has the checksum that was written with it; files of torch < 1.6 have none. It reads all."""
    if not zipfile.is_zipfile(path):
        return
    with open_archive(path) as archive:
        for record in archive.infolist():
            try:
                with archive.open(record) as file:
                    while file.read(BLOCK):
                        pass
            except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, OSError, RuntimeError) as error:
                raise UserError(f"{path} is damaged: {str(error)[:100]}; download or copy it again") from None


def check_tensors(path, tensors: Mapping[str, Tensor]) -> None:
    """UserError for tensors that are not plain numbers in this file: sparse, quantised or complex ones, and shapes that claim more than is there."""
    together = 0
    for name, tensor in tensors.items():
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized and not tensor.is_nested
        if not plain or tensor.is_complex() or type(tensor) not in (Tensor, torch.nn.Parameter):
            raise UserError(f"{path}: {name} is no plain tensor ({tensor.dtype}, {tensor.layout}, {tensor.device}); "
                            "save it as a dense one of real numbers")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise UserError(f"{path}: {name} claims {tuple(tensor.shape)}, {tensor.nbytes:,} bytes, and has {tensor.untyped_storage().nbytes():,}; "
                            "the file is damaged, or the tensor was expanded: save it with .contiguous()")
        together += tensor.nbytes
    size = os.path.getsize(path)
    if together > 4 * size:  # a few names may share their numbers, as tied weights do
        raise UserError(f"{path} has {size:,} bytes and claims tensors of {together:,}; the file is refused")
