"""Write the tables that commands print into their pages: python -m scripts.tables

Such a table stands between <!-- begin: python -m NAME FLAGS --> and <!-- end: python -m NAME FLAGS -->.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import pathlib
import re
import sys
from unittest import mock

if not __package__:  # started as a file, so that Python does not find src
    raise SystemExit("error: run this from the repository's folder as python -m scripts.tables")

from src.common.startup import importing

with importing():
    from rwkv_miss.errors import Parser, one_line_errors
    from rwkv_miss.files.output import write_text

ROOT = pathlib.Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- begin: python -m (.+) -->\n)(.*?)(<!-- end: python -m \2 -->\n)", re.S)


def main() -> None:
    with one_line_errors():
        parser = Parser(prog="python -m scripts.tables", description=__doc__.partition("\n\n")[0])
        parser.parse_args(sys.argv[1:])
        for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
            text = page.read_text(encoding="utf-8")
            new = BLOCK.sub(lambda found: found[1] + printed(found[2]) + found[4], text)
            if new != text:
                write_text(page, new)
                print(page.relative_to(ROOT))


def printed(command: str) -> str:
    """Return the output of `python -m COMMAND`."""
    name, *flags = command.split()
    module = importlib.import_module(name)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{name}.__main__")
    output = io.StringIO()
    with contextlib.redirect_stdout(output), mock.patch.object(sys, "argv", [name, *flags]):
        module.main()
    return output.getvalue()


if __name__ == "__main__":
    main()
