"""Run an OpenAI-compatible server for a model file, or for a base and its adapters, unmerged; or the training
page.

python -m demo.serve --model merged.pth
python -m demo.serve --train FOLDER
"""

from __future__ import annotations

import argparse

if not __package__:  # started as a file, so that Python does not find src
    raise SystemExit("error: run this from the repository's folder as python -m demo.serve")

from src.common.startup import importing, naming_missing_packages

with importing():
    from rwkv_miss.errors import Parser, one_line_errors
    from rwkv_miss.files.mapped import naming_changed_files
    from src.serving.flags import add_flags, check


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m demo.serve", description=__doc__)
    add_flags(parser.add_argument)
    args = parser.parse_args(argv)
    check(args)
    return args


def main(argv: list[str] | None = None) -> None:
    with one_line_errors(), naming_missing_packages(), naming_changed_files():
        args = parse(argv)
        # imported here, because check() has now found the packages that they need
        if args.train:
            from src.studio.program import run
        else:
            from src.serving.program import run
        run(args)


if __name__ == "__main__":
    main()
