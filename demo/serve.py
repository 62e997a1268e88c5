"""Run an OpenAI-compatible server for a model file, or for a base and its adapters, unmerged; or the training
page.

python -m demo.serve --model merged.pth
python -m demo.serve --train FOLDER
"""

from __future__ import annotations

if not __package__:  # started by its path, from which src is not found
    raise SystemExit("error: run this from the repository's folder as python -m demo.serve")

from src.common.startup import importing, naming_missing_packages

with importing():
    from rwkv_miss.errors import one_line_errors
    from rwkv_miss.files.mapped import naming_changed_files
    from rwkv_miss.flags import parse_flags
    from src.serving.flags import Flags, check


def parse(argv: list[str] | None) -> Flags:
    return check(parse_flags(Flags, argv, prog="python -m demo.serve", description=__doc__))


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
