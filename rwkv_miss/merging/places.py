"""Places of an adapter's tensors in a Hugging Face folder, whose names may differ from the model's.

An adapter has the names of the loaded model; files/stored_names.py finds the names in the folder.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from ..errors import UserError, listed
from ..files.hf_folder import read_config
from ..files.stored_names import find_stored
from ..targets import View
from .members import Member, Rows

WITH_HEAD = r"(LMHeadModel|For(CausalLM|MaskedLM|ConditionalGeneration))\b"  # classes of models with a head


def placed(
    base: str | os.PathLike[str], stored: Mapping[str, Tensor], members: Sequence[Member]
) -> list[Member]:
    """Give every member the places of its tensors among a folder's stored tensors.

    Raises UserError for a linear's tensor that the folder lacks, or stores in parts that are not experts.
    """
    found = [_placed(base, stored, m) for m in members]
    for m in found:
        _refuse_tied(base, stored, m)
    return found


def _refuse_tied(base: str | os.PathLike[str], stored: Mapping[str, Tensor], m: Member) -> None:
    """Raise UserError for an adapted token embedding whose weight is also the head's.

    A token embedding has one row for each token of the vocabulary; a position embedding has not.
    """
    config = read_config(os.fspath(base))
    text = config.get("text_config")
    parts = [part for part in (config, text) if isinstance(part, dict)]
    said = [part["tie_word_embeddings"] for part in parts if "tie_word_embeddings" in part]
    # transformers omits the field if it is true
    tied = any(said) if said else not any(name.endswith("head.weight") for name in stored)
    has_head = re.search(WITH_HEAD, str(config.get("architectures")))
    vocabulary = [part["vocab_size"] for part in parts if "vocab_size" in part]
    lookups = {name: len(stored[view.key]) for name, view in m.views if view.lookup}
    of_tokens = [name for name, rows in lookups.items() if not vocabulary or rows in vocabulary]
    if tied and has_head and of_tokens:
        raise UserError(
            f"{m.path} changes the embedding {of_tokens[0]} alone, and {base} has one weight for it and the"
            " head (tie_word_embeddings), which a merge would change as well; untie them, or run the model"
            " with peft"
        )


def _placed(base: str | os.PathLike[str], stored: Mapping[str, Tensor], m: Member) -> Member:
    best = find_stored(base, list(stored), [*m.by_weight, *m.whole], m.tied)
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
