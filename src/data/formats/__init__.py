"""Data files of any layout -> ("FILE, line N", record).

A record has one of these forms, whatever the file looked like:

    {"text": str}
    {"messages": [{"role": "system" | "user" | "assistant" | "tool", "content": str, ...}, ...]}
    {"prompt": str, "completion": str}    a text, of which the completion is trained
    {"ids": int32 array (n,)}             the tokens of a document without its end
"""

from .records import read_record, read_records, read_source
from .report import Found, Report, WrongSetting, printable
from .sources import BINIDX, BY_NAME, Reading, Source, sample, sources

__all__ = [
    "BINIDX",
    "BY_NAME",
    "Found",
    "Reading",
    "Report",
    "Source",
    "WrongSetting",
    "printable",
    "read_record",
    "read_records",
    "read_source",
    "sample",
    "sources",
]
