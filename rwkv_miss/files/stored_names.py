"""Names of the tensors in a Hugging Face folder, in the model that is made of it.

A folder has RWKV's names behind a prefix, or flash-linear-attention's; or lacks the prefix of a class; or has
names that transformers changes as it loads.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from .hf_names import FLA_SIGN, OFFICIAL, table

STACKED = [("MergeModulelist", 0)]  # transformers' step that makes one tensor of all experts
RESHAPED = ("same", "flat", "wide", "heads")  # forms with the checkpoint's values in their order


class Stored(NamedTuple):
    """Names of the folder's tensors that make up one of the model.

    experts: of a stack of matrices, for each the tensors with its rows, by their order.
    """

    names: list[str]
    experts: dict[int, dict[int, str]] = {}


def find_stored(
    base: str | os.PathLike[str],
    stored: Sequence[str],
    wanted: Collection[str],
    tied: Mapping[str, str] | None = None,
) -> dict[str, Stored]:
    """Find tensors of a model among a folder's names, by all ways that two may differ: those that are there.

    tied: another name of a tensor -> its name; one of them is enough.
    """
    best: dict[str, Stored] = {}
    tied = tied or {}
    for names in _tables(base, stored):
        for rename in _renamings(wanted, names):
            found = {name: names[rename(name)] for name in wanted if rename(name) in names}
            best = max(best, found, key=len)
        if {tied.get(name, name) for name in best} >= {tied.get(name, name) for name in wanted}:
            break
    return best


def _tables(base: str | os.PathLike[str], stored: Sequence[str]) -> Iterator[Mapping[str, Stored]]:
    """Yield tables of the names that the folder's tensors may have in a model."""
    yield {name: Stored([name]) for name in stored}
    if FLA_SIGN in stored:
        layers = sum(name.endswith(".attn.r_k") for name in stored)
        maps = [m for m in table(layers) if m.form in RESHAPED and m.stored in stored]
        yield {m.names[0]: Stored([m.stored]) for m in maps}
    elif not any(name.startswith(OFFICIAL) for name in stored):
        yield _names_of_transformers(base, stored)


def _renamings(wanted: Iterable[str], names: Mapping[str, Stored]) -> Iterator[Callable[[str], str]]:
    """Yield the ways to find an adapter's names in a table: as they are, and with a prefix more or less."""
    yield lambda name: name
    if first := next((name for name in wanted if name not in names), ""):
        ends = {name.removesuffix(first) for name in names if name.endswith(f".{first}")}
        if len(ends) == 1:
            prefix = ends.pop()
            yield lambda name: name if name in names else prefix + name
        yield lambda name: name if name in names else name.partition(".")[2]


def _names_of_transformers(base: str | os.PathLike[str], stored: Sequence[str]) -> Mapping[str, Stored]:
    """Ask transformers for the names of the folder's tensors in a model.

    {} where it is absent, or makes no model of the configuration. Code of the folder is never run.
    """
    try:
        import transformers
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:
        return {}
    try:
        config = transformers.AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
        kind = getattr(transformers, config.architectures[0])
        if not issubclass(kind, transformers.PreTrainedModel):
            return {}
        with torch.device("meta"):
            model = kind(config)
    except Exception:  # a stranger's configuration may be wrong in any way
        return {}
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
