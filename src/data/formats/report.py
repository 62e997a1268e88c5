"""What reading found: formats, columns, and the rows that were left out."""

from __future__ import annotations

import collections
import dataclasses
from typing import TYPE_CHECKING, Any

from rwkv_miss.errors import UserError

from ...common.formatting import counted

if TYPE_CHECKING:
    from .sources import Source

Kind = tuple[str, tuple[str, ...], tuple[str, ...]]  # name of the layout, columns used, all columns
SHOWN = 3  # reasons in the plan, and files with a line of their own


class WrongSetting(UserError):
    """A row is right by itself, and a setting does not suit the data: leaving the row out would mend
    nothing.
    """


@dataclasses.dataclass
class Found:
    """What reading one source found. `kinds` counts the rows of each kind; `reasons` are the first ones."""

    format: str
    kinds: collections.Counter[Kind] = dataclasses.field(default_factory=collections.Counter)
    bad: int = 0
    reasons: list[str] = dataclasses.field(default_factory=list)

    def refuse(self, reason: str) -> None:
        self.bad += 1
        self.reasons = [*self.reasons, reason][:SHOWN]

    def describe(self) -> str:
        layouts: collections.Counter[str] = collections.Counter()
        for (name, _, _), count in self.kinds.items():
            layouts[name] += count
        named = ", ".join(
            f"{name} ({count})" if len(layouts) > 1 else name
            for name, count in layouts.most_common(SHOWN)
            if name
        )
        used = {name for _, columns, _ in self.kinds for name in columns}
        unused = list(
            dict.fromkeys(name for _, _, columns in self.kinds for name in columns if name not in used)
        )
        return (
            f"{self.format}, {counted(self.kinds.total(), 'row')}"
            + (f", {named}" if named else "")
            + (f"; not used: {', '.join(unused[:12])}{' ...' if len(unused) > 12 else ''}" if unused else "")
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "kinds": [[*kind, count] for kind, count in self.kinds.items()],
            "bad": self.bad,
            "reasons": self.reasons,
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Found:
        kinds = collections.Counter(
            {(name, tuple(used), tuple(columns)): count for name, used, columns, count in record["kinds"]}
        )
        return cls(record["format"], kinds, record["bad"], record["reasons"])


@dataclasses.dataclass
class Report:
    """Collects what reading finds, source by source. `on_bad_row`: stop, a bad row is an error, or skip, it
    is counted.
    """

    on_bad_row: str = "stop"
    hint: str = ""  # ends an error that leaving out the row would avoid
    files: dict[str, Found] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    def begin(self, source: Source) -> Found:
        """What a new reading of the source finds, also of a file that is named twice."""
        self.files[source.path] = Found(source.format)
        return self.files[source.path]

    def require_rows(self, source: Source) -> None:
        """A UserError where reading the source has found no row."""
        found = self.files[source.path]
        if not found.kinds:
            what = (
                f" that can be used: all {found.bad} are bad, such as {found.reasons[0]}" if found.bad else ""
            )
            raise UserError(f"{source.path} ({source.format}) holds no rows{what}")

    def refuse(self, path: str, where: str, reason: object) -> None:
        """A row of the source `path` that cannot be used, at reading or later: a UserError, or one more
        skipped.
        """
        if self.on_bad_row == "stop":
            raise UserError(f"{where}: {reason}{'' if isinstance(reason, WrongSetting) else self.hint}")
        self.files[path].refuse(f"{where}: {reason}")

    @property
    def bad(self) -> int:
        return sum(found.bad for found in self.files.values())

    def lines(self) -> list[str]:
        """Lines of the plan."""
        lines = [f"format     {path}: {found.describe()}" for path, found in list(self.files.items())[:SHOWN]]
        if len(self.files) > SHOWN:
            formats = collections.Counter(found.format for found in self.files.values())
            lines.append(
                f"format     {len(self.files)} files in all:"
                f" {', '.join(f'{count} {name}' for name, count in formats.items())}"
            )
        lines += self.notes
        if self.bad:
            be = "is" if self.bad == 1 else "are"
            lines.append(
                f"warning    {counted(self.bad, 'row')} cannot be used and {be} left out (--on_bad_row skip),"
                " such as:"
            )
            lines += [f"    {reason}" for found in self.files.values() for reason in found.reasons][:SHOWN]
        # a key of JSON and a file's name may hold halves of surrogate pairs, which print() refuses
        return [line.encode("utf-8", "backslashreplace").decode() for line in lines]
