"""The language model inside a larger checkpoint, written as a base of its own: rwkv-miss extract-base."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter

from torch import Tensor

from .errors import UserError, printable
from .files.architectures import refuse_newer
from .files.checkpoint import Arch, check_finite, flat, load_dict, write_checkpoint
from .files.file_kinds import may_replace
from .files.output import refuse_inputs, require_writable
from .files.safetensors_io import is_safetensors, read_safetensors
from .files.wrapped import PART, contained, plain_names, renamed, without_prefixes
from .flags import flag, options
from .progress import tensors_with_progress


@dataclasses.dataclass(frozen=True)
class Extraction:
    """Result of extract_base(). left_out: tensors by the first part of their names."""

    out: str
    model: str
    tensors: int
    left_out: dict[str, int]
    notes: list[str]

    def lines(self) -> list[str]:
        """Return the lines for the user."""
        lines = [f"{self.out}: {self.model}, {self.tensors} tensors"]
        if self.left_out:
            parts = ", ".join(f"{count} of {printable(part)}" for part, count in self.left_out.items())
            lines.append(f"note: left out are the tensors of other parts: {parts}")
        return lines + [f"note: {note}" for note in self.notes]


def extract_base(
    path: str | os.PathLike[str], out: str | os.PathLike[str], prefix: str = PART, shown: bool = False
) -> Extraction:
    """Write the RWKV whose tensors begin with `prefix` in a larger checkpoint as a plain .pth.

    shown: show a bar on stderr in long work. Raises UserError, before anything is written, if no tensor has
    the prefix, if those that have it are no whole RWKV-6 or 7, or if `out` is the input or would overwrite a
    model.
    """
    refuse_inputs(out, path)
    model, notes = _read(path)
    named = renamed(path, model, lambda name: _of_part(name, prefix))
    inside = {name.removeprefix(prefix): tensor for name, tensor in named.items() if name.startswith(prefix)}
    parts = Counter(name.partition(".")[0] + "." for name in named if not name.startswith(prefix))
    if not inside:
        first = ", ".join(printable(part) for part, _ in parts.most_common(8))
        raise UserError(
            f"{path} has no tensors that begin with {prefix}; there are: {first or 'none'}. --prefix names"
            " another part; a file that is an RWKV already needs no extraction"
        )
    tensors, more = plain_names(path, inside)
    refuse_newer(tensors, os.fspath(path))
    arch = Arch.detect(tensors)
    check_finite(tensors)
    may_replace(out)
    size = sum(tensor.nbytes for tensor in tensors.values())
    require_writable(out, size)
    write_checkpoint(out, tensors_with_progress(iter(tensors.items()), "writing the base", size, shown))
    return Extraction(os.fspath(out), arch.describe(), len(tensors), dict(parts), notes + more)


def _of_part(name: str, prefix: str) -> str:
    """Strip the prefixes of trainers from a name that then begins with `prefix`; other names stay."""
    plain = without_prefixes(name, prefix)
    return plain if plain.startswith(prefix) else name


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], list[str]]:
    """Read (all tensors of a file under their names in the file, notes)."""
    if is_safetensors(path):
        return read_safetensors(path)[0], []
    loaded, notes = contained(path, load_dict(path))
    return flat(path, loaded), notes


@options
class ExtractBase:
    """rwkv-miss extract-base."""

    input: str = flag(
        help="a .pth or safetensors file, such as a multimodal model's",
        positional=True,
        metavar="IN",
        file=True,
    )
    out: str = flag(positional=True, metavar="OUT")
    prefix: str = flag(PART, "beginning of the names of the RWKV's tensors [%(default)s]")

    def run(self) -> None:
        for line in extract_base(self.input, self.out, self.prefix, shown=True).lines():
            print(line)
