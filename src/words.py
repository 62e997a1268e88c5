"""Numbers and values as people read them."""

from __future__ import annotations

from typing import Any


def counted(number: int, one: str, many: str = "") -> str:
    """ "1 row", "2,000 rows"; `many` where the plural is not `one` with an s."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def size_text(size: float) -> str:
    """Bytes in the unit that leaves one to three digits before the point, three digits in all: "31.4 MiB", "1.27 GiB"."""
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while size >= 999.5 and len(units) > 1:
        size /= 1024
        units.pop(0)
    if units[0] == "bytes":
        return counted(round(size), "byte")
    return f"{size:.2f} {units[0]}" if size < 9.995 else f"{size:.1f} {units[0]}" if size < 99.95 else f"{size:,.0f} {units[0]}"


def duration_text(seconds: float) -> str:
    """Seconds for what is short, days for what is long: "0.3 s", "72 s", "14 min", "5 h 12 min", "3 days 4 h"."""
    if seconds < 119.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    if (minutes := round(seconds / 60)) < 120:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} days {hours % 24} h"


def short(value: Any) -> str:
    """repr() that fits into a message."""
    shown = repr(value)
    return shown if len(shown) <= 200 else f"{shown[:200]}..."
