"""Data files -> rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rwkv_miss.errors import UserError

from .layouts import TOKENS, canonical
from .report import Found, Report
from .sources import BY_NAME, Reading, Source, sources


def read_rows(data_file, report: Report | None = None, reading: Reading = BY_NAME, eod: Sequence[int] = (0,)) -> Iterator[tuple[str, dict[str, Any]]]:
    """("FILE, line N", row) of every row that --data_file names, each once, whatever its weight.

    `eod` are the ids that end a document of binidx data. Raises UserError for a file that cannot be read or has no rows; what becomes of a
    bad row is the report's to say, an error if there is none.
    """
    report = report or Report()
    for source in sources(str(data_file), reading, report.notes):
        yield from read_source(source, report, reading, eod)


def read_source(source: Source, report: Report, reading: Reading, eod: Sequence[int]) -> Iterator[tuple[str, dict[str, Any]]]:
    """read_rows() of one source."""
    found = report.files[source.path] = Found(source.format)  # of this reading, also of a file that is named twice
    for where, record in source.read(eod):
        try:
            if isinstance(record, UserError):
                raise record
            layout, row = (TOKENS, record) if source.format == "binidx" else canonical(record, reading.fields)
        except UserError as error:
            report.refuse(source.path, where, error)
            continue
        found.kinds[layout.name, layout.used, tuple(record)] += 1
        yield where, row
    if not found.kinds:
        what = f" that can be used: all {found.bad} are bad, such as {found.reasons[0]}" if found.bad else ""
        raise UserError(f"{source.path} ({source.format}) holds no rows{what}")
