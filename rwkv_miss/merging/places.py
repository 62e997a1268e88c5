"""Places of an adapter's tensors in a Hugging Face folder, whose names may differ from the model's.

An adapter has the names of the model in memory. A folder has RWKV's names behind a prefix, or
flash-linear-attention's; or lacks the prefix of a class; or has names that transformers changes as it loads.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch

from ..errors import UserError, listed
from ..files.hf_names import FLA_SIGN, OFFICIAL, table
from .members import Member

RESHAPED = ("same", "flat", "wide", "heads")  # forms with the checkpoint's values in their order
Names = Mapping[str, Sequence[str]]  # name of a tensor in the model -> those in the folder that make it up


def placed(base: str | os.PathLike[str], stored: Iterable[str], members: Sequence[Member]) -> list[Member]:
    """Give every member the places of its tensors among the stored ones of a folder.

    Raises UserError for a tensor of a linear without a place, and for one that is stored in parts.
    """
    stored = list(stored)
    return [dataclasses.replace(m, places=_places(base, stored, m)) for m in members]


def _places(base: str | os.PathLike[str], stored: list[str], m: Member) -> dict[str, str]:
    best: dict[str, Sequence[str]] = {}
    for names in _tables(base, stored):
        for rename in _renamings([*m.by_weight, *m.whole], names):
            found = {name: names[rename(name)] for name in (*m.by_weight, *m.whole) if rename(name) in names}
            best = max(best, found, key=len)
        if not _without_place(m, best):
            break
    for name, parts in best.items():
        if len(parts) > 1:
            raise UserError(
                f"{m.path} changes {name}, which {base} stores in {len(parts)} tensors ({parts[0]} and"
                " others); merge in memory: rwkv_miss.merge(model), unload(model), model.save_pretrained(...)"
            )
    absent = [name.removesuffix(".weight") for name in m.by_weight if name not in best]
    if absent:
        raise UserError(
            f"{m.path} changes {listed(absent, 2)}, which {base} does not have, also by no other known name;"
            f" it has tensors such as {stored[0]}. Merge into the base that the adapter was trained on"
        )
    return {name: parts[0] for name, parts in best.items()}


def _without_place(m: Member, found: Mapping[str, Sequence[str]]) -> list[str]:
    """Name the member's tensors that a table has under none of their names."""
    names = {m.tied.get(name, name) for name in found}
    return [name for name in (*m.by_weight, *m.whole) if m.tied.get(name, name) not in names]


def _tables(base: str | os.PathLike[str], stored: list[str]) -> Iterator[Names]:
    """Yield tables of the names that the folder's tensors may have in a model."""
    yield {name: (name,) for name in stored}
    if FLA_SIGN in stored:
        layers = sum(name.endswith(".attn.r_k") for name in stored)
        yield {m.names[0]: (m.stored,) for m in table(layers) if m.form in RESHAPED and m.stored in stored}
    elif not any(name.startswith(OFFICIAL) for name in stored):
        yield _names_of_transformers(base, stored)


def _renamings(wanted: list[str], names: Names) -> Iterator[Callable[[str], str]]:
    """Yield the ways to find an adapter's names in a table: as they are, and with a prefix more or less."""
    yield lambda name: name
    if first := next((name for name in wanted if name not in names), ""):
        ends = {name.removesuffix(first) for name in names if name.endswith(f".{first}")}
        if len(ends) == 1:
            prefix = ends.pop()
            yield lambda name: name if name in names else prefix + name
        yield lambda name: name if name in names else name.partition(".")[2]


def _names_of_transformers(base: str | os.PathLike[str], stored: list[str]) -> Names:
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
    names: dict[str, list[str]] = {}
    own = model.state_dict()
    for name in stored:
        live, _ = rename_source_key(name, renamings, joining, model.base_model_prefix, own)
        names.setdefault(live, []).append(name)
    return names
