"""Data files of any layout -> rows: ("FILE, line N", row).

A row has one of these forms, whatever the file looked like: {"text": str}, {"messages": [{"role": "system" |
"user" | "assistant" | "tool", "content": str, ...}, ...]}, {"prompt": str, "completion": str} (a text, of
which the completion is trained), {"ids": int32 array} (n,), a document without its end.
"""

from .report import Found, Report, WrongSetting
from .rows import read_record, read_rows, read_source
from .sources import BINIDX, BY_NAME, Reading, Source, sample, sources

__all__ = [
    "BINIDX",
    "BY_NAME",
    "Found",
    "Reading",
    "Report",
    "Source",
    "WrongSetting",
    "read_record",
    "read_rows",
    "read_source",
    "sample",
    "sources",
]
