"""Export for other programs: GGUF, a folder for Hugging Face's transformers, safetensors, files of Ai00.

All but the last have a way back. An adapter becomes a GGUF LoRA, or states for Ai00.

Each form is one file here. It keeps a record of the checkpoint (rwkv_miss/files/provenance.py), so that the
way back gives the same file. Imports common, config, ops, model and data.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_miss.errors import UserError
from rwkv_miss.files.checkpoint import Arch, check_finite
from rwkv_miss.files.file_kinds import GGUF, SAFETENSORS, may_replace
from rwkv_miss.files.hf_names import LOADERS
from rwkv_miss.files.model_files import model_metadata
from rwkv_miss.files.output import check_folder, refuse_inputs, require_writable
from rwkv_miss.files.provenance import Provenance, check_dtypes
from rwkv_miss.files.safetensors_io import write_safetensors
from rwkv_miss.flags import flag

from ..common.formatting import counted, size_text
from ..config.validate import check_bos
from ..data.bos import HELP as BOS_HELP
from ..data.bos import bos_ids
from ..data.chat_template import Template
from ..data.templates import TEMPLATE_FLAG, TOOL_STYLE_FLAG, choose_template
from ..data.tokenizer import Tokenizer, load_tokenizer
from ..model import RWKV, read_model_file
from . import adapters, ai00, gguf, hugging_face
from .hugging_face import LAYOUTS
from .to_checkpoint import form_of, to_checkpoint
from .vocabulary import vocabulary_of

NAMES = {
    "gguf": "a GGUF file",
    "hf": "a Hugging Face folder",
    "safetensors": "a safetensors file",
    "ai00": "a file of Ai00",
    "pth": "a checkpoint",
}
TARGETS = tuple(NAMES)


@dataclasses.dataclass(frozen=True)
class TextSettings:
    """Flags about texts and their tokens, as everywhere; tokenizer may be "none" as well.

    auto and recorded stand for the file's own record.
    """

    tokenizer: str = flag(
        "auto",
        "tokenizer for gguf and hf, as in train.py, or none; auto: the model's record, else World"
        " [%(default)s]",
    )
    eod: str = flag("", "as in train.py")
    template: str = flag(**TEMPLATE_FLAG)
    tool_style: str = flag(**TOOL_STYLE_FLAG)
    bos: str = flag("recorded", BOS_HELP)


@dataclasses.dataclass(frozen=True)
class CheckedModel:
    """Checked model."""

    path: str
    arch: Arch
    tensors: dict[str, Tensor]  # by the checkpoint's names, mapped from the file
    metadata: dict[str, Any] | None  # None without metadata in the file

    def provenance(self) -> Provenance:
        return Provenance.of(self.tensors, self.metadata)


@dataclasses.dataclass(frozen=True)
class Exported:
    """Result of export()."""

    out: str
    to: str
    model: str
    bytes: int
    notes: list[str]  # notes for the user
    layout: str = ""  # a Hugging Face folder's layout

    def lines(self) -> list[str]:
        """Return the lines for the user."""
        return [
            f"{self.out}: {self.to}, {self.model}, {size_text(self.bytes)}",
            *(f"note: {note}" for note in self.notes),
            *([LOADERS[self.layout]] if self.layout else []),
        ]


def export(
    path,
    out,
    to: str,
    kind: str = "",
    layout: str = "",
    drop_state: bool = False,
    settings: TextSettings | None = None,
) -> Exported:
    """Write the model of `path` to `out` in the form `to`: a checkpoint to any, the others to pth.

    An adapter becomes a LoRA in GGUF, or states for Ai00. kind: GGUF's type of the large matrices, one of
    gguf.FILE_TYPES, by default BF16. layout: of a Hugging Face folder, one of hugging_face.LAYOUTS, by
    default the first. drop_state: leave out an initial state that the form cannot hold. settings: for gguf
    and hf, by default the file's record. Raises UserError, before anything is written, for a path without a
    merged model or an adapter that the form holds, for a model that the readers of the form would compute
    wrongly, and for a missing package.
    """
    settings = settings or TextSettings()
    _check_flags(to, kind, layout, settings, drop_state)
    _check_output(path, out, to)
    file_form = form_of(path)
    if file_form == to:
        raise UserError(f"{path} is {NAMES[to]} already")
    if to in adapters.WRITERS and (adapter := adapters.adapter_at(path)):
        if settings != TextSettings() or drop_state:
            raise UserError(f"{path} is an adapter; flags about texts and --drop_state are for models")
        written, write = adapters.WRITERS[to]
        notes = write(path, adapter, out, kind or gguf.DEFAULT_TYPE)
        described = f"{adapter.method} of {counted(len(adapter.tensors), 'tensor')}"
        return Exported(os.fspath(out), written, described, _size(out), adapter.notes + notes)
    if to == "pth":
        form, arch, notes = to_checkpoint(path, out)
        return Exported(os.fspath(out), f"checkpoint from {form}", arch.describe(), _size(out), notes)
    if file_form != "pth":
        raise UserError(f"{path} is {NAMES[file_form]}; make a checkpoint of it first, with --to pth")
    model = read_model(path)
    written, notes = to, []
    if to == "safetensors":
        check_finite(model.tensors)
        write_safetensors(out, model.tensors, model.provenance().header())
    elif to == "ai00":
        ai00.check(model.arch)
        check_finite(model.tensors)
        notes = ai00.write(out, model.tensors, model.provenance())
    else:
        model, notes = _without_state(model, to, drop_state)
        if to == "hf":
            layout = layout or LAYOUTS[0]
            written = f"Hugging Face folder, layout {layout}"
            notes += _write_folder(model, out, layout, settings)
        else:
            kind = kind or gguf.DEFAULT_TYPE
            written = f"GGUF {kind}"
            notes += _write_gguf(model, out, kind, settings)
    return Exported(os.fspath(out), written, model.arch.describe(), _size(out), notes, layout)


def unfit(path, to: str, has_state: bool = False) -> str:
    """Tell from its shapes why a model can't have the form gguf or ai00; "" if nothing speaks against it.

    has_state: the exported model will have an initial state in addition to the tensors of `path`.
    """
    try:
        arch = Arch.detect(read_model_file(path))
        if to == "gguf":
            _refuse_state(path, arch.initial_state or has_state, to)
            gguf.check(arch, gguf.DEFAULT_TYPE)
        elif to == "ai00":
            ai00.check(arch)
    except (UserError, OSError) as error:
        return str(error)
    return ""


def _check_output(path, out, to: str) -> None:
    """Raise UserError if `out` is the input, can't be written, or is a file of another kind."""
    refuse_inputs(out, path)
    if os.path.isdir(path) and Path(os.path.realpath(path)) in Path(os.path.realpath(out)).parents:
        raise UserError(f"{out} lies in the input's folder, {path}; choose a name outside of it")
    if to == "hf":
        check_folder(out, [])
    else:
        require_writable(out)
        may_replace(out, {"gguf": GGUF, "safetensors": SAFETENSORS, "ai00": SAFETENSORS}.get(to, ""))


def _write_folder(model: CheckedModel, out, layout: str, settings: TextSettings) -> list[str]:
    """Check the model and write it for Hugging Face; returns notes."""
    hugging_face.check(model.arch, layout)
    chosen = _chosen(model, settings)
    check_finite(model.tensors)
    return hugging_face.write(out, layout, model.tensors, model.arch, *chosen, model.provenance())


def _write_gguf(model: CheckedModel, out, kind: str, settings: TextSettings) -> list[str]:
    """Check the model and write it for llama.cpp; returns notes."""
    notes = gguf.check(model.arch, kind)
    vocabulary = vocabulary_of(*_chosen(model, settings), model.arch.vocab_size)
    check_finite(model.tensors)
    name = Path(model.path).stem
    left_out = gguf.write(out, model.tensors, model.arch, kind, name, vocabulary, model.provenance())
    return notes + vocabulary.notes + left_out


def _check_flags(to: str, kind: str, layout: str, settings: TextSettings, drop_state: bool) -> None:
    if to not in TARGETS:
        raise UserError(f"--to {to!r} is unknown; choose one of: {', '.join(TARGETS)}")
    if kind and to != "gguf":
        raise UserError(f"--type {kind} is for gguf; {to} has the checkpoint's own dtypes")
    if layout and to != "hf":
        raise UserError(f"--layout {layout} is for hf; {to} has one layout")
    if layout not in ("", *LAYOUTS):
        raise UserError(f"--layout {layout!r} is unknown; choose one of: {', '.join(LAYOUTS)}")
    if to not in ("gguf", "hf") and (settings != TextSettings() or drop_state):
        raise UserError(
            f"--tokenizer, --eod, --template, --tool_style, --bos and --drop_state are for gguf and hf; {to}"
            " holds all tensors and no tokenizer"
        )
    check_bos(settings.bos)


def _size(path) -> int:
    if os.path.isdir(path):
        return sum(file.stat().st_size for file in Path(path).iterdir())
    return os.path.getsize(path)


def read_model(path) -> CheckedModel:
    """Read a model with exactly the tensors of its version. Raises UserError for anything else."""
    tensors = read_model_file(path)
    arch = Arch.detect(tensors)
    with torch.device("meta"):
        RWKV(arch).check(tensors, path)
    check_dtypes(tensors, path)
    return CheckedModel(os.fspath(path), arch, tensors, model_metadata(path))


def _without_state(model: CheckedModel, to: str, drop: bool) -> tuple[CheckedModel, list[str]]:
    """Return (the model without its initial state, notes). Raises UserError unless the user asked for it."""
    if not model.arch.initial_state:
        return model, []
    _refuse_state(model.path, not drop, to)
    tensors = {name: tensor for name, tensor in model.tensors.items() if not name.endswith(".att.time_state")}
    lost = counted(len(model.tensors) - len(tensors), "initial state")
    note = f"{lost} left out: the model answers as without its state tuning"
    return dataclasses.replace(model, tensors=tensors, arch=Arch.detect(tensors)), [note]


def _refuse_state(path, has_state: bool, to: str) -> None:
    """Raise UserError for an initial state, which may be one that training adds to the file's tensors."""
    if has_state:
        raise UserError(
            f"{path} has an initial state (att.time_state, of state tuning), for which {to} has no place: the"
            " model would answer as if it were not trained. --drop_state leaves it out all the same"
        )


def _chosen(
    model: CheckedModel, settings: TextSettings
) -> tuple[Tokenizer | None, Template, tuple[int, ...]]:
    """Choose the tokenizer (None for "none"), the chat template and the BOS: as given or recorded.

    Without a tokenizer there is no BOS.
    """
    metadata = model.metadata or {}
    spec, eod = settings.tokenizer, settings.eod
    if spec == "auto" and metadata.get("tokenizer"):
        spec, eod = metadata["tokenizer"], eod or metadata.get("eod") or ""
    tokenizer = None if spec == "none" else load_tokenizer(spec, model.arch.vocab_size, eod)
    template = choose_template(settings.template, settings.tool_style, metadata.get("template"), tokenizer)
    if tokenizer:
        return tokenizer, template, bos_ids(settings.bos, tokenizer, model.path)
    if settings.bos not in ("recorded", "none"):
        raise UserError(
            f"--bos {settings.bos} needs a tokenizer, which --tokenizer none leaves out; drop one of them"
        )
    return None, template, ()
