"""Checks of files from strangers, before and after they are read.

SECURITY.md explains them to users.
"""

from __future__ import annotations

import io
import json
import os
import pickletools
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .hub_names import hint

# bytes of a pickle: real ones have 100 to 200 for each tensor, and torch takes a second for a megabyte
LARGEST_INDEX = 1 << 22
LARGEST_JSON = 1 << 24  # bytes of a JSON record, file or header
READ_AT_ONCE = 1 << 18  # bytes
NEWEST_PROTOCOL = 3  # newest protocol of pickle that torch.load(weights_only=True) reads
# names that a pickle of plain tensors uses; torch allows more, some of which allocate as much as a file says
PLAIN = re.compile(
    r"collections OrderedDict|torch (Size|\w+Storage|bool|(u?int|b?float|complex)\d+\w*)|torch\.storage"
    r" UntypedStorage|"
    r"torch\._utils _rebuild_(tensor(_v[23])?|parameter(_with_state)?)"
)
NUMBERS = {"BININT", "BININT1", "BININT2", "BINFLOAT", "NONE", "NEWTRUE", "NEWFALSE"}  # codes of a pickle
NUMBERS_IN = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
# exceptions of zipfile for a damaged archive
DAMAGE = (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, OSError, RuntimeError)
# in a file of torch < 1.6: magic number, protocol, machine types, the tensors, the keys of their storages
LEGACY_PICKLES = 5


def first_bytes(path: str | os.PathLike[str], count: int) -> bytes:
    """Read the first bytes of a file; a path that can't be read is refused here."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        # a pipe can be read only once, and opening it may wait for ever
        raise UserError(f"{path} is no regular file")
    try:
        with open(path, "rb") as file:
            head = file.read(count)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist{hint(os.fspath(path))}") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    if not head:
        raise UserError(f"{path} is empty")
    return head


def refuse_stand_in(path: str | os.PathLike[str]) -> None:
    """Raise UserError for a web page or a Git LFS pointer in the place of a file with tensors."""
    head = first_bytes(path, 256).lstrip().lower()
    if head.startswith((b"<!doctype html", b"<html")):
        raise UserError(
            f"{path} is a web page, not a model: open the address that it came from, or take the link"
            " with /resolve/ in the place of /blob/"
        )
    if head.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{path} is a Git LFS pointer, not the file itself: git lfs pull where it was cloned, or download"
            " the file"
        )


def open_archive(path: str | os.PathLike[str]) -> zipfile.ZipFile:
    """Open a checkpoint's zip archive. Raises UserError for
    - a truncated archive,
    - compressed records: torch never writes them, and would map the compressed bytes as numbers,
    - an index so large that unpickling it could fill the memory,
    - records that overlap: reading them all would take for ever.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        raise UserError(
            f"{path} is truncated or not a torch checkpoint ({str(error)[:100]}); download or copy it again"
        ) from None
    if sum(record.compress_size for record in archive.infolist()) > os.path.getsize(path):
        archive.close()
        raise UserError(
            f"{path} is damaged: its records have more bytes together than the file; download or copy it"
            " again"
        )
    limits = {".pkl": LARGEST_INDEX, "json": LARGEST_JSON}
    for record in archive.infolist():
        problem, limit = "", limits.get(record.filename.lower()[-4:])  # torch finds names in capitals, too
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
            problem = (
                "is compressed, which no record of a checkpoint is; unpack the archive and save its tensors"
                " again with torch.save"
            )
        elif limit and record.file_size > limit:
            problem = (
                f"has {record.file_size:,} bytes, far beyond what an index of tensors needs ({limit:,}); the"
                " file is refused"
            )
        if problem:
            archive.close()
            raise UserError(f"{path}: {record.filename} {problem}")
    return archive


def check_pickles(path: str | os.PathLike[str], zipped: bool) -> None:
    """Raise UserError if a checkpoint's pickles ask for anything but plain tensors, or hold a tuple twice.

    A tuple that holds another one twice, at many levels, is a small file, but hashing it takes for ever.
    """
    try:
        if not zipped:
            with open(path, "rb") as file:
                head = io.BytesIO(file.read(LARGEST_INDEX))
            if head.getvalue()[:1] != b"\x80":
                raise ValueError("no pickle of protocol 2")
            for _ in range(LEGACY_PICKLES):
                _check_pickle(path, head)
            return
        with open_archive(path) as archive:
            for record in archive.infolist():
                if record.filename.lower().endswith(".pkl"):
                    _check_pickle(path, io.BytesIO(archive.read(record)))
    except UserError:
        raise
    except Exception as error:  # pickletools and zipfile have no common exception for damage
        raise UserError(
            f"{path} is truncated or not a torch checkpoint ({type(error).__name__}); download or copy it"
            " again"
        ) from None


def _check_pickle(path, stream: io.BytesIO) -> None:
    tuples, tuple_is_last = set(), False  # places of tuples in the pickle's memo
    numbers = 0  # number codes directly before this code, up to the most that a tuple's code takes
    for code, argument, _ in pickletools.genops(stream):
        if code.name == "PROTO" and argument > NEWEST_PROTOCOL:
            raise UserError(
                f"{path} is refused: its pickle asks for protocol {argument}, which torch reads only in a way"
                " that could run code from the file; save it with torch.save(tensors, path), without"
                " pickle_protocol"
            )
        if (
            code.name in ("STACK_GLOBAL", "INST", "OBJ")
            or code.name == "GLOBAL"
            and not PLAIN.fullmatch(argument)
        ):
            wanted = argument.replace(" ", ".", 1)[:200] if code.name == "GLOBAL" else "more than tensors"
            raise UserError(
                f"{path} is refused: its pickle asks for {wanted}, which could run code and which plain"
                " tensors do not need; save it as a flat dict of dense tensors"
            )
        if "PUT" in code.name and tuple_is_last:
            tuples.add(argument)
        elif "GET" in code.name and argument in tuples:
            raise UserError(
                f"{path} is refused: its pickle holds a tuple in several places; save it as a flat dict of"
                " dense tensors"
            )
        # a tuple of numbers alone, such as an optimizer's betas, can't grow and may be repeated
        of_numbers = 0 < NUMBERS_IN.get(code.name, 0) <= numbers
        of_others = code.name.startswith("TUPLE") and not of_numbers
        tuple_is_last = of_others or "PUT" in code.name and tuple_is_last
        numbers = min(numbers + 1, max(NUMBERS_IN.values())) if code.name in NUMBERS else 0


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the JSON object in a small file."""
    first_bytes(path, 1)
    with open(path, "rb") as file:
        content = file.read(LARGEST_JSON + 1)
    if len(content) > LARGEST_JSON:
        raise UserError(
            f"{path} has {os.path.getsize(path):,} bytes, far beyond what a configuration needs"
            f" ({LARGEST_JSON:,}); the file is refused"
        )
    return json_object(path, content)


def json_object(path: str | os.PathLike[str], content: bytes) -> dict[str, Any]:
    """Parse the JSON object in some bytes of a file."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is truncated or damaged: its JSON can't be read ({str(error)[:100]})"
        ) from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, expected a JSON object")
    return values


def check_sums(path: str | os.PathLike[str]) -> None:
    """Raise UserError unless every record of a checkpoint has its recorded checksum; reads the whole file.

    Files of torch < 1.6 have no checksums.
    """
    if not zipfile.is_zipfile(path):
        return
    with open_archive(path) as archive:
        for record in archive.infolist():
            try:
                with archive.open(record) as file:
                    while file.read(READ_AT_ONCE):
                        pass
            except DAMAGE as error:
                raise UserError(f"{path} is damaged: {str(error)[:100]}; download or copy it again") from None


def check_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError for sparse, quantised or complex tensors, and shapes larger than the file's data."""
    together = 0
    for name, tensor in tensors.items():
        plain = (
            tensor.layout == torch.strided
            and tensor.device.type == "cpu"
            and not tensor.is_quantized
            and not tensor.is_nested
        )
        if not plain or tensor.is_complex() or type(tensor) not in (Tensor, torch.nn.Parameter):
            raise UserError(
                f"{path}: {name} is no plain tensor ({tensor.dtype}, {tensor.layout}, {tensor.device}); "
                "save it as a dense one of real numbers"
            )
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise UserError(
                f"{path}: {name} claims {tuple(tensor.shape)}, {tensor.nbytes:,} bytes, and has"
                f" {tensor.untyped_storage().nbytes():,}; the file is damaged, or the tensor was expanded:"
                " save it with .contiguous()"
            )
        together += tensor.nbytes
    size = os.path.getsize(path)
    if together > 4 * size:  # a few names may share their numbers, as tied weights do
        raise UserError(f"{path} has {size:,} bytes and claims tensors of {together:,}; the file is refused")
