"""Chat with a model file, or with a base and its adapters, unmerged.

python -m demo.chat --model merged.pth
"""

from __future__ import annotations

import argparse

if not __package__:  # started as a file, so that Python does not find src
    raise SystemExit("error: run this from the repository's folder as python -m demo.chat")

from src.common.startup import importing, naming_missing_packages

with importing():
    from rwkv_miss.errors import Parser, one_line_errors
    from rwkv_miss.files.mapped import naming_changed_files
    from src.chat.flags import add_flags, check
    from src.chat.program import run


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m demo.chat", description=__doc__)
    add_flags(parser.add_argument)
    args = parser.parse_args(argv)
    check(args)
    return args


def main(argv: list[str] | None = None) -> None:
    with one_line_errors(), naming_missing_packages(), naming_changed_files():
        run(parse(argv))


if __name__ == "__main__":
    main()
