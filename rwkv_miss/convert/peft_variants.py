"""Parts of peft's files beyond two factors of a linear, turned into this package's forms.

Some parts need the base, which the user gives (Hints.base): the rows of an embedding, a bias, and the part of
the weight that KaSA removed.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..targets import View
from .base import Base
from .formats import Hints
from .hf_export import PREFIX
from .source import Source

EMBEDDING = ".lora_embedding_A"
TOKENS = ".token_adapter.trainable_tokens_delta"
NOISE = (".lora_monteclora_sampler.", ".lora_velora_")  # tensors that only training uses; they are dropped
ATTENTION, WRAPPER = ".base_layer.out_proj", ".base_layer"


@dataclasses.dataclass
class Content:
    """Tensors of a folder, `linears` by linear and `whole` ones by name; views: of linears that need one.

    theirs: our name of a linear -> the name that peft's patterns match. changed: the tensors no longer fit
    the folder's configuration.
    """

    source: Source
    hints: Hints
    linears: dict[str, dict[str, Tensor]]
    whole: dict[str, Tensor]
    views: dict[str, View] = dataclasses.field(default_factory=dict)
    theirs: dict[str, str] = dataclasses.field(default_factory=dict)
    changed: bool = False
    notes: list[str] = dataclasses.field(default_factory=list)

    def field(self, name: str, default: Any) -> Any:
        """Return a field of the configuration. Raises UserError for a value of another type than default."""
        value = self.source.config.get(name) or default
        if not isinstance(value, type(default)):
            raise UserError(f"{self.source.path}: {name} is {str(value)[:60]!r}, a damaged configuration")
        return value

    def base(self, key: str, why: str) -> Tensor:
        """Read a tensor of the base, fp32. Raises UserError without a base, or if it lacks the tensor."""
        found = self.of_base([key], why)
        if key not in found or found[key].is_meta:
            raise UserError(f"{self.source.path}: {why} needs {key}, which --base {self.hints.base} lacks")
        return found[key].float()

    def of_base(self, keys: list[str], why: str) -> dict[str, Tensor]:
        """Read `keys` from the base, if it has them. Raises UserError, with `why`, if no --base was given."""
        if not self.hints.base:
            raise UserError(
                f"{self.source.path}: {why} needs the base: convert it with --base MODEL, its file or folder"
            )
        return self._base.find(keys)

    @functools.cached_property
    def _base(self) -> Base:
        return Base(self.hints.base)


def read_places(content: Content) -> None:
    """Find out which weight each linear changes, and how that weight is stored."""
    source, linears, views = content.source, content.linears, content.views
    keys = [key.removeprefix(PREFIX) for key in source.tensors]
    embeddings = {key.removesuffix(EMBEDDING) for key in keys if key.endswith(EMBEDDING)}
    for name in list(linears):
        if name in embeddings:
            views[name] = View(f"{name}.weight", transposed=True, lookup=True)
        elif source.config.get("fan_in_fan_out"):
            views[name] = View(f"{name}.weight", transposed=True)
    for name in [name for name in linears if name.endswith(ATTENTION)]:
        outer, own = name.removesuffix(ATTENTION), linears[name]
        if "lora_B" in own:  # peft 0.21 adds out_proj's change twice, also in training
            own["lora_B"] = 2 * own["lora_B"]
        _rename(content, name, f"{outer}.out_proj")
        if outer in linears:
            _rename(content, outer, f"{outer}.in_proj_weight", View(f"{outer}.in_proj_weight"))
    for owner, parameters in _parameters(content).items():
        _read_parameters(content, owner, parameters)
    if wrapped := next((name for name in linears if name.endswith(WRAPPER)), ""):
        raise UserError(f"{source.path}: no target_parameters of its configuration is about {wrapped}")


def _rename(content: Content, name: str, new: str, view: View | None = None) -> None:
    content.linears[new] = content.linears.pop(name)
    content.theirs[new] = name
    content.changed = True
    if view:
        content.views[new] = view


def _parameters(content: Content) -> dict[str, list[str]]:
    """Resolve target_parameters: module -> its parameters, the innermost wrapper's first."""
    paths = [str(path) for path in content.field("target_parameters", [])]
    owners = [name for name in content.linears if not name.endswith(WRAPPER)]
    bare = [f"{owner}.{path}" for owner in owners for path in paths if "." not in path]
    known = content.of_base(bare, "target_parameters without a module") if bare else {}
    found: dict[str, list[str]] = {}
    for owner in owners:
        for path in paths:
            end, dot, leaf = path.rpartition(".")
            if f".{owner}".endswith(f".{end}") if dot else f"{owner}.{leaf}" in known:
                found.setdefault(owner, []).append(leaf)
    several = [f"{owner}.{leaf}" for owner, leaves in found.items() if len(leaves) > 1 for leaf in leaves]
    base = content.of_base(several, "the order of the parameters") if several else {}
    return {
        owner: leaves if len(leaves) == 1 else _in_order(content, owner, leaves, base)
        for owner, leaves in found.items()
    }


def _in_order(content: Content, owner: str, leaves: list[str], base: dict[str, Tensor]) -> list[str]:
    """Sort a module's parameters so that the LoRAs of its wrappers fit them, else in the base's order."""
    keys = [key for key in base if key.rpartition(".")[0] == owner]
    if lacking := [leaf for leaf in leaves if f"{owner}.{leaf}" not in keys]:
        raise UserError(
            f"{content.source.path}: the order of the parameters needs {owner}.{lacking[0]}, which --base"
            f" {content.hints.base} lacks"
        )

    def fits(order: Sequence[str]) -> bool:
        for depth, key in enumerate(reversed(order)):
            own = content.linears.get(owner + WRAPPER * depth, {})
            if not {"lora_A", "lora_B"} <= own.keys() or own["lora_A"].dim() != 2:
                return False
            if sorted((own["lora_A"].shape[1], len(own["lora_B"]))) != sorted(base[key].shape[-2:]):
                return False
        return True

    chosen = next(filter(fits, itertools.permutations(keys)), keys)
    return [key.rpartition(".")[2] for key in chosen]


def _read_parameters(content: Content, owner: str, leaves: list[str]) -> None:
    """Read LoRAs of a module's parameters; the first parameter's wrapper is the innermost.

    For a stack of weights the ranks of all experts are in one pair of factors, A (experts r, in) and B (out,
    r experts).
    """
    linears = content.linears
    wrapped = {leaf: linears.pop(owner + WRAPPER * i, None) for i, leaf in enumerate(reversed(leaves))}
    for leaf in leaves:  # hf_export writes them in this order again
        own = wrapped[leaf]
        key = f"{owner}.{leaf}"
        if own is None or own.keys() != {"lora_A", "lora_B"} or not all(t.dim() == 2 for t in own.values()):
            raise UserError(f"{content.source.path}: the LoRA of {key} has not one matrix A and one B")
        A, B, rank = own["lora_A"], own["lora_B"], max(content.field("r", 8), 1)
        experts = len(A) // rank
        content.changed = True
        if experts * rank != len(A) or experts < 1 or B.shape[1] != len(A):
            raise UserError(f"{content.source.path}: {key} has a LoRA of {len(A)} ranks; the rank is {rank}")
        parts = zip(A.chunk(experts), B.unflatten(1, (rank, experts)).unbind(2), strict=True)
        for index, (part_A, part_B) in enumerate(parts):
            name = (owner if leaf == "weight" else key) if experts == 1 else f"{key}.{index}"
            linears[name] = {"lora_A": part_A.contiguous(), "lora_B": part_B.contiguous()}
            content.theirs[name] = key
            if name != owner:
                content.views[name] = View(key, index=None if experts == 1 else index)


def read_tokens(content: Content) -> None:
    """Read trained rows of embeddings, which become whole tensors with the base's other rows."""
    indices: Any = content.source.config.get("trainable_token_indices") or {}
    for key in [key for key in content.whole if key.endswith(TOKENS)]:
        rows, name = content.whole.pop(key), key.removesuffix(TOKENS)
        given = indices
        if isinstance(indices, dict):
            given = indices.get(name, indices.get(name.rpartition(".")[2]))
        if not given or not isinstance(given, list) or not all(type(i) is int and i >= 0 for i in given):
            raise UserError(
                f"{content.source.path}: trainable_token_indices of {name} are {str(given)[:60]!r}"
            )
        table = content.base(f"{name}.weight", "trainable_token_indices").clone()
        if table.dim() != 2 or rows.shape != (len(given), table.shape[1]) or max(given) >= len(table):
            raise UserError(
                f"{content.source.path}: {key} is {tuple(rows.shape)}, and the base's embedding"
                f" {tuple(table.shape)} with {len(given)} trained tokens"
            )
        table[torch.tensor(given)] = rows.float()
        content.whole[f"{name}.weight"] = table
        content.changed = True


def read_blocks(content: Content) -> None:
    """Read BD-LoRA: put the blocks of a factor on the diagonal of a whole factor."""
    config = content.field("use_bdlora", {})
    count = config.get("nblocks") or 1
    for name, own in content.linears.items():
        for factor in "AB":
            patterns, part = config.get(f"target_modules_bd_{factor.lower()}") or (), f"lora_{factor}"
            if part not in own or not any(str(pattern) in name for pattern in patterns):
                continue
            if type(count) is not int or count < 1 or own[part].dim() != 2 or len(own[part]) % count:
                raise UserError(f"{content.source.path}: {part} of {name} has not {count!r} blocks of rows")
            own[part] = torch.block_diag(*own[part].chunk(count))
            content.changed = True


def read_beyond_factors(
    content: Content, ranks: dict[str, int], alphas: dict[str, float], rslora: bool
) -> None:
    """Read the bias of B, and KaSA, which scales ranks and removes the base's smallest singular values."""
    if content.source.config.get("kasa_config"):
        content.notes.append("KaSA has become a LoRA of twice the rank, for the base as it is")
    for name, own in content.linears.items():
        scale = alphas[name] / (ranks[name] ** 0.5 if rslora else ranks[name])
        if (bias := own.pop("lora_bias", None)) is not None:
            before = content.base(f"{name}.bias", f"the bias of {name}'s lora_B")
            if bias.shape != before.shape:
                raise UserError(f"{content.source.path}: the bias of {name} is {tuple(bias.shape)}")
            content.whole[f"{name}.bias"] = before + scale * bias.float()
            content.changed = True
        if (values := own.pop("lora_diag", None)) is None:
            continue
        view, rank = content.views.get(name, View(f"{name}.weight")), ranks[name]
        weight = view.of(content.base(view.key, "KaSA"))
        if weight.shape != (len(own["lora_B"]), own["lora_A"].shape[1]) or values.shape != (rank,):
            raise UserError(f"{content.source.path}: the KaSA of {name} does not fit {tuple(weight.shape)}")
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        own["lora_A"] = torch.cat((own["lora_A"].float(), Vh[-rank:]))
        own["lora_B"] = torch.cat((own["lora_B"].float() * values, -(U * S)[:, -rank:] / scale), 1)
        ranks[name], alphas[name] = 2 * rank, alphas[name] * (2**0.5 if rslora else 2)
        content.changed = True
