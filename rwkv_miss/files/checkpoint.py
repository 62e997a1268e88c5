"""Checkpoint files: architecture and sizes (Arch), safe reading, and writing as a stream.

A checkpoint is torch's zip format around a flat dict, name -> tensor. This package's metadata is one more zip
record, `rwkv_miss.json`, which other readers skip.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import io
import json
import os
import pickle
import re
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .architectures import refuse_newer
from .mapped import keep
from .output import whole_file
from .untrusted import check_pickles, check_tensors, first_bytes, json_object, open_archive, refuse_stand_in

ARCHIVE = "archive"
METADATA = "rwkv_miss.json"
RUN_FORMAT = "rwkv-miss checkpoint"  # "format" of checkpoints that a run resumes from
ALIGNMENT = 64  # bytes; every tensor in a file is aligned as torch does, so that it can be used where mapped
PIECE = 1 << 18  # bytes or elements handled at once, so that a second pass finds them in the cache


@dataclasses.dataclass(frozen=True)
class Arch:
    """Version and sizes of an RWKV-6 or RWKV-7 checkpoint, in elements.

    ranks: the ranks of the built-in low-rank maps.
    """

    version: int
    vocab_size: int
    n_embd: int
    n_layer: int
    n_head: int
    head_size: int
    dim_att: int
    dim_ffn: int
    ranks: dict[str, int]
    layer0_value_residual: bool = False
    initial_state: bool = False  # att.time_state, of state tuning

    @staticmethod
    def detect(tensors: Mapping[str, Any]) -> Arch:
        """Read version and sizes from names and shapes. Raises UserError with the key that does not fit."""
        version = _version(tensors)

        def shape(name: str, dims: int = 2) -> tuple[int, ...]:
            if name not in tensors:
                raise UserError(f"this looks like RWKV-{version}, but {name} is missing")
            size = tuple(tensors[name].shape)
            if len(size) != dims:
                raise UserError(
                    f"this looks like RWKV-{version}, but {name} has shape {size}, expected {dims} dimensions"
                )
            return size

        att = "blocks.0.att."
        heads, head_size = shape(att + ("r_k" if version == 7 else "time_faaaa"))
        dim_att = shape(att + "receptance.weight")[0]
        if heads * head_size != dim_att:
            raise UserError(
                f"{att}receptance.weight has {dim_att} rows, but there are {heads} heads of {head_size}"
            )
        blocks = {int(found[1]) for name in tensors if (found := re.match(r"blocks\.(\d{1,9})\.", name))}
        # otherwise one very high layer number would build a model with that many layers
        if gap := next((i for i in range(len(blocks)) if i not in blocks), 0):
            raise UserError(
                f"this looks like RWKV-{version} with block {max(blocks)}, but block {gap} is missing; the"
                " file is damaged, or one of several"
            )
        if version == 7:
            ranks = {name: shape(f"{att}{name}1")[1] for name in "wag"}
            # block 0 never uses its value residual: some files lack it, and its rank may differ
            residual = next(
                (name for name in ("blocks.1.att.v1", "blocks.0.att.v1") if name in tensors), None
            )
            ranks["v"] = shape(residual)[1] if residual else 0
        else:
            ranks = {"maa": shape(att + "time_maa_w2", 3)[1], "decay": shape(att + "time_decay_w1")[1]}
        vocab_size, n_embd = shape("emb.weight")
        return Arch(
            version,
            vocab_size,
            n_embd,
            1 + max(blocks),
            heads,
            head_size,
            dim_att,
            shape("blocks.0.ffn.key.weight")[0],
            ranks,
            version == 7 and all(f"{att}v{i}" in tensors for i in range(3)),
            any(name.endswith(".att.time_state") for name in tensors),
        )

    @staticmethod
    def record_of(tensors: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return detect() as to_dict(); None for a model that is no RWKV."""
        with contextlib.suppress(UserError):
            return Arch.detect(tensors).to_dict()
        return None

    def describe(self) -> str:
        """Describe the model in one line for people."""
        return (
            f"RWKV-{self.version}, {self.n_layer} layers, width {self.n_embd}, {self.n_head} heads of"
            f" {self.head_size}, ffn {self.dim_ffn}, vocabulary {self.vocab_size}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; from_dict() is the inverse."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Arch:
        kinds = {f.name: {"int": int, "bool": bool}.get(f.type, dict) for f in dataclasses.fields(Arch)}
        needed = {f.name for f in dataclasses.fields(Arch) if f.default is dataclasses.MISSING}
        known = needed <= values.keys() <= kinds.keys() and all(
            type(value) is kinds[name] for name, value in values.items()
        )
        if not known or not all(type(rank) is int for rank in values["ranks"].values()):
            raise UserError(
                f"a file describes its model as {str(dict(values))[:300]}; expected are the fields"
                f" {', '.join(kinds)}"
            )
        return Arch(**values)


def _version(tensors: Mapping[str, Any]) -> int:
    refuse_newer(tensors)
    if any(name.endswith("att.r_k") for name in tensors):
        return 7
    for name in tensors:
        if ".time_mix_" in name:
            raise UserError(f"{name} belongs to RWKV-4 or RWKV-5; RWKV-6 and RWKV-7 are supported")
    if "blocks.0.att.time_maa_x" not in tensors:
        raise UserError(
            "this is no RWKV model: neither blocks.0.att.r_k (RWKV-7) nor blocks.0.att.time_maa_x (RWKV-6)"
            f" is there; the first key is {next(iter(tensors), None)!r}"
        )
    if "blocks.0.att.gate.weight" not in tensors:
        raise UserError(
            "blocks.0.att.time_maa_x is there as in RWKV-6, but blocks.0.att.gate.weight is missing"
        )
    return 6


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint by name, in the file's order; a large file is mapped, see mapped.py.

    Never runs code from the file. Raises UserError for a path that is no readable file, a truncated or
    foreign file, a pickle that asks for anything but tensors, a content that is no flat dict of plain
    tensors, and tensors larger than the file. model_files.read_tensors() also reads the other forms of a
    model.
    """
    return flat(path, load_dict(path))


def flat(path: str | os.PathLike[str], loaded: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Check that the values are plain tensors under names, and return them after mapped.keep()."""
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(
                f"{path} holds a {type(value).__name__} under {name!r}, expected a flat dict of tensors"
            )
    check_tensors(path, loaded)
    return keep(path, {name: value.detach() for name, value in loaded.items()})


def load_dict(path: str | os.PathLike[str]) -> dict[Any, Any]:
    """Load the dict in a torch file, of tensors and plain values, mapped. Raises as read_checkpoint()
    does."""
    head = first_bytes(path, 9)
    refuse_stand_in(path)
    text = head.decode("latin-1")
    if len(text) > 2 and all(character.isprintable() or character.isspace() for character in text):
        raise UserError(f"{path} is text, expected a .pth; data go to --data_file")
    zipped = head[:4] == b"PK\x03\x04"  # files of torch < 1.6 are no zip archives and can't be mapped
    for form, found in (("GGUF", head[:4] == b"GGUF"), ("safetensors", head[8:] == b"{" and not zipped)):
        if found:
            raise UserError(
                f"{path} is a {form} file, expected a .pth; python -m scripts.export --to pth makes one of a"
                " model, python -m rwkv_miss convert of an adapter"
            )
    check_pickles(path, zipped)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of the pickle protocol before it refuses the pickle
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # torch.load has no common exception for bad files: ten types were seen
        raise UserError(
            f"{path} is truncated or not a torch checkpoint ({type(error).__name__}); download or copy it"
            " again"
        ) from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__}, expected a flat dict of tensors")
    return loaded


def read_metadata(path: str | os.PathLike[str], name: str = METADATA) -> dict[str, Any] | None:
    """Read the metadata of write_checkpoint(), or None for any other file.

    name: the JSON record's name, which differs for another project's record.
    """
    if first_bytes(path, 4) != b"PK\x03\x04":
        return None
    with open_archive(path) as archive:
        record = next((record for record in archive.namelist() if record.partition("/")[2] == name), None)
        try:
            content = archive.read(record) if record else None
        except (zipfile.BadZipFile, ValueError, EOFError, OSError, RuntimeError) as error:
            raise UserError(f"{path} is damaged: {str(error)[:100]}; download or copy it again") from None
    return None if content is None else json_object(path, content)


def run_output(path: str | os.PathLike[str], metadata: Mapping[str, Any]) -> str:
    """Return the path of the trained tensors, for merge and chat, of the run that wrote this checkpoint.

    That file is in the folder that also holds the run's folder of checkpoints.
    """
    name = os.path.basename(str(metadata.get("output", "adapter.pth")))
    output = os.path.normpath(os.path.join(os.path.dirname(path), os.pardir, name))
    return output if os.path.exists(output) else f"the {name} of its run"


def refuse_run_checkpoint(path: str | os.PathLike[str], metadata: Mapping[str, Any]) -> None:
    """Raise UserError for the checkpoint of a run where a model or an adapter is needed."""
    if metadata.get("format") == RUN_FORMAT:
        raise UserError(
            f"{path} is the checkpoint from which --resume auto goes on, trained tensors and the optimizer's"
            f" state of step {metadata.get('step')}; what was trained is in {run_output(path, metadata)}"
        )


def write_checkpoint(
    path: str | os.PathLike[str],
    items: Iterable[tuple[str, Tensor]],
    metadata: dict[str, Any] | None = None,
    record: str = METADATA,
) -> None:
    """Write (name, tensor) pairs as a file that torch.load() reads as a plain dict.

    One tensor is in memory at a time. record: the name of the metadata's record, which other projects expect
    under other names.

    The file appears under its name only when it is complete and on the disk; until then, and after any
    failure, what was there stays. Raises UserError when the folder can't be written or has no room.
    """
    if os.fspath(path).endswith((".safetensors", ".gguf")):
        raise UserError(f"{path} would be a torch checkpoint under another format's name; name it .pth")
    extra = {} if metadata is None else {record: json.dumps(metadata, indent=1).encode()}
    with whole_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        index: dict[str, _Entry] = {}
        for name, tensor in items:
            tensor = tensor.detach().cpu().contiguous()
            if name in index:
                raise ValueError(f"write_checkpoint: {name} comes twice")
            if tensor.nbytes and not tensor.data_ptr():
                raise UserError(
                    f"{name} is a {type(tensor).__name__}, which has no bytes of its own; write a plain"
                    " tensor, full_tensor() of a sharded one"
                )
            index[name] = _Entry(str(len(index)), tensor)
            _write_record(archive, f"data/{len(index) - 1}", memory(tensor))
        records = {
            "data.pkl": _pickled(index),
            "byteorder": sys.byteorder.encode(),
            "version": b"3\n",
            **extra,
        }
        for name, content in records.items():
            _write_record(archive, name, memoryview(content))


def _write_record(archive: zipfile.ZipFile, name: str, data: memoryview) -> None:
    info = zipfile.ZipInfo(f"{ARCHIVE}/{name}")
    info.file_size, info.CRC = len(data), 0
    # zipfile's rule for large records, which decides the length of the header
    zip64 = info.file_size * 1.05 > zipfile.ZIP64_LIMIT
    # an extra field of type "FB", which torch uses and readers skip, moves the data to the next multiple
    place = archive.fp.tell() + len(info.FileHeader(zip64)) + 4
    padding = -place % ALIGNMENT
    info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(info, "w") as record:
        for begin in range(0, len(data), PIECE):
            record.write(data[begin : begin + PIECE])


class _Storage(tuple):
    """The persistent id under which torch's pickles refer to a record."""


class _Entry:
    """Stand-in that pickles as a tensor whose data are the record `key`, the way torch.save() writes it."""

    def __init__(self, key: str, tensor: Tensor):
        self.key, self.dtype, self.nbytes = key, tensor.dtype, tensor.nbytes
        self.shape, self.stride, self.numel = tuple(tensor.shape), tensor.stride(), tensor.numel()

    def __reduce__(self):
        place = 0, self.shape, self.stride, False, OrderedDict()
        typed = torch.storage._dtype_to_storage_type_map().get(self.dtype)
        if typed is None:  # float8 and the other dtypes that came after typed storages
            storage = _Storage(("storage", torch.UntypedStorage, self.key, "cpu", self.nbytes))
            return torch._utils._rebuild_tensor_v3, (storage, *place, self.dtype)
        return torch._utils._rebuild_tensor_v2, (
            _Storage(("storage", getattr(torch, typed), self.key, "cpu", self.numel)),
            *place,
        )


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        return tuple(obj) if isinstance(obj, _Storage) else None


def _pickled(index: dict[str, _Entry]) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(index)
    return buffer.getvalue()


def memory(tensor: Tensor) -> memoryview:
    """View the bytes of a contiguous CPU tensor without a copy; valid while the tensor lives."""
    if not tensor.nbytes:
        return memoryview(b"")  # ctypes can't view an empty tensor
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def blocks(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the elements in order, as 1-D pieces small enough to stay in the cache."""
    return iter(tensor.reshape(-1).split(PIECE))


def is_finite(tensor: Tensor) -> bool:
    """Tell whether no element is NaN or infinite."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # NaN and infinity both show in the extremes, which cost a tenth of isfinite(); torch has none for float8
    wide = (block.float() if block.element_size() == 1 else block for block in blocks(tensor))
    return all(bool(torch.stack(block.aminmax()).isfinite().all()) for block in wide)


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError that names the first tensor with a NaN or an infinity."""
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise UserError(
                f"{name} holds NaN or infinite values; the file is damaged or its training diverged"
            )
