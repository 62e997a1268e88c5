"""Data files -> rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rwkv_miss.errors import UserError

from .layouts import TOKENS, canonical
from .report import Kind, Report
from .sources import BINIDX, BY_NAME, Reading, Source, sources


def read_rows(
    data_file, report: Report | None = None, reading: Reading = BY_NAME, eod: Sequence[int] = (0,)
) -> Iterator[tuple[str, dict[str, Any]]]:
    """("FILE, line N", row) of every row that --data_file names, each once, whatever its weight.

    `eod` are the ids that end a document of binidx data. Raises UserError for a file that cannot be read or
    has no rows; what becomes of a bad row is the report's to say, an error if there is none.
    """
    report = report or Report()
    for source in sources(str(data_file), reading, report.notes):
        yield from read_source(source, report, reading, eod)


def read_source(
    source: Source, report: Report, reading: Reading, eod: Sequence[int]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """read_rows() of one source."""
    found = report.begin(source)
    for where, record in source.watched(eod, "reading"):
        try:
            kind, row = read_record(record, source, reading)
        except UserError as error:
            report.refuse(source.path, where, error)
            continue
        found.kinds[kind] += 1
        yield where, row
    report.require_rows(source)


def read_record(record: Any, source: Source, reading: Reading) -> tuple[Kind, dict[str, Any]]:
    """(what Found counts, the row) of something that source.read() gave. Raises UserError that says what is
    wrong with it.
    """
    record = source.parse(record)
    if isinstance(record, UserError):
        raise record
    layout, row = (TOKENS, record) if source.format == BINIDX else canonical(record, reading.fields)
    return (layout.name, layout.used, tuple(record)), row
