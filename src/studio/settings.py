"""Settings for the training page: the fields that it shows, and the flags of train.py from what was typed."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rwkv_miss.adapter import METHODS
from rwkv_miss.errors import did_you_mean

from ..config.schema import FIELDS, type_of
from ..serving.errors import wrong
from .folders import Folders
from .jobs import UNFIT

# settings that the page shows before the others
COMMON = (
    "load_model data_file eval_file template peft peft_config loss lr_init epoch_count ctx_len micro_bsz"
    " quant"
).split()
MOST = 30_000  # characters of a command line: systems allow 128 KB in one word
ALLOWED = [name for name, field in FIELDS.items() if not field.metadata["operator"]]


def described() -> list[dict[str, Any]]:
    """Describe every setting that the page may set."""
    fields = []
    for name in ALLOWED:
        meta = FIELDS[name].metadata
        choices = (*sorted(METHODS), "none") if name == "peft" else meta["choices"]
        fields.append(
            {
                "name": name,
                **{key: meta[key] for key in ("help", "automatic", "file")},
                **dataclasses.asdict(meta["bounds"]),
                "type": type_of(name).__name__,
                "default": meta["written"],
                "choices": choices,
                "words": list(meta["words"]),
                "common": name in COMMON,
            }
        )
    return fields


def flags(settings: Mapping[str, Any], folders: Folders, operators: Mapping[str, str]) -> list[str]:
    """Return the flags for what the page has set, after those of the operator. Raises Refused for a setting
    that the page may not set."""
    on_rewards = {**operators, **settings}.get("loss") == "grpo"
    # train.py refuses --reward_file with a loss without rewards
    usable = {name: text for name, text in operators.items() if on_rewards or name != "reward_file"}
    words = [f"--{name}={text}" for name, text in usable.items() if name not in settings]
    for name, value in settings.items():
        if name not in FIELDS:
            raise wrong(name[:80], f"there is no such setting{did_you_mean(name, FIELDS)}")
        if name not in ALLOWED:
            raise wrong(name, "only the operator sets it, when the server starts: --train_flags '--...'")
        if value is None:
            continue
        text = value if isinstance(value, str) else json.dumps(value)
        if FIELDS[name].metadata["file"]:
            named = folders.named_data if name in ("data_file", "eval_file") else folders.named
            text = named(name, text)
        if UNFIT.search(text) or len(text) > MOST:
            raise wrong(name, f"has a character that no command line can have, or more than {MOST:,}")
        words.append(f"--{name}={text}")
    if sum(map(len, words)) > MOST:
        raise wrong("settings", f"together they have more than {MOST:,} characters")
    return words


def command(words: Sequence[str]) -> str:
    """Write the command line for people."""
    shown = ["python", "train.py"]
    for word in words:
        flag, sign, value = word.partition("=")
        shown += [flag, value] if sign and not value.startswith("-") else [word]
    return shlex.join(shown)
