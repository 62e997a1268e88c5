"""Chat template in a checkpoint's metadata: NAME:TOOL_STYLE, or a Jinja template's source.

A name without a tool style was written before there were tool styles. It has the meaning of those days.
"""

from __future__ import annotations

HERMES, MARKDOWN = "hermes", "markdown"
TOOL_STYLES = ("json", "signatures", MARKDOWN, HERMES)
# names that mean another form today, and what their form is called
EARLIER = {f"think-{length}": f"think-{length}-2025" for length in ("normal", "short", "long")}


def is_jinja(record: str) -> bool:
    """Tell whether a record is a Jinja template's source, and no name."""
    return "{" in record


def with_tool_style(record: str) -> str:
    """Return the record as it is written today."""
    if is_jinja(record) or ":" in record:
        return record
    return f"{EARLIER.get(record, record)}:{HERMES}"
