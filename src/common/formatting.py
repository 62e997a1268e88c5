"""Numbers and values as people read them."""

from __future__ import annotations

import json
from typing import Any


def counted(number: int, one: str, many: str = "") -> str:
    """Write "1 row", "2,000 rows"; `many` if the plural is not `one` with an s."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def size_text(size: float) -> str:
    """Write bytes with three digits, in the unit that leaves one to three before the point: "31.4 MiB"."""
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while size >= 999.5 and len(units) > 1:
        size /= 1024
        units.pop(0)
    if units[0] == "bytes":
        return counted(round(size), "byte")
    if size < 9.995:
        return f"{size:.2f} {units[0]}"
    if size < 99.95:
        return f"{size:.1f} {units[0]}"
    return f"{size:,.0f} {units[0]}"


def short(value: Any) -> str:
    """Shorten repr() to fit into a message."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def shown(value: Any) -> str:
    """Show a value of JSON in JSON's words, shortened."""
    if isinstance(value, str):
        return short(value)
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr)
    except RecursionError:  # the value was parsed with fewer calls on the stack
        return "a value that is nested too deeply"
    return text if len(text) <= 200 else f"{text[:200]}..."


def both_ends(text: str, characters: int) -> str:
    """Shorten a text to at most `characters`: its beginning and its end, where results stand."""
    if len(text) <= characters:
        return text
    half = (characters - 3) // 2
    return f"{text[:half]} … {text[-half:]}"


def markdown_table(head: list[str], rows: list[list[str]], rule: str = "| --- ") -> str:
    """Write a table in Markdown; `rule` is a cell of the line under the head."""
    lines = [f"| {' | '.join(row)} |" for row in [head, *rows]]
    return "\n".join([lines[0], rule * len(head) + "|", *lines[1:]])
