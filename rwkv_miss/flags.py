"""Flags of a program, declared as the fields of a dataclass: type, default, help, names, choices and bounds.

    @options
    class Flags:
        out: str = flag(help="file to write")
        rank: int = flag(64, "rank of the adapter; default %(default)s", low=1)

    flags = parse_flags(Flags, argv, prog="python -m scripts.example", description=__doc__)

A field without a default is required. A bool is a switch, and a list may be given several times. A subclass
that declares a field anew keeps its place in --help. Of several base classes the last one's flags come first.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from .errors import Parser, UserError

Options = TypeVar("Options")
REQUIRED = dataclasses.MISSING
options = dataclasses.dataclass(frozen=True, kw_only=True)


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Bounds of a setting's numbers; None is no bound."""

    low: float | None = None
    high: float | None = None
    below: float | None = None
    above: float | None = None

    def text(self) -> str:
        """Describe the bounds: "at least 0 and below 1"."""
        sides = {"above": self.above, "at least": self.low, "at most": self.high, "below": self.below}
        return " and ".join(
            f"{words} {number_text(bound)}" for words, bound in sides.items() if bound is not None
        )

    def complaint(self, value: float) -> str:
        """Say what is wrong with a value: "must be at least 1"; "" for nothing."""
        if not abs(value) < math.inf:
            return "must be a finite number"
        if self.high is not None and value > self.high:
            return f"must not be above {number_text(self.high)}"
        too_small = (self.low is not None and value < self.low) or (
            self.above is not None and value <= self.above
        )
        if not too_small and (self.below is None or value < self.below):
            return ""
        return "must not be negative" if self.low == 0 and self.below is None else f"must be {self.text()}"


def number_text(number: float) -> str:
    """Write a large power of two as 2^31."""
    if isinstance(number, int) and abs(number) >= 2**31:
        return f"{'-' * (number < 0)}2^{abs(number).bit_length() - 1}"
    return f"{number:g}".replace("e+0", "e").replace("e+", "e")


def flag(
    default: Any = REQUIRED,
    help: str | None = None,
    alias: tuple[str, ...] = (),
    choices: Sequence[str] = (),
    low: float | None = None,
    high: float | None = None,
    below: float | None = None,
    above: float | None = None,
    **more: Any,
) -> Any:
    """Declare a flag with its help, other names and allowed values.

    `low` and `high` are the smallest and the largest number; `above` and `below` are no longer allowed.
    `more` is metavar, nargs or type, as argparse has them; `name`, where the flag is not called as the
    field; `positional`; or what a program wants to know of the field.
    """
    meta = {
        "help": help,
        "alias": alias,
        "choices": choices,
        "bounds": Bounds(low, high, below, above),
        **more,
    }
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=default.copy, metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


def flags_of(kind: type) -> Any:
    """Declare a field that holds another dataclass, whose flags come in its place."""
    return dataclasses.field(default_factory=kind, metadata={"flags": kind})


# annotation as `from __future__ import annotations` leaves it -> keywords
KINDS = {
    "str": {},
    "bool": {"action": "store_true"},
    "int": {"type": int},
    "float": {"type": float},
    "list[str]": {"action": "append"},
}


def keywords(field: dataclasses.Field) -> dict[str, Any]:
    """Return the keywords of argparse's add_argument() for a field, without its names."""
    chosen = {name: field.metadata[name] for name in ("metavar", "nargs", "type") if name in field.metadata}
    if "type" not in chosen:
        chosen |= KINDS[field.type.removesuffix(" | None")]
    if "nargs" in chosen:
        chosen.pop("action", None)
    if field.metadata["choices"]:
        chosen["choices"] = field.metadata["choices"]
    if (default := default_of(field)) is not REQUIRED:
        chosen["default"] = default
    elif "positional" not in field.metadata:
        chosen["required"] = True
    return {"help": field.metadata["help"], **chosen}


def add_flags(
    parser: argparse._ActionsContainer,
    kind: type,
    keywords: Callable[[dataclasses.Field], dict[str, Any]] = keywords,
) -> None:
    """Add the flags of a dataclass to a parser, or to a group of it. Other fields are left out."""
    for field in dataclasses.fields(kind):
        if "flags" in field.metadata:
            add_flags(parser, field.metadata["flags"], keywords)
        elif "positional" in field.metadata:
            parser.add_argument(field.name, **keywords(field))
        elif "alias" in field.metadata:
            names = [f"--{name}" for name in (name_of(field), *field.metadata["alias"])]
            parser.add_argument(*names, dest=name_of(field), **keywords(field))


def default_of(field: dataclasses.Field) -> Any:
    """Return the default; REQUIRED if there is none."""
    return field.default if field.default_factory is REQUIRED else field.default_factory()


def given(options: Any, names: Iterable[str] | None = None) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of the named flags that have another value than their default; None: of all."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if (names is None or field.name in names) and value != default_of(field):
            yield field.name, value


def name_of(field: dataclasses.Field) -> str:
    """Return what the flag of a field is called."""
    return field.metadata.get("name", field.name)


def options_of(kind: type[Options], values: dict[str, Any]) -> Options:
    """Make the dataclass from values by the flags' names, which are taken out of them.

    Raises UserError for a number that is out of its bounds.
    """
    made = {}
    for field in dataclasses.fields(kind):
        if "flags" in field.metadata:
            made[field.name] = options_of(field.metadata["flags"], values)
        elif "alias" in field.metadata:
            value = made[field.name] = values.pop(name_of(field))
            if isinstance(value, (int, float)) and (wrong := field.metadata["bounds"].complaint(value)):
                raise UserError(f"--{name_of(field)} {value}: {wrong}")
    return kind(**made)


def parse_flags(
    kind: type[Options], argv: Sequence[str] | None, defaults: Mapping[str, Any] = {}, **about: Any
) -> Options:
    """Parse a command line, None for the process's. `defaults` come before the declared ones; `about` is the
    parser's prog, description and so on."""
    parser = Parser(**about)
    add_flags(parser, kind)
    parser.set_defaults(**defaults)
    return options_of(kind, vars(parser.parse_args(argv)))
