"""Kinds of files, by their first bytes and metadata, and whether an output may replace one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

from ..errors import UserError
from .checkpoint import read_metadata
from .output import refuse_inputs, require_writable
from .safetensors_io import RECORD, is_safetensors, read_header
from .untrusted import first_bytes, json_object

GGUF, SAFETENSORS, CHECKPOINT, OTHER = "a GGUF file", "a safetensors file", "a checkpoint", "something else"


def kind_of(path: str | os.PathLike[str]) -> str:
    """Return GGUF, SAFETENSORS, CHECKPOINT, OTHER, or the format in the metadata of our own files."""
    head = first_bytes(path, 4)
    if head == b"GGUF":
        return GGUF
    if is_safetensors(path):
        with contextlib.suppress(UserError, LookupError):
            return str(json_object(path, read_header(path)[RECORD])["format"])
        return SAFETENSORS
    if head[:1] == b"\x80":  # a bare pickle, written by torch < 1.6
        return CHECKPOINT
    if head != b"PK\x03\x04":
        return OTHER
    try:
        return str((read_metadata(path) or {}).get("format") or CHECKPOINT)
    except UserError:
        return OTHER


def may_replace(out: str | os.PathLike[str], *kinds: str) -> None:
    """Raise UserError if a model, an adapter or the like of another kind than these is at `out`.

    A user may give its path as an output by mistake.
    """
    if os.path.isfile(out) and os.path.getsize(out) and (found := kind_of(out)) not in (*kinds, OTHER):
        raise UserError(
            f"{out} is there already, {found}, and would be lost; choose another name, or remove it first"
        )


def check_output(out: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]], *kinds: str) -> None:
    """Raise UserError unless `out` is writable, is no input, and replaces at most a file of these kinds."""
    refuse_inputs(out, *inputs)
    require_writable(out)
    may_replace(out, *kinds)
