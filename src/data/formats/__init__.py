"""Formats: data files of any layout -> ("FILE, line N", record).

A record has one of these forms, whatever the file looked like:

    {"text": str}
    {"messages": [{"role": "system" | "user" | "assistant" | "tool", "content": str, ...}, ...]}
    {"prompt": str, "completion": str}    a text; its completion is trained
    {"ids": int32 array (n,)}             the tokens of a document without its end

Pairs of answers, and answers with a label, have one of these; "chosen", "rejected" and "completion" are texts
where there is a "prompt", and turns that follow "messages" else:

    {"prompt": str or "messages": [...], "chosen": ..., "rejected": ...}
    {"prompt": str or "messages": [...], "completion": ..., "label": bool}
"""

from .errors import LeftOut, WrongSetting
from .layouts import EMPTY, LABELS, PAIRS, ROWS, SFT, has_empty_answer
from .records import read_record, read_records, read_source
from .report import Report, SourceFindings, encodable, place_of, places_text
from .sources import BINIDX, BY_NAME, DataSource, Reading, sample, sources

__all__ = [
    "BINIDX",
    "BY_NAME",
    "EMPTY",
    "SourceFindings",
    "LABELS",
    "LeftOut",
    "PAIRS",
    "ROWS",
    "Reading",
    "Report",
    "SFT",
    "DataSource",
    "WrongSetting",
    "encodable",
    "has_empty_answer",
    "place_of",
    "places_text",
    "read_record",
    "read_records",
    "read_source",
    "sample",
    "sources",
]
