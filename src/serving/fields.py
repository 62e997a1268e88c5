"""Fields of a request's JSON object: each is read once, by name, and checked."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from typing import Any

from ..common.formatting import short, shown
from .errors import Refused, wrong

# fields of clients that change no answer here, and that nobody misses
HARMLESS = set(
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention".split()
)
LARGEST_SEED = 2**63


def read_object(body: bytes) -> dict[str, Any]:
    """Read the JSON object of a request. Raises Refused for anything else."""

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        value = json.loads(body, parse_constant=no_constant)
    except RecursionError:
        raise Refused(400, "the request is nested too deeply", code="invalid_json") from None
    except ValueError as error:
        seen = f"begins with {short(body[:20].decode(errors='replace'))}" if body else "has no body"
        raise Refused(
            400, f"the request {seen}, expected a JSON object: {short(str(error))}", code="invalid_json"
        ) from None
    if not isinstance(value, dict):
        raise Refused(400, f"the request is {shown(value)}, expected a JSON object", code="invalid_json")
    return value


class Fields:
    """Fields of an object. `within` is the beginning of a field's name in messages.

    null counts as absent. Every method raises Refused, with the field's name.
    """

    def __init__(self, values: dict[str, Any], within: str = ""):
        self.values, self.within = values, within
        self.seen: set[str] = set()

    def take(self, name: str) -> Any:
        """Return a field's value as it is; None if it is absent."""
        self.seen.add(name)
        return self.values.get(name)

    def refuse(self, name: str, value: Any, expected: str) -> Refused:
        seen = "is missing" if value is None else f"got {shown(value)}"
        return wrong(self.within + name, f"{seen}, expected {expected}")

    def text(self, name: str, default: str | None = None) -> str | None:
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.refuse(name, value, "a text")
        return value

    def required(self, *names: str) -> list[str]:
        """Read texts that a request must have."""
        texts = [self.text(name) or "" for name in names]
        if "" in texts:
            raise wrong(self.within + names[texts.index("")], "is missing")
        return texts

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(name, value, "true or false")
        return value

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int | None:
        value = self.take(name)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.refuse(name, value, f"a whole number from {low} to {high}" if low < high else str(low))
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float | None:
        value = self.take(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.refuse(name, value, "a number")
        # an integer may be too large for a float
        if not low <= value <= high or not math.isfinite(value):
            raise self.refuse(name, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def choice(self, name: str, choices: Collection[str]) -> str | None:
        value = self.text(name)
        if value is not None and value not in choices:
            raise self.refuse(name, value, f"one of {', '.join(choices)}")
        return value

    def objects(self, name: str, least: int = 0) -> list[dict[str, Any]] | None:
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
            raise self.refuse(name, value, "a list of objects")
        if len(value) < least:
            raise self.refuse(name, value, f"at least {least} of them")
        return value

    def inner(self, name: str) -> Fields | None:
        """Return the fields of an object within this one."""
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.refuse(name, value, "an object")
        return Fields(value, f"{self.within}{name}.")

    def ignored(self) -> list[str]:
        """Name the fields that nobody has read."""
        return sorted(self.values.keys() - self.seen - HARMLESS)
