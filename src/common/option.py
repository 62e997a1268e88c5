"""Option: a setting as a field of a dataclass, with its help text, other names and allowed values."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any


class Auto(enum.Enum):
    """The value of a number or mapping that is left to the program; it is neither a number nor true or false.

    The command line and YAML have 0, -1 or auto for it, as the help says.
    """

    AUTO = "auto"

    def __bool__(self) -> bool:
        raise TypeError("AUTO has no truth value: ask Config.is_automatic(), or take Config.settled()")


AUTO = Auto.AUTO


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Bounds of a setting's numbers; None is no bound."""

    low: float | None = None
    high: float | None = None
    below: float | None = None

    def text(self) -> str:
        """Describe the bounds: "at least 0 and below 1"."""
        sides = {"at least": self.low, "at most": self.high, "below": self.below}
        return " and ".join(
            f"{words} {number_text(bound)}" for words, bound in sides.items() if bound is not None
        )

    def complaint(self, value: float) -> str:
        """Say what is wrong with a value: "must be at least 1"; "" for nothing."""
        if self.high is not None and value > self.high:
            return f"must not be above {number_text(self.high)}"
        too_small = self.low is not None and value < self.low
        if not too_small and (self.below is None or value < self.below):
            return ""
        if self.low == 0 and self.below is None:
            return "must not be negative"
        return f"must be {self.text()}"


def number_text(number: float) -> str:
    """Write a large power of two as 2^31."""
    if isinstance(number, int) and number >= 2**31:
        return f"2^{number.bit_length() - 1}"
    return f"{number:g}".replace("e+", "e")


def opt(
    default: Any,
    help: str,
    alias: tuple[str, ...] = (),
    choices: tuple[str, ...] = (),
    automatic: bool = False,
    low: float | None = None,
    high: float | None = None,
    below: float | None = None,
    words: dict[str, Any] | None = None,
    bare: Any = None,
    file: bool = False,
    operator: bool = False,
) -> Any:
    """Make a setting with its help text, the names that neighbouring projects use for it, and its allowed
    values.

    `automatic`: the default leaves the choice to the program (src/planning/defaults.py); a Config then has
    AUTO, or "auto" where the setting is a text. `low` and `high` are the smallest and the largest number,
    `below` is the first that is too large. `words`: values that may be given as a word. `bare`: the value of
    a name without one in a mapping. `file`: the setting names a file or a folder that is read. `operator`: it
    runs code, names a place to write, or is about the process itself; a server's page may not set it.
    """
    meta = {"help": help, "alias": alias, "choices": choices, "automatic": automatic, "words": words or {}}
    meta |= {"bounds": Bounds(low, high, below), "bare": bare, "file": file, "operator": operator}
    meta["type"], meta["written"] = type(default), default  # `written`: the default in files and in the help
    if automatic and not isinstance(default, str):
        return dataclasses.field(default=AUTO, metadata=meta)
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata=meta)
    return dataclasses.field(default=default, metadata=meta)
