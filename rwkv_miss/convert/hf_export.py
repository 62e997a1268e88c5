"""Folders that Hugging Face peft loads: PeftModel.from_pretrained(model, folder) gives our outputs.

`--to peft` keeps the method, if peft has it. `--to lora` makes a LoRA, which adapter servers take, of every
method whose change of a weight is a product of two factors. hf_peft.py reads these folders again.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..files.hf_folder import is_folder
from ..files.output import write_folder, write_json
from ..files.safetensors_io import write_safetensors
from ..targets import View, views_of
from .base import adapted_layers
from .formats import Adapter, Format, origin_of
from .peft_forms import FORMS, PARTS, Folder, as_lora, own_factors, refuse
from .peft_names import LAYOUTS, PTH, in_layout, layout_for, target_modules
from .source import Source

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
# key in the header of TENSORS: save_adapter()'s metadata that peft's configuration has no field for
PROVENANCE = "rwkv_miss_provenance"
CONSUMED = set(
    """
    format format_version views method options layout linears tied targets train_parts trainable origin
    """.split()
)
PREFIX = "base_model.model."
# module of RWKV of which peft can keep a trained copy -> its tensors
MODULES = {"emb": ("weight",), "head": ("weight",), "ln": ("weight", "bias")}


class Lora(Format):
    """A peft folder with a LoRA, for servers of LoRA adapters. Class Peft reads it."""

    name = "lora"
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
    """Write the adapter as peft's method of the same kind.

    PiSSA becomes a LoRA of twice the rank, because peft would change the base when it loads a PiSSA.
    """
    method = adapter.method
    if method not in FORMS:
        refuse(adapter, f"peft has no {method}")
    return write_peft(adapter, FORMS[method], out)


def whole_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Return the tensors that are trained as a whole, by their names in the model."""
    linears = set(adapter.metadata["linears"])
    return {
        name: t
        for name, t in adapter.tensors.items()
        if name.rpartition(".")[0] not in linears and not name.startswith("shared.")
    }


def saved_modules(whole: dict[str, Tensor]) -> list[str]:
    """Name the modules of these tensors; peft keeps a trained copy of each.

    Raises UserError for a tensor that is in none of MODULES.
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
    """Write the folder and return the notes.

    An adapter that came from peft and stays the same method keeps its configuration.
    """
    if not adapter.metadata["linears"]:
        refuse(adapter, f"{adapter.method} of no linear is nothing that peft has")
    if adapter.shapes or adapter.metadata.get("arch"):
        for _ in adapted_layers(adapter):  # making each layer checks its shapes
            pass
    folder = form(adapter)
    lookups = _views_in_peft(adapter, folder)
    origin = origin_of(adapter, "peft")
    theirs = origin.get("config", {})
    whole = whole_tensors(adapter)
    layout, notes = layout_to_write(adapter, origin)
    unchanged = same_kind(theirs, folder.config) and layout == origin_layout(origin)
    config = theirs if unchanged else new_config(adapter, folder, theirs, whole, layout)
    tensors = named_by_peft(folder.tensors, whole, origin["prefix"] if unchanged else PREFIX, layout, lookups)
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


def _views_in_peft(adapter: Adapter, folder: Folder) -> set[str]:
    """Write into the configuration how weights are stored; returns the linears that are embeddings.

    Raises UserError for a target that peft can't adapt.
    """
    kind, views = folder.config["peft_type"], views_of(adapter.metadata)
    for name, view in views.items():
        if not view.is_weight_of(name) and (kind not in ("LORA", "VERA") or kind == "VERA" and view.lookup):
            refuse(adapter, f"peft's {kind} adapts linears alone, and {name} is none")
        if view.key != f"{name}.weight" and view.index is None:
            raise UserError(
                f"{name} changes {view.key}, which a model reads, and peft has no form for that; merge the"
                " adapter into its base (rwkv-miss merge), or keep its own file"
            )
    if any(view.transposed and not view.lookup and view.index is None for view in views.values()):
        folder.config["fan_in_fan_out"] = True
    _stack_experts(folder, {name: view for name, view in views.items() if view.index is not None})
    return {name for name, view in views.items() if view.lookup}


def _stack_experts(folder: Folder, views: dict[str, View]) -> None:
    """Write the LoRAs of experts as peft has them: A (experts r, in) and B (out, r experts) of a parameter.

    A module with several parameters has a wrapper for each; the first parameter's is the innermost.
    """
    stacks: dict[str, list[str]] = {}
    for name, view in views.items():
        stacks.setdefault(view.key, []).append(name)
    modules: dict[str, list[str]] = {}
    for key, names in stacks.items():
        modules.setdefault(key.rpartition(".")[0], []).append(key)
        names.sort(key=lambda name: views[name].index)
        config = folder.config
        special = {
            n.removeprefix("^") for f in ("rank_pattern", "alpha_pattern") for n in config.get(f) or ()
        }
        whole = [views[name].index for name in names] == list(range(len(names)))
        if special & set(names) or not whole or config["use_dora"] or config["lora_dropout"]:
            raise UserError(
                f"peft has one LoRA of r and lora_alpha, without dropout, for all of {key}; merge the adapter"
                " into its base (rwkv-miss merge), or keep its own file"
            )
    for module, keys in modules.items():
        for depth, key in enumerate(reversed(keys)):
            parts = {
                factor: [folder.tensors.pop(f"{name}.lora_{factor}.weight") for name in stacks[key]]
                for factor in "AB"
            }
            wrapper = module + ".base_layer" * depth
            folder.tensors[f"{wrapper}.lora_A.weight"] = torch.cat(parts["A"])
            folder.tensors[f"{wrapper}.lora_B.weight"] = torch.stack(parts["B"], 2).flatten(1)
    if stacks:
        folder.config["target_parameters"] = list(stacks)


def origin_layout(origin: dict[str, Any]) -> str:
    """Return the layout of the folder that an adapter was read from. Raises UserError for an unknown one."""
    layout = origin.get("layout", PTH)
    if layout not in LAYOUTS:
        raise UserError(f"the adapter's origin has the layout {str(layout)[:60]!r}; the file is damaged")
    return layout


def layout_to_write(adapter: Adapter, origin: dict[str, Any]) -> tuple[str, list[str]]:
    """Choose (the layout, notes): the user's, else the layout of the original folder, else the model's."""
    if origin and not adapter.layout:
        return origin_layout(origin), []
    return layout_for(adapter.metadata.get("arch"), adapter.metadata["linears"], adapter.layout)


def same_kind(theirs: dict[str, Any], ours: dict[str, Any]) -> bool:
    """Tell whether two of peft's configurations have the same method."""
    same_type = theirs.get("peft_type") == ours["peft_type"]
    return same_type and bool(theirs.get("use_dora")) == bool(ours.get("use_dora"))


def new_config(
    adapter: Adapter, folder: Folder, theirs: dict[str, Any], whole: dict[str, Tensor], layout: str
) -> dict[str, Any]:
    """Build a configuration; facts about the model come from `theirs`, if the adapter came from peft.

    Its base, task and class are those that AutoPeftModel asks for; a .pth is no base that peft can load.
    """
    views, arch = views_of(adapter.metadata), adapter.metadata.get("arch")
    library, _, model_class = (adapter.metadata.get("model_class") or "").rpartition(".")
    model = {
        "task_type": "CAUSAL_LM" if arch and is_folder(adapter.base) else None,
        "base_model_name_or_path": (
            adapter.base if is_folder(adapter.base) else None if arch else adapter.metadata.get("base")
        ),
        "auto_mapping": {"base_model_class": model_class, "parent_library": library} if library else None,
        "revision": None,
    }
    linears = [name for name, view in views.items() if view.index is None]
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
        **{field: theirs.get(field) or value for field, value in model.items()},
        "inference_mode": True,
        **folder.config,
        **named,
    }


def named_by_peft(
    linears: dict[str, Tensor], whole: dict[str, Tensor], prefix: str, layout: str, lookups: set[str]
) -> dict[str, Tensor]:
    """Rename the tensors as peft does; tensors that all linears share are outside of the model.

    A tensor of a linear is named LINEAR.PART, with a PART of PARTS.
    """
    named = {prefix + in_layout(layout, name): tensor for name, tensor in whole.items()}
    for name, tensor in linears.items():
        if name.startswith("shared."):
            named["base_model." + name.removeprefix("shared.")] = tensor
            continue
        part = next(part for part in PARTS if name.endswith(f".{part}"))
        linear = name.removesuffix(f".{part}")
        if linear in lookups and part.startswith("lora_") and part.endswith(".weight"):
            part = part.removesuffix(".weight").replace("lora_", "lora_embedding_")
        named[f"{prefix}{in_layout(layout, linear)}.{part}"] = tensor
    return named
