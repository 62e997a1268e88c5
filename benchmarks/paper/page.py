"""docs/results/README.md: the results for each of the paper's statements, read from their JSON files.

    python -m benchmarks.paper.page [FOLDER]

rewrites everything below the mark in FOLDER/README.md; people write the text above it.
"""

from __future__ import annotations

import json
import pathlib
import sys

from rwkv_miss.errors import UserError, one_line_errors
from src.common.files import write_text

from .__main__ import EXPERIMENTS
from .results import VERDICTS, Claim, Table

MARK = "<!-- below: python -m benchmarks.paper.page -->"


def sections(folder: pathlib.Path) -> str:
    """Write a section for each experiment with results: its statements, and the command that repeats it."""
    parts = []
    for name in EXPERIMENTS:
        if (file := folder / f"{name}.json").exists():
            result = json.loads(file.read_text(encoding="utf-8"))
            claims = [Claim(**claim) for claim in result["claims"]]
            rows = [(claim.paper, claim.ours, VERDICTS[claim.agrees]) for claim in claims]
            table = Table(f"## [{name}]({name}.md)", ("the paper", "here", "agrees"), rows)
            parts.append(
                f"{table.markdown()}\n\nAgain: `{result['command']}` (measured at commit {result['commit']})"
            )
    return "\n\n".join(parts) + "\n"


def renewed(folder: pathlib.Path) -> str:
    """Return the page with its new lower part. Raises UserError for a folder without a page."""
    page = folder / "README.md"
    if not page.exists() or MARK not in page.read_text(encoding="utf-8"):
        raise UserError(
            f"{page} must be there, with the line {MARK}: what is above it is kept, and what is below it"
            " written"
        )
    return f"{page.read_text(encoding='utf-8').partition(MARK)[0]}{MARK}\n\n{sections(folder)}"


if __name__ == "__main__":
    with one_line_errors():
        results = pathlib.Path(sys.argv[1] if sys.argv[1:] else "docs/results")
        write_text(str(results / "README.md"), renewed(results))
