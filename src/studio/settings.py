"""Settings for the training page: the fields that it shows, and the flags of train.py from what was typed."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rwkv_miss.adapter import METHODS
from rwkv_miss.errors import did_you_mean

from ..config.parse import parse
from ..config.schema import FIELDS, GROUPS, Config, type_of
from ..serving.errors import wrong
from .folders import Folders

# shown before the others
COMMON = (
    "load_model",
    "data_file",
    "eval_file",
    "template",
    "peft",
    "peft_config",
    "loss",
    "lr_init",
    "epoch_count",
    "ctx_len",
    "micro_bsz",
    "quant",
)
ALLOWED = [name for name, field in FIELDS.items() if not field.metadata["operator"]]


def described() -> list[dict[str, Any]]:
    """Describe every setting that the page may set."""
    begins, group, fields = {first: heading for heading, _, first in GROUPS}, "", []
    for name, field in FIELDS.items():
        group = begins.get(name, group)
        meta = field.metadata
        if name not in ALLOWED:
            continue
        bounds = meta["bounds"]
        fields.append(
            {
                "name": name,
                "help": meta["help"],
                "type": type_of(name).__name__,
                "default": meta["written"],
                "choices": (*sorted(METHODS), "none") if name == "peft" else meta["choices"],
                "words": list(meta["words"]),
                "low": bounds.low,
                "high": bounds.high,
                "below": bounds.below,
                "automatic": meta["automatic"],
                "file": meta["file"],
                "common": name in COMMON,
                "group": group,
            }
        )
    return fields


def flags(settings: Mapping[str, Any], folders: Folders) -> list[str]:
    """Return the flags for what the page has set. Raises Refused for a setting that it may not set."""
    words = []
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
        words.append(f"--{name}={text}")
    return words


def check(words: Sequence[str]) -> Config:
    """Parse a command line as train.py does, with all its rules. Raises UserError."""
    return parse([*words])


def command(words: Sequence[str]) -> str:
    """Write the command line for people."""
    shown = ["python", "train.py"]
    for word in words:
        flag, sign, value = word.partition("=")
        shown += [flag, value] if sign and not value.startswith("-") else [word]
    return shlex.join(shown)
