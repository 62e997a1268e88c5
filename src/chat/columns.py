"""Texts side by side in a terminal, where a character may be two columns wide."""

from __future__ import annotations

import unicodedata


def side_by_side(left: tuple[str, str], right: tuple[str, str], width: int) -> str:
    """Put two (title, text) into columns, `width` characters of a terminal together."""
    half = max(10, (width - 3) // 2)
    columns = [
        [title, "-" * half, *(line for part in text.splitlines() for line in wrapped(part, half))]
        for title, text in (left, right)
    ]
    rows = max(map(len, columns))
    padded = [
        [line + " " * (half - cells(line)) for line in column + [""] * (rows - len(column))]
        for column in columns
    ]
    return "\n".join(f"{a} | {b}".rstrip() for a, b in zip(*padded, strict=True))


def cells(text: str) -> int:
    """Count the columns of a terminal that a text takes."""
    visible = [c for c in text if not unicodedata.combining(c)]
    wide = [c for c in visible if unicodedata.east_asian_width(c) in "WF"]
    return len(visible) + len(wide)


def wrapped(text: str, width: int) -> list[str]:
    """Wrap one line into lines of at most `width` columns, broken at spaces if there are any."""
    lines, line = [], ""
    for c in text.expandtabs(4):
        if cells(line + c) > width:
            head, space, tail = line.rpartition(" ")
            lines.append(head if space and head.strip() else line)
            line = tail if space and head.strip() else ""
            if c == " " and not line:
                continue
        line += c
    return [*lines, line]
