"""Places of an adapter's tensors in a Hugging Face folder, whose names may differ from the model's.

An adapter has the names of the model in memory. A folder has RWKV's names behind a prefix, or
flash-linear-attention's; or lacks the prefix of a class; or has names that transformers changes as it loads.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError, listed
from ..files.hf_names import FLA_SIGN, OFFICIAL, table
from ..targets import View
from .members import Member, Rows

STACKED = [("MergeModulelist", 0)]  # transformers' step that makes one tensor of all experts
RESHAPED = ("same", "flat", "wide", "heads")  # forms with the checkpoint's values in their order


class Stored(NamedTuple):
    """Names of the folder's tensors that make up one of the model.

    experts: of a stack of matrices, for each the tensors with its rows, by their order.
    """

    names: list[str]
    experts: dict[int, dict[int, str]] = {}


def placed(
    base: str | os.PathLike[str], stored: Mapping[str, Tensor], members: Sequence[Member]
) -> list[Member]:
    """Give every member the places of its tensors among the stored ones of a folder.

    Raises UserError for a tensor of a linear without a place, and for one that is stored in other parts than
    experts.
    """
    return [_placed(base, stored, m) for m in members]


def _placed(base: str | os.PathLike[str], stored: Mapping[str, Tensor], m: Member) -> Member:
    best: dict[str, Stored] = {}
    for names in _tables(base, list(stored)):
        for rename in _renamings([*m.by_weight, *m.whole], names):
            found = {name: names[rename(name)] for name in (*m.by_weight, *m.whole) if rename(name) in names}
            best = max(best, found, key=len)
        if not _without_place(m, best):
            break
    rows: dict[tuple[str, int], list[View]] = {}
    for key, parts in best.items():
        views = m.by_weight.get(key, {}).values()
        if views and all(view.index in parts.experts and not view.transposed for view in views):
            rows |= {(key, view.index): _rows(parts.experts[view.index], stored) for view in views}
        elif len(parts.names) > 1:
            raise UserError(
                f"{m.path} changes {key}, which {base} stores in {len(parts.names)} tensors ({parts.names[0]}"
                " and others); merge in memory: rwkv_miss.merge(model), unload(model),"
                " model.save_pretrained(...)"
            )
    absent = [name.removesuffix(".weight") for name in m.by_weight if name not in best]
    if absent:
        raise UserError(
            f"{m.path} changes {listed(absent, 2)}, which {base} does not have, also by no other known name;"
            f" it has tensors such as {next(iter(stored))}. Merge into the base that the adapter was trained"
            " on"
        )
    return dataclasses.replace(m, places={name: parts.names[0] for name, parts in best.items()}, rows=rows)


def _rows(by_order: Mapping[int, str], stored: Mapping[str, Tensor]) -> list[View]:
    """Describe tensors that have a matrix's rows one after the other."""
    names = [by_order[order] for order in sorted(by_order)]
    if len(names) == 1:
        return [View(names[0])]
    total = sum(len(stored[name]) for name in names)
    firsts = [sum(len(stored[name]) for name in names[:i]) for i in range(len(names))]
    return [Rows(name, first=first, total=total) for name, first in zip(names, firsts, strict=True)]


def _without_place(m: Member, found: Iterable[str]) -> list[str]:
    """Name the member's tensors that a table has under none of their names."""
    names = {m.tied.get(name, name) for name in found}
    return [name for name in (*m.by_weight, *m.whole) if m.tied.get(name, name) not in names]


def _tables(base: str | os.PathLike[str], stored: list[str]) -> Iterator[Mapping[str, Stored]]:
    """Yield tables of the names that the folder's tensors may have in a model."""
    yield {name: Stored([name]) for name in stored}
    if FLA_SIGN in stored:
        layers = sum(name.endswith(".attn.r_k") for name in stored)
        maps = [m for m in table(layers) if m.form in RESHAPED and m.stored in stored]
        yield {m.names[0]: Stored([m.stored]) for m in maps}
    elif not any(name.startswith(OFFICIAL) for name in stored):
        yield _names_of_transformers(base, stored)


def _renamings(wanted: list[str], names: Mapping[str, Stored]) -> Iterator[Callable[[str], str]]:
    """Yield the ways to find an adapter's names in a table: as they are, and with a prefix more or less."""
    yield lambda name: name
    if first := next((name for name in wanted if name not in names), ""):
        ends = {name.removesuffix(first) for name in names if name.endswith(f".{first}")}
        if len(ends) == 1:
            prefix = ends.pop()
            yield lambda name: name if name in names else prefix + name
        yield lambda name: name if name in names else name.partition(".")[2]


def _names_of_transformers(base: str | os.PathLike[str], stored: list[str]) -> Mapping[str, Stored]:
    """Ask transformers for the names of the folder's tensors in a model; {} where it does not know the
    model, or is absent."""
    try:
        import transformers
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:
        return {}
    try:
        config = transformers.AutoConfig.from_pretrained(base, local_files_only=True)
        kind = getattr(transformers, config.architectures[0])
    except (ValueError, OSError, AttributeError, TypeError):
        return {}
    with torch.device("meta"):
        model = kind(config)
    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    joining = [change for change in changes if not isinstance(change, WeightRenaming)]
    names: dict[str, Stored] = {}
    own = model.state_dict()
    for name in stored:
        live, pattern = rename_source_key(name, renamings, joining, model.base_model_prefix, own)
        found = names.setdefault(live, Stored([], {}))
        found.names.append(name)
        if place := pattern and _expert(name, pattern, joining):
            index, order = place
            found.experts.setdefault(index, {})[order] = name
    return names


def _expert(name: str, pattern: str, joining: list[Any]) -> tuple[int, int] | None:
    """Return the number of a stored expert, and its place among the tensors that are its rows.

    None for what transformers joins in another way.
    """
    joined = next(change for change in joining if pattern in change.source_patterns)
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in joined.operations]
    found = re.search(re.escape(pattern).replace(r"\*", r"(\d{1,9})"), name)
    if found is None or steps not in (STACKED, [*STACKED, ("Concatenate", 1)]):
        return None
    return int(found[1]), joined.source_patterns.index(pattern)
