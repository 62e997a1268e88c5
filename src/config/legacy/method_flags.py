"""Method flags of older scripts: the adapter's method, its options and the parts trained with it.

RWKV-PEFT has had three spellings: a flag for each option of LoRA, JSON for each method, and --peft_config.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rwkv_miss.errors import UserError

from ..adapter_options import METHOD_ALIASES
from .flag_values import decimal, integer, is_on, of_2026, value, version
from .notes import Notes

# RWKV-PEFT's options of a method, one flag for each method, as JSON
CONFIGS = {
    "miss_config": "miss",
    "disha_config": "miss",
    "bone_config": "miss",
    "lora_config": "lora",
    "pissa_config": "pissa",
}

# before that, one flag for each option of LoRA; the first two stand alone
LORA_FLAGS = ("lora", "PISSA", "lora_r", "lora_alpha", "lora_dropout", "lora_load", "lora_parts", "svd_niter")
# the linears of --lora_parts; its other names are trained whole
LORA_PARTS = {
    "att": ["att.receptance", "att.key", "att.value", "att.output"],
    "ffn": ["ffn.key", "ffn.value"],
}
ONLY_IN_6 = {"att": ["att.gate"], "ffn": ["ffn.receptance"]}

# flags that people type for --peft_config r=N
RANK_FLAGS = ("rank", "r")
NAMES = {*CONFIGS, *LORA_FLAGS, *RANK_FLAGS, "emb", "state_tune", "state"}


def method(old: Mapping[str, str], kept: list[str], notes: Notes) -> list[str]:
    """Give --peft, --peft_config and --train_parts for every older spelling."""
    named = value(kept, "peft")
    chosen = METHOD_ALIASES.get(named, named)
    new: list[str] = []
    options: dict[str, Any] = {}
    parts: list[str] = []  # whole tensors that are trained with the adapter
    if "lora" in old or "PISSA" in old:
        chosen = "pissa" if "PISSA" in old else "lora"
        new += ["--peft", chosen]
        options, parts = _lora_flags(chosen, old, kept, notes)
    else:
        notes.translations += [
            f"--{name} is ignored: it belongs to another method than the run's"
            for name in LORA_FLAGS
            if name in old
        ]
    options |= _method_configs(chosen, old, kept, notes)
    if named in METHOD_ALIASES and options.get("mode") != "bat":
        notes.translations.append(f"--peft {named} is --peft {METHOD_ALIASES[named]}, its name today")
    for name in RANK_FLAGS:
        if name in old:
            options["r"] = integer(old, name, 0)
            notes.translations.append(f"--{name} {old[name]} is --peft_config r={old[name]}")
    if "emb" in old:
        parts.append("emb")
        notes.translations.append("--emb is --train_parts emb")
    tunes_state = "state_tune" in old or old.get("train_type") in ("state", "states")
    of_rlhf = is_on(old, "state")  # RWKV-LM-RLHF, whose layer profile has an adapter, too
    # with a method the state is a part, alone it is the method
    if tunes_state and not of_rlhf and chosen in (None, "none", "state"):
        new += ["--peft", "state"]
        notes.translations.append("the state alone is trained: --peft state")
    elif tunes_state or of_rlhf:
        parts.append("state")
        notes.translations.append("the state is trained with the adapter: --train_parts state")
    return [*new, *_train_parts(parts, kept), *_peft_config(options, kept, notes)]


def _lora_flags(
    method: str, old: Mapping[str, str], kept: list[str], notes: Notes
) -> tuple[dict[str, Any], list[str]]:
    """Return (options, parts trained with the adapter) from the flags --lora_*, one for each option."""
    flag = "PISSA" if method == "pissa" else "lora"
    notes.translations.append(f"--{flag} and its flags are --peft {method} with --peft_config")
    options: dict[str, Any] = {
        "r": integer(old, "lora_r", 8),
        "load": old.get("lora_load"),
        "dropout": decimal(old, "lora_dropout"),
    }
    if method == "pissa":
        options["niter"] = integer(old, "svd_niter", 4)
        if "lora_alpha" in old:
            notes.translations.append("--lora_alpha is ignored: PiSSA has the factor 1, there as well")
    else:
        options["alpha"] = integer(old, "lora_alpha", 32)
    parts = old.get("lora_parts", "att,ln,time").split(",")
    model = version(old, kept)
    options |= _targets(parts, model)
    if model == "x070" and "time" in parts:
        parts.remove("time")
        notes.translations.append(
            "time of --lora_parts is ignored: no tensor of RWKV-7 has it in its name, there as well"
        )
    return options, [part for part in parts if part not in LORA_PARTS]


def _targets(parts: Sequence[str], model: str) -> dict[str, Any]:
    """Return the option `targets` for the parts of --lora_parts; nothing where these have all linears.

    Raises UserError where they have none.
    """
    if set(LORA_PARTS) <= set(parts):
        return {}
    if not set(LORA_PARTS) & set(parts):
        raise UserError(
            f"--lora_parts {','.join(parts)} has no linear layer, expected {' or '.join(LORA_PARTS)}"
            " among them; whole tensors in addition to an adapter are --train_parts"
        )
    only = ONLY_IN_6 if model == "x060" else {}
    adapted = [LORA_PARTS[part] + only.get(part, []) for part in LORA_PARTS if part in parts]
    return {"targets": [*itertools.chain(*adapted)]}


def _method_configs(
    method: str | None, old: Mapping[str, str], kept: list[str], notes: Notes
) -> dict[str, Any]:
    """Read the options in --lora_config and its like, without the method's name before each."""
    options: dict[str, Any] = {}
    for name, of in CONFIGS.items():
        if name in old and of != method:
            notes.translations.append(
                f"--{name} is ignored: it is for --peft {of}, and the run has {method or 'the default'}"
            )
        elif name in old:
            try:
                given = json.loads(old[name]).items()
            except (json.JSONDecodeError, AttributeError):
                raise UserError(f'--{name} {old[name]}: expected JSON such as {{"r": 64}}') from None
            if name == "bone_config" and "bone_mode" not in old[name]:
                options["mode"] = "bat"
                notes.translations.append(
                    "without a bone_mode, which it has since November 2024, Bone was what is --peft bat"
                    " --peft_config order=row today; bone_mode bone is --peft miss"
                )
            options |= {re.sub(r"^(miss|disha|bone|lora|pissa)_", "", key): value for key, value in given}
            notes.translations.append(f"--{name} is --peft_config")
            if value(kept, "train_parts") is None:
                named, parts = ("time or ln", "time,ln") if version(old, kept) != "x070" else ("ln", "ln")
                notes.differences.append(
                    f"the tensors whose names contain {named} stay frozen, where RWKV-PEFT trained them as"
                    f" well; --train_parts {parts} does"
                )
    if "parts" in options:
        options |= _targets(options.pop("parts").split(","), version(old, kept))
    return options


def without_time(old: Mapping[str, str], kept: list[str], notes: Notes) -> list[str]:
    """Give --train_parts without time for RWKV-7, in whose names RWKV-PEFT finds none."""
    named = _named_parts(value(kept, "train_parts") or "")
    if "time" not in named or version(old, kept) != "x070" or of_2026(old, kept):
        return []
    notes.differences.append(
        "time of --train_parts is ignored: no tensor of RWKV-7 has it in its name, there as well; drop"
        " --my_testing to train its mixes and decays"
    )
    return ["--train_parts", ",".join(part for part in named if part != "time")]


def _train_parts(parts: list[str], kept: list[str]) -> list[str]:
    """Give --train_parts with the parts that older flags name. RWKV-PEFT had "none" and [] for no parts."""
    named = value(kept, "train_parts") or ""
    if named != "none" and not parts and not named.startswith("["):
        return []
    return ["--train_parts", ",".join([*_named_parts(named), *parts])]


def _named_parts(given: str) -> list[str]:
    return [part for part in re.split(r"[][\"',\s]+", given) if part not in ("", "none")]


def _peft_config(options: dict[str, Any], kept: list[str], notes: Notes) -> list[str]:
    """Give --peft_config with a method's options in today's names."""
    if not options:
        return []
    if value(kept, "peft_config"):
        raise UserError("--peft_config and an older flag for the same options were given; keep the former")
    options = {key: value for key, value in options.items() if value not in (None, "") and key != "init"}
    mode = options.pop("mode", "bone")
    if mode == "bat":
        options["order"] = "row"
    elif mode not in ("bone", "miss", "disha"):
        raise UserError(f"mode {mode}: expected bone, which is --peft miss, or bat")
    begins = []
    if "load" in options:
        path = os.path.join(value(kept, "proj_dir") or "out", f"{options.pop('load')}.pth")
        if os.path.exists(path):
            begins = ["--init_adapter", path]
            notes.differences.append(f"the run begins with the adapter in {path}: --init_adapter")
        else:
            notes.differences.append(f"{path} is not there: a new adapter is trained")
    method = ["--peft", "bat"] if mode == "bat" else []
    return [*method, *begins, "--peft_config", json.dumps(options)]
