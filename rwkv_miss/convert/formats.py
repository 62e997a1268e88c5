"""Interface of a format, and what all formats use."""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..adapter import METHODS, NoOptions
from ..adapter_file import ADAPTER_FORMAT, DEFAULTS
from ..errors import UserError
from ..flags import flag
from ..targets import views_of
from .source import Source

FORMATS: dict[str, type[Format]] = {}

# value of --origin -> the project that it stands for, and how files of that project are read
ORIGINS = {
    "rwkv-peft": (
        "RWKV-PEFT from September 2024 on (Bone, Bat, DiSHA), and RWKV-LM-RLHF: blocks are those of the"
        " inputs, Bat with order row; initial states are (heads, value, key)"
    ),
    "bone-v0": (
        "the first Bone, before that: blocks are those of the outputs, Bat with order col; two dimensions are"
        " (outputs, r)"
    ),
    "openmose": (
        "RWKV-LM-RLHF with --fla 1, which its state tuning of RWKV-7 needs: as rwkv-peft, but initial states"
        " are (heads, key, value)"
    ),
    "peft": "HF peft: blocks are those of the outputs, Bat with order col",
}


@dataclasses.dataclass(frozen=True)
class Hints:
    """Facts about a file that it does not state and that the user gives.

    base: the adapter's model, for formats that need more facts about it than the adapter's file has.
    """

    origin: str = flag("", "the project that wrote the adapter, if its shapes could be two projects'")
    alpha: float | None = flag(
        None, "LoRA's alpha, if the adapter's file does not hold it", alias=("lora_alpha",)
    )
    profile: str = flag("", "RWKV-LM-RLHF's layer profile (.csv), if the alphas of LoRA differ by layer")
    init: str = flag(
        "",
        "file with PiSSA's factors at the start, if they have a file of their own",
        alias=("lora_init",),
    )
    base: str = ""

    def __post_init__(self) -> None:
        if self.origin and self.origin not in ORIGINS:
            raise UserError(f"--origin {self.origin!r} is unknown; choose one of: {', '.join(ORIGINS)}")

    def without(self, names: Iterable[str]) -> Hints:
        """Copy the hints without the named ones."""
        return dataclasses.replace(
            self, **{f.name: f.default for f in dataclasses.fields(self) if f.name in names}
        )

    def only(self, names: Iterable[str]) -> Hints:
        """Copy only the named hints, and the base."""
        return self.without({f.name for f in dataclasses.fields(self)} - {*names, "base"})


def origins(*names: str) -> str:
    """List origins for a message, each with its meaning."""
    return "; ".join(f"--origin {name} ({ORIGINS[name]})" for name in names or ORIGINS)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Tensors and metadata as save_adapter() writes them.

    A tensor's name is such as `blocks.0.att.key.miss`. "method", "options" and "linears" tell its meaning.

    metadata["origin"] keeps further facts of a foreign file, so that writing its format again gives the same
    file. `notes`: messages for the user about the reading. With Hints.base, `base` is its path and `shapes`
    has (out, in) of each adapted linear. `layout`: the one of the format's layouts that the user asks for.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    notes: list[str] = dataclasses.field(default_factory=list)
    base: str = ""
    shapes: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    layout: str = ""

    @property
    def method(self) -> str:
        return self.metadata["method"]

    @functools.cached_property
    def options(self) -> NoOptions:
        """Parse the method's options. Raises UserError for one that the method does not have."""
        return METHODS[self.method].Options.parse(self.metadata["options"])

    def options_by_linear(self) -> dict[str, NoOptions]:
        """Map linear -> its options."""
        return {name: self.options.at(name) for name in self.metadata["linears"]}


class Format:
    """One format of adapter files; a subclass has a `name`.

    A format that can only be read leaves `writes` False and does not override write().
    """

    name: ClassVar[str]
    writes: ClassVar[bool] = False
    keeps_all: ClassVar[bool] = False  # True: the format holds everything that save_adapter() writes
    # kinds of files (files/file_kinds.py) that an output may replace; for folders see files/output.py
    replaces: ClassVar[tuple[str, ...]] = ()
    hints: ClassVar[tuple[str, ...]] = ()  # the flags, such as --alpha, that read() uses
    layouts: ClassVar[tuple[str, ...]] = ()  # values of --layout, schemes for names of tensors

    def __init_subclass__(cls) -> None:
        FORMATS[cls.name] = cls

    @classmethod
    def reads(cls, source: Source) -> bool:
        """Tell whether a file has this format, by tensor names and configuration, not by the file's name."""
        raise NotImplementedError

    @classmethod
    def read(cls, source: Source, hints: Hints) -> Adapter:
        """Read the adapter. Raises UserError for a missing or wrong part, or one that is ambiguous without a
        hint."""
        raise NotImplementedError

    @classmethod
    def write(cls, adapter: Adapter, out: str | os.PathLike[str]) -> list[str]:
        """Write the adapter, whole or not at all; returns notes for the user.

        Raises UserError, before anything is written, for a method or an option that the format lacks.
        """
        raise NotImplementedError


def refuse_what_would_be_lost(adapter: Adapter, to: str) -> None:
    """Raise UserError for tensors that only this package's own files can hold.

    They are a trained tensor with two names, a trained bias of an adapted linear, and rows of tokens.
    """
    way = (
        f"which --to {to} has no form for; merge the adapter into its base (rwkv-miss merge), or keep its own"
        " file"
    )
    if tokens := adapter.metadata["tokens"]:
        raise UserError(f"rows of emb and head are trained ({len(tokens)}), {way}")
    for other, name in adapter.metadata["tied"].items():
        raise UserError(f"{name} is trained as a whole, and {other} is the same tensor, {way}")
    for linear, view in views_of(adapter.metadata).items():
        if not view.is_weight_of(linear) and to not in ("peft", "lora"):
            raise UserError(f"{linear} is no linear of RWKV, {way}")
        if f"{linear}.bias" in adapter.tensors:
            raise UserError(f"{linear}.bias is trained in addition to the linear's adapter, {way}")


def origin_of(adapter: Adapter, name: str) -> dict[str, Any]:
    """Return metadata["origin"] if a reader of this format wrote it, {} for a file of another format.

    Raises UserError if a part is missing, because a native file may come from anybody.
    """
    origin = adapter.metadata.get("origin")
    if not isinstance(origin, dict) or origin.get("format") != name:
        return {}
    for key, kind in {"peft": {"config": dict, "prefix": str}, "rwkv-lightning": {"manifest": dict}}[
        name
    ].items():
        if not isinstance(origin.get(key), kind):
            raise UserError(
                f"the adapter's origin is {str(origin)[:60]!r}, expected a {kind.__name__} under {key}; the"
                " file is damaged"
            )
    return origin


def described(method: str, options: dict[str, Any], linears: list[str], **metadata: Any) -> dict[str, Any]:
    """Build the metadata of another project's adapter, whose base is not known.

    Options are checked, and completed with the defaults.
    """
    parsed = METHODS[method].Options.parse(options)
    return {
        "format": ADAPTER_FORMAT,
        "format_version": 1,
        "method": method,
        "options": dataclasses.asdict(parsed),
        "linears": linears,
        **DEFAULTS,
        "targets": list(dict.fromkeys(name.rpartition(".")[2] for name in linears)),
        "versions": {"torch": torch.__version__},
        **metadata,
    }


def rank_options(ranks: dict[str, int]) -> dict[str, Any]:
    """Turn linear -> rank into options: `rank`, the most frequent rank, and `rank_map` for the others."""
    common = collections.Counter(ranks.values()).most_common(1)[0][0]
    return {"rank": common, "rank_map": {name: rank for name, rank in ranks.items() if rank != common}}
