"""Options of adapter methods, and what docs/methods.md says about a method."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, ClassVar

from .errors import UserError


@dataclasses.dataclass(frozen=True)
class About:
    """A method's row in docs/methods.md, for a weight W of d outputs and k inputs, and rank r.

    title: the method's name in text. change: the change of W. numbers: the number of trained parameters.
    start: their first values. paper: the number at arXiv.
    """

    title: str = ""
    change: str = ""
    numbers: str = ""
    start: str = ""
    paper: str = ""


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """Settings of a method; subclasses add fields.

    `aliases` maps the names of neighbouring projects to fields.
    """

    aliases: ClassVar[dict[str, str]] = {}

    @classmethod
    def parse(cls, values: dict[str, Any]) -> NoOptions:
        """Read options from a dictionary. Raises UserError for an unknown key or a wrong value."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        default = cls()
        known: dict[str, Any] = {}
        for key, value in values.items():
            name = cls.aliases.get(key, key)
            if name not in fields:
                short = {field: alias for alias, field in cls.aliases.items() if len(alias) == 1}
                known_names = ", ".join(
                    f"{field} ({short[field]})" if field in short else field for field in sorted(fields)
                )
                raise UserError(
                    f"adapter option {key!r} is unknown; this method has: {known_names or 'no options'}"
                )
            if name in known:
                raise UserError(
                    f"adapter option {name} is given twice, by two of its names; drop one of them"
                )
            kind = type(getattr(default, name))
            if kind is dict:
                known[name] = _by_name(key, value, fields[name].metadata["of"])
            else:
                known[name] = _scalar(key, value, kind)
        return cls(**known)

    def at(self, name: str) -> NoOptions:
        """Return the options of one linear, by its dotted name."""
        return self


def _scalar(key: str, value: Any, kind: type) -> Any:
    """Convert an option's value to the type of its default; 0 and 1 stand for false and true."""
    if kind is bool:
        fits = isinstance(value, bool) or value in (0, 1)
    elif kind is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    else:
        fits = isinstance(value, kind) and not isinstance(value, bool)
    if not fits or isinstance(value, float) and not math.isfinite(value):
        expected = {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "a text")
        raise UserError(f"adapter option {key} must be {expected}, got {value!r}")
    return kind(value)


def _by_name(key: str, value: Any, of: str) -> dict[str, Any]:
    """Check a map from parts of names to numbers; `of` names them: "ranks", or positive factors."""
    kinds = (int,) if of == "ranks" else (int, float)
    if not isinstance(value, dict) or not all(
        type(number) in kinds and 0 < number < math.inf for number in value.values()
    ):
        raise UserError(
            f'adapter option {key} must be names with {of}, such as {{"ffn": 32, "blocks.0": 8}}, got'
            f" {value!r}"
        )
    return dict(value)


def option(default: Any, meaning: str) -> Any:
    """Make the field of an option; `meaning` is its row in docs/methods.md."""
    return dataclasses.field(default=default, metadata={"meaning": meaning})


def names_with(of: str, meaning: str = "") -> Any:
    """Make the field of an option that is a map from parts of names to ranks or factors; empty by default."""
    return dataclasses.field(default_factory=dict, metadata={"of": of, "meaning": meaning})


def most_specific(by_name: dict[str, Any], name: str, default: Any) -> Any:
    """Look a dotted name up in a map from parts of names: the longest part that is in the name counts.

    Examples of parts: "ffn", "att.key", "blocks.0".
    """
    found = [part for part in by_name if f".{part}." in f".{name}."]
    return by_name[max(found, key=len)] if found else default


def check_parts(what: str, by_name: dict[str, Any], names: Iterable[str]) -> None:
    """Raise UserError for a part of a name that is in none of `names`."""
    for part in by_name:
        if not any(f".{part}." in f".{name}." for name in names):
            raise UserError(
                f"{what} {part!r} is in no name; the names are such as {', '.join(list(names)[:3])}"
            )


@dataclasses.dataclass(frozen=True)
class Options(NoOptions):
    """The options of most methods; subclasses add fields.

    `rank_map` gives linears a rank of their own, by parts of their names: {"ffn": 32, "blocks.0.att": 8}; the
    longest part counts.
    """

    rank: int = 64
    rank_map: dict[str, int] = names_with("ranks")
    aliases: ClassVar[dict[str, str]] = {"r": "rank", "rank_pattern": "rank_map"}

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"rank {self.rank} must be at least 1")

    def at(self, name: str) -> Options:
        return self.with_rank(most_specific(self.rank_map, name, self.rank))

    def with_rank(self, rank: int, **others: Any) -> Options:
        """Copy the options for one linear of this rank; `others` are options that change with it."""
        return dataclasses.replace(self, rank=rank, rank_map={}, **others)
