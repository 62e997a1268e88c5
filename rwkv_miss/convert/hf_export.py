"""Folders that Hugging Face peft loads: PeftModel.from_pretrained(model, folder) gives our outputs.

`--to peft` keeps the method, where peft has it; `--to lora` makes a LoRA of every method whose change of a
weight is a product of two factors, which is what servers of adapters take. Read again by hf_peft.py.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..adapter import METHODS
from ..errors import UserError
from ..files.output import write_folder, write_json
from ..files.safetensors_io import write_safetensors
from ..methods.lora import ScaledOptions
from .base import adapted_layers
from .formats import Adapter, Format, origin_of, register
from .peft_names import LAYOUTS, PTH, in_layout, layout_for, target_modules
from .source import Source

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
# in the header of TENSORS: what save_adapter() knows of a training and a configuration has no place for
PROVENANCE = "rwkv_miss_provenance"
CONSUMED = {
    "format",
    "format_version",
    "method",
    "options",
    "layout",
    "linears",
    "tied",
    "targets",
    "train_parts",
    "trainable",
    "origin",
}
PREFIX = "base_model.model."
# our name of a tensor inside a linear -> peft's
LORA = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
# what a tensor is called inside a linear
PARTS = (*LORA.values(), "miss_block", "vera_lambda_b", "vera_lambda_d")
# modules of RWKV that peft can keep a copy of, and their tensors
MODULES = {"emb": ("weight",), "head": ("weight",), "ln": ("weight", "bias")}


@dataclasses.dataclass
class Folder:
    """What is written.

    config: without the fields that all methods have. tensors: by their names in the model. notes: for the
    user.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    notes: list[str] = dataclasses.field(default_factory=list)


@register("lora")
class Lora(Format):
    """A peft folder of a LoRA, for servers of LoRA adapters. It is read as any peft folder."""

    writes = True
    layouts = LAYOUTS

    @classmethod
    def reads(cls, source: Source) -> bool:
        return False

    @classmethod
    def write(cls, adapter: Adapter, out: str | os.PathLike[str]) -> list[str]:
        own = adapter.method in ("lora", "lora_fa")
        return write_peft(adapter, own_factors if own else as_lora, out)


def write(adapter: Adapter, out: str | os.PathLike[str]) -> list[str]:
    """The adapter as the same method of peft.

    PiSSA becomes the LoRA of twice the rank: peft would change the base when it loads a PiSSA.
    """
    method = adapter.method
    if method not in FORMS:
        refuse(adapter, f"peft has no {method}")
    return write_peft(adapter, FORMS[method], out)


def refuse(adapter: Adapter, why: str) -> None:
    """UserError that names the nearest way out."""
    method = adapter.method
    if METHODS[method].adapts_linears and not (
        method == "bat" or adapter.metadata["options"].get("magnitude")
    ):
        raise UserError(f"{why}; --to lora writes the same change of the weights as a LoRA")
    raise UserError(f"{why}; merge the adapter into its base (rwkv-miss merge), or keep its own file")


def one_rank(adapter: Adapter) -> int:
    """The rank of all linears. UserError where they differ."""
    ranks = {options.rank for options in adapter.options_by_linear().values()}
    if len(ranks) > 1:
        found = ", ".join(map(str, sorted(ranks)))
        refuse(
            adapter,
            f"peft's {adapter.method} has one rank for all linears, and this adapter has {found}",
        )
    return ranks.pop()


def renamed(adapter: Adapter, names: dict[str, str]) -> dict[str, Tensor]:
    """The tensors of all linears, with peft's names for ours."""
    return {
        f"{linear}.{theirs}": tensor_of(adapter, f"{linear}.{ours}")
        for linear in adapter.metadata["linears"]
        for ours, theirs in names.items()
    }


def tensor_of(adapter: Adapter, name: str) -> Tensor:
    if name not in adapter.tensors:
        raise UserError(
            f"the adapter has no {name}, which its method, {adapter.method}, needs; the file is damaged"
        )
    return adapter.tensors[name]


def as_miss(adapter: Adapter) -> Folder:
    """D as it is: peft's layout is "stride", its sums are plain."""
    options = next(iter(adapter.options_by_linear().values()))
    for name, value in {
        "layout": "stride",
        "shards": "plain",
        "scale": "sum",
        "magnitude": False,
        "expand": False,
    }.items():
        if getattr(options, name) != value:
            refuse(adapter, f"peft's MiSS has no {name}={getattr(options, name)}")
    mini = options.mini_r
    config = {
        "peft_type": "MISS",
        "r": one_rank(adapter),
        "miss_dropout": 0.0,
        "mini_r": mini or 1,
        "init_weights": "mini" if mini else True,
    }
    return Folder(config, renamed(adapter, {"miss": "miss_block"}))


def as_bat(adapter: Adapter) -> Folder:
    """D by output blocks, peft's order."""
    order = next(iter(adapter.options_by_linear().values())).order
    if order != "col":
        refuse(
            adapter,
            f"peft's Bat has one matrix for every r outputs, this adapter for every r inputs (order={order})",
        )
    config = {
        "peft_type": "MISS",
        "r": one_rank(adapter),
        "miss_dropout": 0.0,
        "mini_r": 1,
        "init_weights": "bat",
    }
    return Folder(config, renamed(adapter, {"bat": "miss_block"}))


def own_factors(adapter: Adapter) -> Folder:
    """LoRA, LoRA-FA and DoRA with their own A, B and alpha."""
    method, options = adapter.method, adapter.options_by_linear()
    names = {ours: theirs for ours, theirs in LORA.items() if method == "dora" or ours != "magnitude"}
    config = lora_config(
        {name: own.rank for name, own in options.items()},
        {name: own.alpha for name, own in options.items()},
        next(iter(options.values())),
        use_dora=method == "dora",
    )
    notes = ["peft trains A as well: in the folder LoRA-FA is a LoRA"] if method == "lora_fa" else []
    return Folder(config, renamed(adapter, names), notes)


def as_lora(adapter: Adapter) -> Folder:
    """The product of two factors that the change of each weight is, with alpha = rank: a factor of 1.

    For MiSS A has zeros and ones, and B is D^T.
    """
    method = adapter.method
    tensors, ranks = {}, {}
    for name, layer in adapted_layers(adapter):
        with torch.no_grad():
            factors = layer.low_rank()
        if factors is None:
            own = f"{method} with a magnitude" if method == "miss" else method
            way = (
                "; --to peft writes it"
                if method == "dora" or method == "bat" and layer.by_row is False
                else ""
            )
            raise UserError(
                f"the change of a weight by {own} is no product of two factors{way}; merge the adapter into"
                " its base (rwkv-miss merge)"
            )
        A, B = (factor.float().contiguous() for factor in factors)
        tensors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
        ranks[name] = len(A)
    return Folder(
        lora_config(ranks, ranks, ScaledOptions(dropout=adapter.metadata["options"].get("dropout", 0.0))),
        tensors,
    )


def lora_config(
    ranks: dict[str, int], alphas: dict[str, float], options: ScaledOptions, use_dora: bool = False
) -> dict[str, Any]:
    """peft's fields for each linear's rank and alpha.

    r and lora_alpha are what most linears have; the others have patterns.
    """
    if not all(map(math.isfinite, alphas.values())):
        raise UserError("an alpha of the adapter is infinite; the file is damaged")
    rank, alpha = (collections.Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": number(alpha),
        "rank_pattern": patterns(ranks, rank),
        "alpha_pattern": patterns(alphas, alpha),
        "use_rslora": options.rslora,
        "lora_dropout": options.dropout,
        "use_dora": use_dora,
        "init_lora_weights": True,
        "fan_in_fan_out": False,
    }


def number(value: float) -> float:
    """An int where it is one, which is what peft declares."""
    return int(value) if value == int(value) else value


def compiled(patterns: dict[str, Any]) -> list[tuple[re.Pattern, Any]]:
    """peft's patterns, expressions for the ends of names, with their values."""
    return [(re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in patterns.items()]


def matched(patterns: list[tuple[re.Pattern, Any]], name: str, default: Any) -> Any:
    """What peft takes from its patterns for a linear: the first one that fits."""
    return next((value for pattern, value in patterns if pattern.match(name)), default)


def patterns(values: dict[str, float], default: float) -> dict[str, float]:
    """peft's patterns for the linears that have another value.

    Where one's name is the end of another's, they are for all linears, by whole names.
    """
    others = [name for name in values if values[name] != default]
    for names, anchor in ((others, ""), (list(values), "^")):
        # as JSON has them, here and in peft
        found = {anchor + name: number(values[name]) for name in sorted(names)}
        expressions = compiled(found)
        if all(matched(expressions, name, default) == value for name, value in values.items()):
            return found
    raise UserError(
        f"peft's patterns can't tell linears of these names apart: {', '.join(values)}; merge the adapter"
        " (rwkv-miss merge)"
    )


def as_vera(adapter: Adapter) -> Folder:
    """The vectors and the random pair, which peft takes from the folder."""
    options = next(iter(adapter.options_by_linear().values()))
    config = {
        "peft_type": "VERA",
        "r": one_rank(adapter),
        "vera_dropout": 0.0,
        "d_initial": options.d_initial,
        "save_projection": True,
        "projection_prng_key": 0,
        "init_weights": True,
        "fan_in_fan_out": False,
    }
    shared = {name: tensor_of(adapter, name) for name in ("shared.vera_A", "shared.vera_B")}
    return Folder(
        config,
        {**renamed(adapter, {"vera_lambda_b": "vera_lambda_b", "vera_lambda_d": "vera_lambda_d"}), **shared},
    )


def as_pissa(adapter: Adapter) -> Folder:
    """A LoRA, because peft would change the base again when it loads a PiSSA."""
    note = (
        "in the folder PiSSA is a LoRA of twice the rank, for the base as it is; its factors at the start are"
        " no part of it"
    )
    return dataclasses.replace(as_lora(adapter), notes=[note])


FORMS = {
    "miss": as_miss,
    "bat": as_bat,
    "lora": own_factors,
    "lora_fa": own_factors,
    "dora": own_factors,
    "pissa": as_pissa,
    "vera": as_vera,
}


def whole_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """What is trained as a whole beside the linears, by its name in the model."""
    linears = set(adapter.metadata["linears"])
    return {
        name: t
        for name, t in adapter.tensors.items()
        if name.rpartition(".")[0] not in linears and not name.startswith("shared.")
    }


def saved_modules(whole: dict[str, Tensor]) -> list[str]:
    """The modules of these tensors, of which peft keeps a trained copy each.

    UserError for a tensor of no such module.
    """
    modules: dict[str, set[str]] = {}
    for name in whole:
        modules.setdefault(name.rpartition(".")[0], set()).add(name.rpartition(".")[2])
    for module, leaves in modules.items():
        kind = "ln" if re.fullmatch(r"ln(\d|_x|_out)", module.rpartition(".")[2]) else module
        if not module or leaves != set(MODULES.get(kind, leaves)) or not leaves <= {"weight", "bias"}:
            raise UserError(
                f"{module}.{min(leaves)} is trained as a whole, and peft keeps whole modules only, such as"
                " emb, head and the norms; merge the adapter into its base (rwkv-miss merge), or keep its"
                " own file"
            )
    return sorted(modules)


def write_peft(adapter: Adapter, form: Callable[[Adapter], Folder], out: str | os.PathLike[str]) -> list[str]:
    """Write the folder; returns the notes.

    An adapter that came from peft and stays the same method keeps its configuration.
    """
    if not adapter.metadata["linears"]:
        refuse(adapter, f"{adapter.method} of no linear is nothing that peft has")
    if adapter.shapes or adapter.metadata.get("arch"):
        for _ in adapted_layers(adapter):  # the loop alone checks every shape
            pass
    folder = form(adapter)
    origin = origin_of(adapter, "peft")
    theirs = origin.get("config", {})
    whole = whole_tensors(adapter)
    layout, notes = layout_to_write(adapter, origin)
    unchanged = same_kind(theirs, folder.config) and layout == origin_layout(origin)
    config = theirs if unchanged else new_config(adapter, folder, theirs, whole, layout)
    tensors = named_by_peft(folder.tensors, whole, origin["prefix"] if unchanged else PREFIX, layout)
    about = {
        name: value for name, value in adapter.metadata.items() if name not in CONSUMED and value is not None
    }
    header = {"format": "pt", PROVENANCE: json.dumps(about)}
    write_folder(
        out,
        {
            CONFIG: lambda path: write_json(path, config),
            TENSORS: lambda path: write_safetensors(path, tensors, header),
        },
    )
    notes = [*folder.notes, *notes]
    ratio = adapter.metadata["options"].get("lora_plus", 1)
    if ratio != 1:
        notes.append(f"lora_plus {ratio:g}, a ratio of learning rates, is no part of the folder")
    return notes


def origin_layout(origin: dict[str, Any]) -> str:
    """The layout of the folder that an adapter was read from. UserError where it is none."""
    layout = origin.get("layout", PTH)
    if layout not in LAYOUTS:
        raise UserError(f"the adapter's origin has the layout {str(layout)[:60]!r}; the file is damaged")
    return layout


def layout_to_write(adapter: Adapter, origin: dict[str, Any]) -> tuple[str, list[str]]:
    """(the layout, notes): the one that was asked for, or that the folder had, or that fits the model."""
    if origin and not adapter.layout:
        return origin_layout(origin), []
    return layout_for(adapter.metadata.get("arch"), adapter.metadata["linears"], adapter.layout)


def same_kind(theirs: dict[str, Any], ours: dict[str, Any]) -> bool:
    """Whether two of peft's configurations are of one method."""
    same_type = theirs.get("peft_type") == ours["peft_type"]
    return same_type and bool(theirs.get("use_dora")) == bool(ours.get("use_dora"))


def new_config(
    adapter: Adapter, folder: Folder, theirs: dict[str, Any], whole: dict[str, Tensor], layout: str
) -> dict[str, Any]:
    """A configuration; what it says of the model is from theirs, where the adapter came from peft."""
    about_model = ("task_type", "base_model_name_or_path", "auto_mapping", "revision")
    linears, arch = adapter.metadata["linears"], adapter.metadata.get("arch")
    named = {}
    for field in ("rank_pattern", "alpha_pattern"):
        if field in folder.config:
            named[field] = {
                "^" * name.startswith("^") + in_layout(layout, name.removeprefix("^")): value
                for name, value in folder.config[field].items()
            }
    return {
        "target_modules": target_modules(linears, arch, layout),
        "modules_to_save": [in_layout(layout, module) for module in saved_modules(whole)] or None,
        "bias": "none",
        **{field: theirs.get(field) for field in about_model},
        "inference_mode": True,
        **folder.config,
        **named,
    }


def named_by_peft(
    linears: dict[str, Tensor], whole: dict[str, Tensor], prefix: str, layout: str
) -> dict[str, Tensor]:
    """The tensors by peft's names; those that all linears share lie outside of the model.

    A tensor of a linear is named LINEAR.PART, with one of PARTS.
    """
    named = {prefix + in_layout(layout, name): tensor for name, tensor in whole.items()}
    for name, tensor in linears.items():
        if name.startswith("shared."):
            named["base_model." + name.removeprefix("shared.")] = tensor
            continue
        part = next(part for part in PARTS if name.endswith(f".{part}"))
        linear = in_layout(layout, name.removesuffix(f".{part}"))
        named[f"{prefix}{linear}.{part}"] = tensor
    return named
