"""Values of flags on a command line of another project."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence

from rwkv_miss.errors import UserError


def value(words: Sequence[str], name: str) -> str | None:
    """Return the value of a flag in a command line, or None. The last one counts, as in argparse."""
    found = None
    for word, after in zip(words, [*words[1:], ""]):
        flag, equals, given = word.partition("=")
        if flag == f"--{name}":
            found = given if equals else after
    return found


def integer(flags: Mapping[str, str], name: str, default: int) -> int:
    return _whole(flags.get(name), name, default)


def integer_of(words: Sequence[str], name: str, default: int) -> int:
    """Return value() as a whole number."""
    return _whole(value(words, name), name, default)


def _whole(given: str | None, name: str, default: int) -> int:
    try:
        return int(float(given or default))
    except ValueError:
        raise UserError(f"--{name} {given}: expected a whole number") from None


def decimal(flags: Mapping[str, str], name: str) -> float | None:
    try:
        return float(flags[name]) if name in flags else None
    except ValueError:
        raise UserError(f"--{name} {flags[name]}: expected a number") from None


def number(words: Sequence[str], name: str) -> float:
    """Return value() as a number; NaN for a word such as auto, and where it is not given."""
    with contextlib.suppress(ValueError):
        return float(value(words, name) or "")
    return math.nan


def product(words: Sequence[str], *names: str) -> int:
    """Multiply the values of these flags, of which one that is not given is 1."""
    return math.prod(max(1, integer_of(words, name, 1)) for name in names)


def is_on(flags: Mapping[str, str], name: str) -> bool:
    """Tell whether a switch is there and is not 0."""
    return flags.get(name, "0") != "0"


def stage(old: Mapping[str, str]) -> str:
    """Return RWKV-LM's stage; "0" for none. It was called my_pile_stage until 2025."""
    return old.get("train_stage") or old.get("my_pile_stage") or "0"


def of_2026(old: Mapping[str, str], words: Sequence[str]) -> bool:
    """Tell whether the command line is for RWKV-PEFT of 2026, with the methods of Hugging Face's peft."""
    methods = ("miss", "state", "adalora", "prefix")
    return bool(value(words, "peft_config")) or "miss_config" in old or value(words, "peft") in methods


def version(old: Mapping[str, str], words: Sequence[str]) -> str:
    """Return the model's version as the command line has it, such as x070; "" for none."""
    return value(words, "my_testing") or value(words, "version") or old.get("rwkv_version") or ""
