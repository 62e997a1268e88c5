"""Names of a Hugging Face folder's tensors, matched with their names in the loaded model.

A folder has RWKV's names with a prefix, or flash-linear-attention's names; or its names lack the prefix of a
class; or transformers changes the names while it loads them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from .hf_names import FLA_SIGN, OFFICIAL, table

STACKED = [("MergeModulelist", 0)]  # transformers' step that stacks all experts in one tensor
RESHAPED = ("same", "flat", "wide", "heads")  # forms that keep the checkpoint's values in their order


class StoredNames(NamedTuple):
    """Names of the folder's tensors that make up one tensor of the model.

    experts: for a stack of matrices, number of the expert -> place among its rows -> name.
    """

    names: list[str]
    experts: dict[int, dict[int, str]] = {}


def find_stored(
    base: str | os.PathLike[str],
    stored: Sequence[str],
    wanted: Collection[str],
    tied: Mapping[str, str] | None = None,
) -> dict[str, StoredNames]:
    """Map wanted names of a model's tensors -> a folder's names, in every way that the names may differ.

    Names that are not found are left out. tied: another name of a tensor -> its name; one of both is enough.
    """
    best: dict[str, StoredNames] = {}
    tied = tied or {}
    for names in _tables(base, stored):
        for rename in _renamings(wanted, names):
            found = {name: names[rename(name)] for name in wanted if rename(name) in names}
            best = max(best, found, key=len)
        if {tied.get(name, name) for name in best} >= {tied.get(name, name) for name in wanted}:
            break
    return best


def _tables(base: str | os.PathLike[str], stored: Sequence[str]) -> Iterator[Mapping[str, StoredNames]]:
    """Yield tables: possible name in a model -> the folder's names."""
    yield {name: StoredNames([name]) for name in stored}
    if FLA_SIGN in stored:
        layers = sum(name.endswith(".attn.r_k") for name in stored)
        maps = [m for m in table(layers) if m.form in RESHAPED and m.stored in stored]
        yield {m.names[0]: StoredNames([m.stored]) for m in maps}
    elif not any(name.startswith(OFFICIAL) for name in stored):
        yield _names_of_transformers(base, stored)


def _renamings(wanted: Iterable[str], names: Mapping[str, StoredNames]) -> Iterator[Callable[[str], str]]:
    """Yield functions from an adapter's names to a table's: unchanged, with a prefix added, or removed."""
    yield lambda name: name
    if first := next((name for name in wanted if name not in names), ""):
        ends = {name.removesuffix(first) for name in names if name.endswith(f".{first}")}
        if len(ends) == 1:
            prefix = ends.pop()
            yield lambda name: name if name in names else prefix + name
        yield lambda name: name if name in names else name.partition(".")[2]


def _names_of_transformers(base: str | os.PathLike[str], stored: Sequence[str]) -> Mapping[str, StoredNames]:
    """Ask transformers for the names of the folder's tensors in a model.

    {} if transformers is absent, or has no model for the configuration. Code of the folder is never run.
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
    names: dict[str, StoredNames] = {}
    own = model.state_dict()
    for name in stored:
        live, pattern = rename_source_key(name, renamings, joining, model.base_model_prefix, own)
        found = names.setdefault(live, StoredNames([], {}))
        found.names.append(name)
        if place := pattern and _expert(name, pattern, joining):
            index, order = place
            found.experts.setdefault(index, {})[order] = name
    return names


def _expert(name: str, pattern: str, joining: list[Any]) -> tuple[int, int] | None:
    """Return the number of a stored expert, and the tensor's place among the expert's rows.

    None for tensors that transformers joins in another way.
    """
    joined = next(change for change in joining if pattern in change.source_patterns)
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in joined.operations]
    found = re.search(re.escape(pattern).replace(r"\*", r"(\d{1,9})"), name)
    if found is None or steps not in (STACKED, [*STACKED, ("Concatenate", 1)]):
        return None
    return int(found[1]), joined.source_patterns.index(pattern)
