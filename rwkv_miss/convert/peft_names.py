"""Names of RWKV-7's modules in the models that peft adapts.

Adapters here have the names of the `.pth`. A peft folder belongs to a model whose modules have the names of
one of Hugging Face's layouts (files/hf_names.py), or of the `.pth`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ..errors import UserError
from ..files.checkpoint import Arch
from ..files.hf_names import LAYER_TENSORS, OFFICIAL, OUTSIDE, PREFIX, official_name, plain_name

PTH = "pth"
LAYOUTS = ("official", "fla", PTH)
BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
FLA_BLOCK = re.compile(re.escape(PREFIX) + r"\.(\d+)\.(.+)")
# module of the .pth -> flash-linear-attention's; low-rank maps and vectors are no modules that peft adapts
IN_BLOCK, OUTSIDE_BLOCKS = (
    {
        mapped.names[0].removesuffix(".weight"): mapped.stored.removesuffix(".weight")
        for mapped in table
        if mapped.form == "same" and mapped.stored.endswith(".weight")
    }
    for table in (LAYER_TENSORS, OUTSIDE)
)
OURS_IN_BLOCK, OURS_OUTSIDE = (
    {fla: ours for ours, fla in table.items()} for table in (IN_BLOCK, OUTSIDE_BLOCKS)
)
# the linears of a block of RWKV-7
LINEARS = ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")
# names of modules that RWKV has, and Llama and other models do not
RWKV_ALONE = re.compile(r"model\.layers\.\d+\.(attn\.r_proj|ffn\.(key|value))")


def in_layout(layout: str, name: str) -> str:
    """Translate the name of a module, weight or bias into a layout. Raises UserError if it has none there."""
    if layout == PTH:
        return name
    renamed = _renamed(name, BLOCK, PREFIX, IN_BLOCK, OUTSIDE_BLOCKS)
    if renamed is None:
        raise UserError(f"{name} has no place in --layout {layout}, which is RWKV-7's; drop the flag")
    if layout == "official":
        return name if name.startswith("head") else official_name(name)
    return renamed


def in_pth(layout: str, name: str) -> str:
    """Invert in_layout()."""
    if layout == PTH:
        return name
    if layout == "official":
        return plain_name(name)
    renamed = _renamed(name, FLA_BLOCK, "blocks", OURS_IN_BLOCK, OURS_OUTSIDE)
    if renamed is None:
        raise UserError(
            f"{name} is no module of the .pth, where low-rank maps are plain tensors; merge the adapter with"
            " peft (merge_and_unload) and use the model's file"
        )
    return renamed


def _renamed(
    name: str, block: re.Pattern[str], prefix: str, inside: dict[str, str], outside: dict[str, str]
) -> str | None:
    module, dot, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias"):
        module, dot, leaf = name, "", ""
    found = block.fullmatch(module)
    if module in outside:
        return outside[module] + dot + leaf
    if found and found[2] in inside:
        return f"{prefix}.{found[1]}.{inside[found[2]]}{dot}{leaf}"
    return None


def layout_of(names: Iterable[str], is_rwkv: bool) -> str:
    """Recognise the layout of adapted modules; PTH if their names are in neither of Hugging Face's layouts.

    `is_rwkv`: the model is known to be an RWKV. Otherwise names that other models have, too, count as PTH.
    """
    names = list(names)
    if any(name.startswith(OFFICIAL) for name in names):
        return "official"
    of_fla = [name for name in names if FLA_BLOCK.match(name) or name in OURS_OUTSIDE]
    return "fla" if of_fla and (is_rwkv or any(map(RWKV_ALONE.match, names))) else PTH


def layout_for(arch: dict[str, Any] | None, names: Iterable[str], asked: str) -> tuple[str, list[str]]:
    """Choose (the layout to write for an adapter of a model with these sizes and linears, notes).

    Raises UserError for a layout that is not for this model. The names stay if the model is not known.
    """
    version = Arch.from_dict(arch).version if arch else None
    if version == 6 and asked not in ("", PTH):
        raise UserError(f"--layout {asked} is RWKV-7's, and the adapter is one of an RWKV-6; drop the flag")
    if asked or version == 7:
        return asked or LAYOUTS[0], []
    if version is None and any(map(BLOCK.fullmatch, names)):
        note = (
            "the names are those of the .pth, because the adapter does not name its model's sizes; for a"
            " model in a Hugging Face folder give the base's file or folder, --base MODEL, or --layout"
            " official or fla"
        )
        return PTH, [note]
    return PTH, []


def target_modules(linears: list[str], arch: dict[str, Any] | None, layout: str) -> list[str]:
    """List the target_modules for peft: last words of names if they select exactly these linears.

    This needs a known model with all linears of a kind adapted. Otherwise the list has whole names.
    """
    names = sorted(in_layout(layout, name) for name in linears)
    if layout == PTH or not arch:
        return names
    layers = Arch.from_dict(arch).n_layer
    everywhere = [in_layout(layout, f"blocks.{i}.{name}") for i in range(layers) for name in LINEARS]
    last_names = {name.rpartition(".")[2] for name in names}
    chosen = [name for name in everywhere if name.rpartition(".")[2] in last_names]
    return sorted(last_names) if sorted(chosen) == names else names
