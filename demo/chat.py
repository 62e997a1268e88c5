"""Chat with a model file, or with a base and its adapters, unmerged.

python -m demo.chat --model merged.pth
"""

from __future__ import annotations

if not __package__:  # started by its path, from which src is not found
    raise SystemExit("error: run this from the repository's folder as python -m demo.chat")

from src.common.startup import importing, naming_missing_packages

with importing():
    from rwkv_miss.errors import one_line_errors
    from rwkv_miss.files.mapped import naming_changed_files
    from rwkv_miss.flags import parse_flags
    from src.chat.flags import Flags, check
    from src.chat.program import run


def parse(argv: list[str] | None) -> Flags:
    return check(parse_flags(Flags, argv, prog="python -m demo.chat", description=__doc__))


def main(argv: list[str] | None = None) -> None:
    with one_line_errors(), naming_missing_packages(), naming_changed_files():
        run(parse(argv))


if __name__ == "__main__":
    main()
