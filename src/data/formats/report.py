"""Report on reading: formats, columns, and the records that were left out."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rwkv_miss.errors import UserError

from ...common.formatting import counted
from .errors import LeftOut, WrongSetting
from .text import PLAIN

if TYPE_CHECKING:
    from .sources import DataSource

RecordKind = tuple[str, tuple[str, ...], tuple[str, ...]]  # name of the layout, columns used, all columns
SHOWN = 3  # number of reasons in the plan, and of files with a line of their own


@dataclasses.dataclass
class SourceFindings:
    """Findings about one source."""

    format: str
    place: str = ""  # the beginning of its records' places, such as "data.jsonl, line"
    kinds: collections.Counter[RecordKind] = dataclasses.field(default_factory=collections.Counter)
    bad: int = 0  # records that can't be used
    reasons: list[str] = dataclasses.field(default_factory=list)  # errors of the first bad records
    # rows that teach nothing: reason -> (their number, the places of the first)
    left_out: dict[str, tuple[int, list[str]]] = dataclasses.field(default_factory=dict)
    rows_in_cells: int = 0  # lines within cells of CSV that look like rows
    joined: str = ""  # the place of the first of these cells

    def join(self, where: str, rows: int) -> None:
        self.rows_in_cells += rows
        self.joined = self.joined or where

    def leave_out(self, where: str, reason: LeftOut) -> None:
        count, places = self.left_out.get(str(reason), (0, []))
        self.left_out[str(reason)] = (count + 1, [*places, where][:SHOWN])

    def refuse(self, reason: str) -> None:
        self.bad += 1
        self.reasons = [*self.reasons, reason][:SHOWN]

    def left_out_texts(self) -> list[str]:
        """Say for each reason how many rows teach nothing, and where the first of them are."""
        return [
            f"{counted(count, 'row')}, in which {reason}: {places_text(count, places)}"
            for reason, (count, places) in self.left_out.items()
        ]

    def unusable(self) -> str:
        """Say why no record can be used, if none can."""
        bad = [f"such as {self.reasons[0]}"] if self.reasons else []
        return f"no row can be used, {'; '.join([*bad, *(f'left out {t}' for t in self.left_out_texts())])}"

    def describe(self) -> str:
        if self.format == PLAIN:
            return PLAIN
        shown = f"{self.format}, {counted(self.kinds.total(), 'row')}"
        if layouts := self._layouts():
            shown += f", {', '.join(layouts)}"
        used = {name for _, columns, _ in self.kinds for name in columns}
        # a dict keeps the order of the columns
        columns = dict.fromkeys(name for _, _, columns in self.kinds for name in columns)
        if unused := [name for name in columns if name not in used]:
            shown += f"; not used: {', '.join(unused[:12])}{' ...' if len(unused) > 12 else ''}"
        return shown

    def _layouts(self) -> list[str]:
        """Name the usual layouts, with their counts if there are several."""
        layouts: collections.Counter[str] = collections.Counter()
        for (name, _, _), count in self.kinds.items():
            layouts[name] += count
        usual = [(name, count) for name, count in layouts.most_common(SHOWN) if name]
        return [f"{name} ({count})" if len(layouts) > 1 else name for name, count in usual]

    def to_json(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "place": self.place,
            "kinds": [[*kind, count] for kind, count in self.kinds.items()],
            "bad": self.bad,
            "reasons": self.reasons,
            "left_out": self.left_out,
            "rows_in_cells": self.rows_in_cells,
            "joined": self.joined,
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> SourceFindings:
        kinds: collections.Counter[RecordKind] = collections.Counter()
        for name, used, columns, count in record["kinds"]:
            kinds[name, tuple(used), tuple(columns)] = count
        left_out = {reason: (count, places) for reason, (count, places) in record["left_out"].items()}
        same = {
            name: record[name] for name in ("format", "place", "bad", "reasons", "rows_in_cells", "joined")
        }
        return cls(**same, kinds=kinds, left_out=left_out)


@dataclasses.dataclass
class Report:
    """Collector of findings, source by source."""

    on_bad_row: str = "stop"  # a bad record is an error; "skip": it is counted
    hint: str = ""  # end of an error that leaving out the record would avoid
    files: dict[str, SourceFindings] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    contradictions: str = ""  # rows with different answers to one question

    def begin(self, source: DataSource) -> SourceFindings:
        """Start empty findings for a source; the second reading of a file replaces those of the first."""
        self.files[source.path] = SourceFindings(source.format)
        return self.files[source.path]

    def require_records(self, source: DataSource) -> None:
        """Raise UserError if reading the source has found no record."""
        file = self.files[source.path]
        if not file.kinds:
            reasons = file.left_out_texts()
            if file.bad:
                share = file.bad if reasons else f"all {file.bad}"
                # the file is named before, and the place of plain text is the file alone
                first = file.reasons[0].removeprefix(f"{source.path}, ")
                reasons.insert(0, f"{share} are bad, such as {first}")
            what = f" that can be used: {'; '.join(reasons)}" if reasons else ""
            raise UserError(f"{source.path} ({source.format}) holds no rows{what}")

    def refuse(self, path: str, where: str, reason: object) -> None:
        """Raise UserError for a record of the source `path` that cannot be used, or count it as skipped."""
        if self.on_bad_row == "stop":
            hint = "" if isinstance(reason, WrongSetting) else self.hint
            raise UserError(f"{where}: {reason}{hint}")
        self.files[path].refuse(f"{where}: {reason}")

    @property
    def bad(self) -> int:
        return sum(found.bad for found in self.files.values())

    def lines(self) -> list[str]:
        """Return lines about the sources, and about all rows that are not used."""
        warnings = [encodable(f"warning    {text}") for text in self.warnings()]
        return [*self.source_lines(), *warnings, *self.bad_lines(), *self.left_out_lines()]

    def warnings(self) -> list[str]:
        """Say what in rows that are used is probably not intended."""
        joined = [
            f"{counted(found.rows_in_cells, 'line')} in cells between double quotes look like rows, first in"
            f' {found.joined}: close the quote, or write "" for a quote in a cell'
            for found in self.files.values()
            if found.rows_in_cells
        ]
        return [*joined, *filter(None, [self.contradictions])]

    def bad_lines(self) -> list[str]:
        """Return lines about rows that cannot be used."""
        if not self.bad:
            return []
        be = "is" if self.bad == 1 else "are"
        reasons = [f"    {reason}" for found in self.files.values() for reason in found.reasons]
        return [
            f"warning    {counted(self.bad, 'row')} cannot be used and {be} left out (--on_bad_row skip),"
            " such as:",
            *map(encodable, reasons[:SHOWN]),
        ]

    def left_out_lines(self) -> list[str]:
        """Return lines about rows that teach nothing."""
        texts = [text for found in self.files.values() for text in found.left_out_texts()]
        return [encodable(f"left out   {text}") for text in texts]

    def source_lines(self, but: str = "") -> list[str]:
        """Return lines about the sources other than `but`, and notes about all of them."""
        shown = list(self.files.items())[:SHOWN]
        lines = [f"format     {path}: {found.describe()}" for path, found in shown if path != but]
        if len(self.files) > SHOWN:
            formats = collections.Counter(found.format for found in self.files.values())
            named = ", ".join(f"{count} {name}" for name, count in formats.items())
            lines.append(f"format     {len(self.files)} files in all: {named}")
        return [encodable(line) for line in lines + self.notes]


def place_of(where: str) -> tuple[str, int]:
    """Split "data.jsonl, line 7" into ("data.jsonl, line", 7); a plain text has no number."""
    place, _, number = where.rpartition(" ")
    return (place, int(number)) if number.isdecimal() else (where, 0)


def places_text(count: int, places: Sequence[str]) -> str:
    """Name the first places of `count` things, a file only once: "data.jsonl, line 3, line 7 ..."."""
    parts, named = [], ""
    for place in places:
        file, mark, number = place.rpartition(", ")
        parts.append(number if mark and file == named else place)
        named = file
    return ", ".join(parts) + (" ..." if count > len(parts) else "")


def encodable(line: str) -> str:
    """Escape half a surrogate pair, which a key of JSON or a file's name may hold and print() refuses."""
    return line.encode("utf-8", "backslashreplace").decode()
