"""Adapter files of every project, read into this package's form and written from it.

`rwkv-miss convert IN OUT --to FORMAT`

Between reading and writing, an adapter has the content of save_adapter()'s files: tensors by their names in
the model, and metadata. A format is one file here with one class.
"""

from __future__ import annotations

import dataclasses
import os

from ..errors import UserError
from ..files.checkpoint import check_finite, refuse_run_checkpoint
from ..files.file_kinds import may_replace
from ..files.hf_names import LOADERS
from ..files.output import refuse_inputs
from ..files.wrapped import is_model

# The import registers the formats; format_of() tries them in this order.
from . import hf_export, hf_peft, lightning, own_files, rwkv_peft  # noqa: F401
from .base import with_base
from .formats import FORMATS, Adapter, Format, Hints, origin_of, refuse_what_would_be_lost
from .hf_export import layout_to_write
from .source import Source, open_source

NO_HINTS = Hints()


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Result of convert(). `notes` are for the user."""

    out: str
    source: str  # the format that was read
    to: str
    method: str
    linears: int
    tensors: int
    notes: list[str]
    layout: str = ""  # naming scheme of a peft folder, one of peft_names.LAYOUTS

    def lines(self) -> list[str]:
        """Return the lines for the user."""
        first = (
            f"{self.out}: {self.method} of {self.linears} linears, {self.tensors} tensors, from {self.source}"
            f" to {self.to}"
        )
        loader = [LOADERS[self.layout]] if self.layout in LOADERS else []
        return [first, *(f"note: {note}" for note in self.notes), *loader]


def format_of(source: Source) -> str | None:
    """Return the name of the format that reads a file, or None."""
    return next((name for name, form in FORMATS.items() if form.reads(source)), None)


def read_any(path: str | os.PathLike[str], hints: Hints = NO_HINTS) -> tuple[str, Adapter]:
    """Read an adapter, a file or folder of any project: (name of the format, the adapter).

    Raises UserError if no format reads it, or if a fact is missing from both the file and the hints.
    """
    source = open_source(path)
    if name := format_of(source):
        check_hints(path, FORMATS[name], hints)
        adapter = FORMATS[name].read(source, hints)
        check_finite(adapter.tensors)
        return name, adapter
    refuse_run_checkpoint(path, source.config)
    if is_model(source.tensors):
        raise UserError(
            f"{path} is a whole model, and an adapter is expected; where it is the one to train, give it as"
            " --load_model"
        )
    raise UserError(
        f"{path} is no adapter of a known layout; its first tensors are"
        f" {', '.join(list(source.tensors)[:3]) or 'none'}; known are: {', '.join(FORMATS)}"
    )


def check_hints(path: str | os.PathLike[str], form: type[Format], hints: Hints) -> None:
    """Raise UserError for a hint that the format does not read."""
    for name in ("origin", "alpha", "init", "profile"):
        if getattr(hints, name) not in ("", None) and name not in form.hints:
            raise UserError(
                f"{path} is {form.name}, which leaves nothing open that --{name} could say; drop the flag"
            )


def convert(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str,
    hints: Hints = NO_HINTS,
    layout: str = "",
) -> Conversion:
    """Write the adapter of `path`, a file or a folder, to `out` in the format `to`.

    layout: naming scheme of a peft folder, one of peft_names.LAYOUTS. Raises UserError before anything is
    written: for an unknown or ambiguous input, a method or a layout that the format cannot hold, and an `out`
    that is the input.
    """
    writable = [name for name, form in FORMATS.items() if form.writes]
    if to not in writable:
        raise UserError(f"--to {to!r} is unknown; choose one of: {', '.join(writable)}")
    if layout and layout not in FORMATS[to].layouts:
        layouts = ", ".join(FORMATS[to].layouts)
        raise UserError(
            f"--layout {layout!r} is unknown; choose one of: {layouts}"
            if layouts
            else f"--layout {layout} is for --to peft and lora; {to} has one layout"
        )
    refuse_inputs(out, path)
    from_form, adapter = read_any(path, hints)
    if hints.base:
        adapter = with_base(adapter, hints.base)
    adapter = dataclasses.replace(adapter, layout=layout)
    if not FORMATS[to].keeps_all:
        refuse_what_would_be_lost(adapter, to)
    may_replace(out, *FORMATS[to].replaces)
    notes = [*adapter.notes, *FORMATS[to].write(adapter, out)]
    return Conversion(
        os.fspath(out),
        from_form,
        to,
        adapter.metadata["method"],
        len(adapter.metadata["linears"]),
        len(adapter.tensors),
        notes,
        layout_to_write(adapter, origin_of(adapter, "peft"))[0] if FORMATS[to].layouts else "",
    )
