"""Bounded reading of files in folders that anybody may write into.

A pipe in the place of a file is not waited for. A text that would cost far more than its bytes is refused.
All refusals are OSError or ValueError.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import yaml

LARGEST = 1 << 22  # bytes of a JSON object
LARGEST_LOG = 1 << 26  # bytes of a file of JSON lines
LARGEST_SETTINGS = 1 << 17  # bytes of a YAML file
MOST_VALUES = 1 << 18  # in a JSON text: 64 bytes or more each
MOST_NODES = 5000  # in a YAML file: PyYAML takes 50 us or more for each
DEPTH = 32  # lists and objects in each other
DIGITS = 20  # digits of a whole number
NUMBER = (int, float)


def open_regular(path: str, flags: int = os.O_RDONLY) -> BinaryIO:
    """Open a regular file, or raise OSError at once for a pipe, a device or a folder."""
    # O_BINARY: on Windows a text would end at Ctrl-Z
    number = os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0), 0o666)
    try:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", path)
        return os.fdopen(number, "ab" if flags & os.O_APPEND else "rb")
    except BaseException:
        os.close(number)
        raise


def read_bytes(path: str, most: int) -> bytes:
    """Read a regular file of at most this many bytes."""
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{path} has more than the {most:,} bytes that are read of such a file")
    return content


def _whole_number(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"a number has {len(text)} digits, expected at most {DIGITS}")
    return int(text)


def _finite(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None


# NaN and Infinity become null, as in the page's own replies
DECODER = json.JSONDecoder(parse_int=_whole_number, parse_float=_finite, parse_constant=lambda name: None)


def parse_json(content: bytes) -> Any:
    """Parse a JSON text. Raises ValueError also for too many values, and for those nested too deeply."""
    opened = content.count(b"{") + content.count(b"[")
    if opened + content.count(b",") > MOST_VALUES:
        raise ValueError(f"a JSON text has more than {MOST_VALUES:,} values")
    try:
        value = DECODER.decode(content.decode())
    except RecursionError:
        raise ValueError("a JSON text is nested too deeply") from None
    if opened > DEPTH and _is_deep(value):
        raise ValueError(f"a JSON text is nested more than {DEPTH} deep")
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEPTH):
        inside = [values for values in level if isinstance(values, (dict, list))]
        level = [v for values in inside for v in (values.values() if isinstance(values, dict) else values)]
    return bool(level)


def _typed(values: Any, kinds: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(f"a JSON text is a {type(values).__name__}, expected an object")
    return {name: value for name, value in values.items() if isinstance(value, kinds.get(name, object))}


def read_object(path: str, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Read the JSON object in a file. A field of another type than that in `kinds` counts as absent."""
    return _typed(parse_json(read_bytes(path, LARGEST)), kinds)


def read_objects(path: str, kinds: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Read the JSON objects in the lines of a file, as read_object() does.

    They end before a line that has not all of `kinds`, such as the last one after a crash, and where the file
    has LARGEST_LOG bytes or MOST_VALUES values.
    """
    rest, marks = LARGEST_LOG, MOST_VALUES
    with open_regular(path) as file:
        while line := file.readline(rest):
            rest, marks = rest - len(line), marks - sum(map(line.count, (b",", b"[", b"{")))
            try:
                values = _typed(parse_json(line), kinds) if marks >= 0 else {}
            except ValueError:
                return
            if not values.keys() >= kinds.keys():
                return
            yield values


PLAIN_TAGS = ("null", "bool", "int", "float", "str", "seq", "map")


class _SettingsLoader(yaml.SafeLoader):
    """Loader of at most MOST_NODES plain values, without aliases. A key stands once. A date is a text."""

    yaml_constructors = {
        tag: made
        for tag, made in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in PLAIN_TAGS
    }
    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in found if tag.rpartition(":")[2] in PLAIN_TAGS]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    nodes = depth = 0

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias (*name) is not read in settings; write its value out")
        self.nodes, self.depth = self.nodes + 1, self.depth + 1
        if self.nodes > MOST_NODES or self.depth > DEPTH:
            raise yaml.YAMLError(
                f"it has more than {MOST_NODES:,} values, or more than {DEPTH} inside each other; a file"
                " of settings is small"
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor):
        """Refuse a key that stands twice: YAML forbids it, and the last one would win."""
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if first := lines.get((key.tag, key.value)):
                raise yaml.YAMLError(
                    f"{key.value} stands twice, in line {first} and in line {line}; keep one of them"
                )
            lines[key.tag, key.value] = line
        return node


def read_settings(path: str) -> Any:
    """Read the value in a YAML file. Raises OSError, ValueError or YAMLError."""
    content = read_bytes(path, LARGEST_SETTINGS)
    try:
        return yaml.load(content, _SettingsLoader)
    except (LookupError, ArithmeticError, TypeError) as error:  # PyYAML's, of `!!int ""` and `!!bool foo`
        raise ValueError(f"a value is not what its tag says ({type(error).__name__}: {error})") from None
