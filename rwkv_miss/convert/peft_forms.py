"""Each method in Hugging Face peft: the fields of its configuration, and its tensors.

hf_export.py writes them into a folder.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from typing import Any

import torch
from torch import Tensor

from ..adapter import METHODS, has_factors
from ..errors import UserError
from ..methods.lora import ScaledOptions
from ..methods.miss_variants import beyond_plain
from .base import adapted_layers
from .formats import Adapter

# name of a tensor inside a linear: ours -> peft's
LORA = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
# peft's names of tensors inside a linear
PARTS = (*LORA.values(), "miss_block", "vera_lambda_b", "vera_lambda_d")


@dataclasses.dataclass
class Folder:
    """Content of a peft folder to write.

    config: the method's fields; new_config() adds the fields that all methods have. tensors: by their names
    in the model. notes: messages for the user.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    notes: list[str] = dataclasses.field(default_factory=list)


def refuse(adapter: Adapter, why: str) -> None:
    """Raise UserError that names another way to write the adapter."""
    if has_factors(METHODS[adapter.method]) and not adapter.metadata["options"].get("magnitude"):
        raise UserError(f"{why}; --to lora writes the same change of the weights as a LoRA")
    raise UserError(f"{why}; merge the adapter into its base (rwkv-miss merge), or keep its own file")


def one_rank(adapter: Adapter) -> int:
    """Return the rank of all linears. Raises UserError if they differ."""
    ranks = {options.rank for options in adapter.options_by_linear().values()}
    if len(ranks) > 1:
        listed = ", ".join(map(str, sorted(ranks)))
        refuse(
            adapter, f"peft's {adapter.method} has one rank for all linears, and this adapter has {listed}"
        )
    return ranks.pop()


def renamed(adapter: Adapter, names: dict[str, str]) -> dict[str, Tensor]:
    """Rename the tensors of all linears from our names to peft's."""
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
    """Convert MiSS without a change of D; peft has only layout "stride" and plain sums."""
    options = next(iter(adapter.options_by_linear().values()))
    if other := beyond_plain(options, "mini_r"):
        refuse(adapter, f"peft's MiSS has no {other}")
    mini = options.mini_r
    return Folder(
        miss_config(adapter, mini_r=mini or 1, init_weights="mini" if mini else True),
        renamed(adapter, {"miss": "miss_block"}),
    )


def miss_config(adapter: Adapter, **others: Any) -> dict[str, Any]:
    """Build peft's fields of MiSS and its siblings."""
    return {"peft_type": "MISS", "r": one_rank(adapter), "miss_dropout": 0.0, **others}


def as_bat(adapter: Adapter) -> Folder:
    """Convert Bat; peft's D is by output blocks, order "col"."""
    order = next(iter(adapter.options_by_linear().values())).order
    if order != "col":
        refuse(
            adapter,
            f"peft's Bat has one matrix for every r outputs, this adapter for every r inputs (order={order})",
        )
    config = miss_config(adapter, mini_r=1, init_weights="bat")
    return Folder(config, renamed(adapter, {"bat": "miss_block"}))


def own_factors(adapter: Adapter) -> Folder:
    """Convert LoRA, LoRA-FA and DoRA, keeping A, B and alpha."""
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
    """Write the change of each weight as a product of two factors, with alpha = rank, so a scale of 1.

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
                "; convert --to peft writes it"
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
    """Build peft's fields for each linear's rank and alpha.

    r and lora_alpha are the most frequent values; other linears have patterns.
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
    """Return a whole number as the int that peft declares."""
    return int(value) if value == int(value) else value


def compiled(patterns: dict[str, Any]) -> list[tuple[re.Pattern, Any]]:
    """Compile peft's patterns, regular expressions for the ends of names -> values."""
    return [(re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in patterns.items()]


def matched(patterns: list[tuple[re.Pattern, Any]], name: str, default: Any) -> Any:
    """Look a linear up in peft's patterns: the first one that fits counts."""
    return next((value for pattern, value in patterns if pattern.match(name)), default)


def patterns(values: dict[str, float], default: float) -> dict[str, float]:
    """Build peft's patterns for the linears that differ from `default`.

    If one linear's name is the end of another's, the patterns are whole names, anchored by "^".
    """
    others = [name for name in values if values[name] != default]
    for names, anchor in ((others, ""), (list(values), "^")):
        # in the order of the written JSON, which is sorted, because the first pattern that fits counts
        found = {anchor + name: number(values[name]) for name in sorted(names)}
        expressions = compiled(found)
        if all(matched(expressions, name, default) == value for name, value in values.items()):
            return found
    raise UserError(
        f"peft's patterns can't tell linears of these names apart: {', '.join(values)}; merge the adapter"
        " (rwkv-miss merge)"
    )


def as_vera(adapter: Adapter) -> Folder:
    """Convert VeRA: the vectors, and the random pair, which peft reads from the folder."""
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
    """Convert PiSSA to a LoRA, because peft would change the base again when it loads a PiSSA."""
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
