"""What a command line of other projects gives for a flag."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence

from rwkv_miss.errors import UserError


def value(words: Sequence[str], name: str) -> str | None:
    """What the words of a command line give for a flag, or None; the last one counts, as in argparse."""
    found = None
    for word, after in zip(words, [*words[1:], ""]):
        flag, equals, given = word.partition("=")
        if flag == f"--{name}":
            found = given if equals else after
    return found


def integer(flags: Mapping[str, str | None], name: str, default: int) -> int:
    try:
        return int(float(flags.get(name) or default))
    except ValueError:
        raise UserError(f"--{name} {flags[name]}: expected a whole number") from None


def decimal(flags: Mapping[str, str], name: str) -> float | None:
    try:
        return float(flags[name]) if name in flags else None
    except ValueError:
        raise UserError(f"--{name} {flags[name]}: expected a number") from None


def number(words: Sequence[str], name: str) -> float:
    """value() as a number; NaN for a word such as auto, and where it is not given."""
    with contextlib.suppress(ValueError):
        return float(value(words, name) or "")
    return math.nan


def counts(words: Sequence[str], *names: str) -> int:
    """The product of what the words give for these flags, 1 where one is not given."""
    return math.prod(max(1, integer({name: value(words, name)}, name, 1)) for name in names)


def is_on(flags: Mapping[str, str], name: str) -> bool:
    """Whether a switch is there and is not 0."""
    return flags.get(name, "0") != "0"


def stage(old: Mapping[str, str]) -> str:
    """RWKV-LM's stage; "0" for none. It was called my_pile_stage until 2025."""
    return old.get("train_stage") or old.get("my_pile_stage") or "0"


def of_2026(old: Mapping[str, str], words: Sequence[str]) -> bool:
    """Whether it is RWKV-PEFT's command line since it takes its methods from Hugging Face's peft."""
    methods = ("miss", "state", "adalora", "prefix")
    return bool(value(words, "peft_config")) or "miss_config" in old or value(words, "peft") in methods


def version(old: Mapping[str, str], words: Sequence[str]) -> str:
    """x060, x070 or what else the command line says of the model; "" for nothing."""
    return value(words, "my_testing") or value(words, "version") or old.get("rwkv_version") or ""
