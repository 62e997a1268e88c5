"""Records of data files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rwkv_miss.errors import UserError

from .errors import LeftOut
from .layouts import SFT, TOKENS, RecordLayout, canonical, with_empty_answer
from .preference_layouts import preference, with_empty_cells
from .report import RecordKind, Report, place_of
from .sources import BINIDX, BY_NAME, DELIMITERS, DataSource, Reading, sources
from .text import PLAIN, bytes_of, too_large


def read_records(
    data_file, report: Report | None = None, reading: Reading = BY_NAME, eod: Sequence[int] = (0,)
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("FILE, line N", record) of every record of --data_file, each once, whatever its weight.

    `eod` are the ids that end a document of binidx data. Raises UserError for a file that cannot be read or
    has no records. The report decides about a bad record; without a report it is an error.
    """
    report = report or Report()
    for source in sources(str(data_file), reading, report.notes):
        yield from read_source(source, report, reading, eod)


def read_source(
    source: DataSource, report: Report, reading: Reading, eod: Sequence[int]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read the records of one source."""
    found = report.begin(source)
    for where, raw in source.watched(eod, "reading", found.join):
        try:
            kind, record = read_record(raw, source, reading)
        except LeftOut as left_out:
            found.leave_out(where, left_out)
            continue
        except UserError as error:
            report.refuse(source.path, where, error)
            continue
        found.kinds[kind] += 1
        found.place = place_of(where)[0]
        yield where, record
    report.require_records(source)


def read_record(raw: Any, source: DataSource, reading: Reading) -> tuple[RecordKind, dict[str, Any]]:
    """Turn an item of source.read() into (the kind that Found counts, the record).

    Raises UserError that says what is wrong with it.
    """
    parsed = source.parse(raw)
    if isinstance(parsed, UserError):
        raise parsed
    if source.format not in (BINIDX, PLAIN) and (size := bytes_of(parsed)) > reading.row_bytes:
        raise too_large(size, reading.row_bytes)
    layout, record = _understood(parsed, source, reading)
    return (layout.name, layout.used, tuple(parsed)), record


def _understood(parsed: Any, source: DataSource, reading: Reading) -> tuple[RecordLayout, dict[str, Any]]:
    """Return a record's layout and its form."""
    has_cells = source.format in DELIMITERS.values()
    if reading.rows != SFT:
        if has_cells:
            parsed = with_empty_cells(parsed, reading.fields)
        return preference(parsed, reading.fields, reading.rows)
    if has_cells:
        parsed = with_empty_answer(parsed, reading.fields)
    return (TOKENS, parsed) if source.format == BINIDX else canonical(parsed, reading.fields)
