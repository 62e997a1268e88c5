"""Model files of trainers and of larger models: the plain tensors inside, and notes about the rest.

A trainer's file has the tensors in a dict within the file's dict, next to epoch numbers and the optimizer's
state, or has prefixes before their names. Both are taken off. A model inside a larger one is an error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from ..errors import UserError, listed, printable
from .hf_names import OFFICIAL

CONTAINERS = ("state_dict", "model_state_dict", "model", "module")  # keys under which trainers put tensors
PREFIXES = ("_forward_module.", "_orig_mod.", "module.", "model.")
PART = "rwkv."  # prefix of a language model's names inside a larger model
PLAIN = re.compile(r"(emb|head)\.weight|ln_out\.(weight|bias)|blocks\.\d+\..+")
SHOWN = 4  # names in a note


def contained(path: str | os.PathLike[str], loaded: Mapping[Any, Any]) -> tuple[Mapping[Any, Any], list[str]]:
    """Find (the dict with the tensors, notes) in what a torch file holds.

    Raises UserError if two dicts may be meant.
    """
    inside = [key for key in CONTAINERS if _has_tensors(loaded.get(key))]
    if not inside or any(isinstance(key, str) and PLAIN.fullmatch(key) for key in loaded):
        return loaded, []
    if len(inside) > 1:
        raise UserError(
            f"{path} holds tensors under {' and '.join(map(repr, inside))}; save the one that is meant as"
            " a flat dict with torch.save"
        )
    note = f"{path}: the tensors are those under {inside[0]!r}"
    names = [printable(key) if isinstance(key, str) else type(key).__name__ for key in loaded]
    if left_out := [name for name in names if name != inside[0]]:
        note += f"; left out: {listed(left_out, SHOWN)}"
    return loaded[inside[0]], [note]


def _has_tensors(value: Any) -> bool:
    """Tell whether a value is a dict with tensors in it."""
    return isinstance(value, Mapping) and any(isinstance(entry, Tensor) for entry in value.values())


def plain_names(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor]
) -> tuple[Mapping[str, Tensor], list[str]]:
    """Return (the tensors under RWKV's names, notes). Other models and adapters keep their names.

    Raises UserError for two tensors with one name, and for a model inside a larger one.
    """
    names = {name: without_prefixes(name) for name in tensors}
    if not is_model(names.values()):
        if is_model(name.removeprefix(PART) for name in names.values() if name.startswith(PART)):
            raise UserError(
                f"{path} is a larger model with an RWKV in it, whose tensors begin with {PART}; "
                f"python -m rwkv_miss extract-base {path} BASE.pth writes the RWKV as a base"
            )
        return tensors, []
    plain = renamed(path, tensors, without_prefixes)
    prefixes = dict.fromkeys(name.removesuffix(short) for name, short in names.items() if name != short)
    notes = [f"{path}: {' and '.join(prefixes)} is taken off the names of the tensors"] if prefixes else []
    return plain, notes


def renamed(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], rename: Callable[[str], str]
) -> dict[str, Tensor]:
    """Rename the tensors of a file. Raises UserError for two tensors with one name."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if (short := rename(name)) in result:
            raise UserError(
                f"{path} has {printable(short)} twice, with and without a prefix such as"
                f" {name.removesuffix(short) or PREFIXES[-1]}; save the right ones as a flat dict"
            )
        result[short] = tensor
    return result


def is_model(names: Iterable[str]) -> bool:
    """Tell whether these are the names of an RWKV of any version, not of another model or an adapter."""
    names = set(names)
    return "emb.weight" in names and any(name.startswith("blocks.0.") for name in names)


def without_prefixes(name: str, part: str = PART) -> str:
    """Strip the prefixes of trainers, also nested, and of the official Hugging Face layout from a name.

    The name stays if the rest is neither an RWKV's name nor begins with `part`.
    """
    rest = name
    while not (PLAIN.fullmatch(rest) or rest.startswith(part)):
        prefix = next((prefix for prefix in (*PREFIXES, OFFICIAL) if rest.startswith(prefix)), None)
        if prefix is None:
            return name
        rest = rest.removeprefix(prefix)
    return rest
