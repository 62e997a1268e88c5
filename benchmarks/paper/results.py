"""Files with an experiment's results.

NAME.md compares the paper's statements with ours, and has tables; NAME.png a plot; NAME.json the same with
the settings; NAME-figures.json curves and single runs, which git ignores.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from rwkv_miss import UserError
from src.common.files import write_bytes, write_text

from ..common import environment

VERDICTS = {True: "yes", False: "**no**", None: "-"}


@dataclasses.dataclass(frozen=True)
class Claim:
    """A statement of the paper, the result here, and whether they agree (None: they can't be compared)."""

    paper: str
    ours: str
    agrees: bool | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text and numbers under a caption; None is an empty cell."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def records(self) -> list[dict[str, Any]]:
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]

    def markdown(self) -> str:
        lines = [
            self.columns,
            ["---"] * len(self.columns),
            *([_cell(value) for value in row] for row in self.rows),
        ]
        return f"{self.caption}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


@dataclasses.dataclass(frozen=True)
class PaperResult:
    """Result of an experiment. notes: how it was measured. draw: fills an empty matplotlib figure. figures:
    all that is in neither text nor tables.
    """

    title: str
    notes: str
    claims: Sequence[Claim]
    tables: Sequence[Table]
    draw: Callable[[Any], None]
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)


def require_package(name: str, use: str) -> None:
    """Raise UserError, before anything is measured, if a package is absent."""
    if importlib.util.find_spec(name) is None:
        raise UserError(f"{use} needs {name}: pip install {name}")


def check_folder(folder: str) -> pathlib.Path:
    """Make the folder if it is missing. Raises UserError, before anything is measured, if the results could
    not be written or drawn.
    """
    require_package("matplotlib", "the plot")
    path = pathlib.Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder} can't be a folder: {error.strerror}") from None
    return path


def write(
    result: PaperResult, name: str, folder: pathlib.Path, command: str, settings: dict[str, Any], commit: str
) -> dict[str, Any]:
    """Write the files; return the content of NAME.json without the tables."""
    short = {
        "experiment": name,
        "command": command,
        "settings": settings,
        "claims": [dataclasses.asdict(claim) for claim in result.claims],
        **environment(),
        "commit": commit,
    }
    tables = {table.caption: table.records() for table in result.tables}
    write_bytes(str(folder / f"{name}.png"), plot(result.draw))
    write_text(str(folder / f"{name}.md"), markdown(result, name, command, short))
    write_text(str(folder / f"{name}.json"), _json(_finite({**short, "tables": tables})) + "\n")
    if result.figures:
        figures = _finite({"commit": commit, **result.figures})
        write_text(str(folder / f"{name}-figures.json"), _json(figures) + "\n")
    return _finite(short)


def _json(value: Any, indent: str = "") -> str:
    """Write JSON with one line for each list or object that contains no others."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if not any(isinstance(one, (dict, list)) for one in inside):
        return json.dumps(value, allow_nan=False)
    names = [f"{json.dumps(name)}: " for name in value] if isinstance(value, dict) else [""] * len(value)
    lines = [f"{indent} {name}{_json(one, f'{indent} ')}" for name, one in zip(names, inside)]
    first, last = "{}" if isinstance(value, dict) else "[]"
    return "\n".join([first, ",\n".join(lines), f"{indent}{last}"])


def markdown(result: PaperResult, name: str, command: str, machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    claims = Table(
        "Published statements, and what was measured:",
        ("paper", "here", "agrees"),
        [(claim.paper, claim.ours, VERDICTS[claim.agrees]) for claim in result.claims],
    )
    return (
        "\n\n".join(
            [
                f"# {result.title}",
                result.notes,
                claims.markdown(),
                f"![{result.title}]({name}.png)",
                *(table.markdown() for table in result.tables),
                (
                    f"Again: `{command}`\n\n{machine['machine']}, {machine['threads']} thread(s), {versions},"
                    f" commit {machine['commit']}."
                ),
            ]
        )
        + "\n"
    )


def plot(draw: Callable[[Any], None]) -> bytes:
    """Return the PNG of a figure, without a display and without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    image = io.BytesIO()
    figure.savefig(image, dpi=110, metadata={"Software": None})
    return image.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON lacks, by null."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
