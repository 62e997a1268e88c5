"""Data files of any layout -> rows: ("FILE, line N", row).

A row has one of these forms, whatever the file looked like: {"text": str}, {"messages": [{"role": "system" | "user" | "assistant" | "tool",
"content": str, ...}, ...]}, {"prompt": str, "completion": str} (a text, of which the completion is trained), {"ids": int32 array} (n,).
"""

from .rows import read_rows

__all__ = ["read_rows"]
