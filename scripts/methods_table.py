"""Print the tables of docs/methods.md, from the methods themselves.

    python -m scripts.methods_table [--options]

Without a flag: each method's change, trained numbers and start. --options: the options of the methods.
"""

from __future__ import annotations

import dataclasses

if not __package__:  # started as a file, so that Python does not find src
    raise SystemExit("error: run this from the repository's folder as python -m scripts.methods_table")

from src.common.startup import importing

with importing():
    from rwkv_miss import METHODS
    from rwkv_miss.errors import Parser, one_line_errors
    from src.common.formatting import markdown_table


def main() -> None:
    with one_line_errors():
        parser = Parser(prog="python -m scripts.methods_table", description=__doc__.partition("\n")[0])
        parser.add_argument("--options", action="store_true", help="the options instead of the methods")
        head, *rows = option_rows() if parser.parse_args().options else method_rows()
        print(markdown_table(head, rows))


def method_rows() -> list[list[str]]:
    rows = [["`--peft`", "the change of W", "trained numbers", "start", "published rate", "paper"]]
    for name in in_order():
        about, rate = METHODS[name].about, f"{METHODS[name].default_lr:.0e}".replace("e-0", "e-")
        paper = f"[{about.paper}](https://arxiv.org/abs/{about.paper})" if about.paper else ""
        rows.append([f"`{name}`", about.change, about.numbers, about.start, rate, paper])
    return rows


def option_rows() -> list[list[str]]:
    """List every option once, with all methods that have it. Ranks are explained elsewhere on the page."""
    of: dict[tuple[str, str, str], list[str]] = {}
    for name in in_order():
        for field in dataclasses.fields(METHODS[name].Options):
            if meaning := field.metadata.get("meaning"):
                default = {} if field.default is dataclasses.MISSING else field.default
                of.setdefault((f"`{field.name}`", str(default).lower(), meaning), []).append(name)
    rows = [[option, ", ".join(names), default, meaning] for (option, default, meaning), names in of.items()]
    return [["option", "of", "default", "meaning"], *rows]


def in_order() -> list[str]:
    """List the methods' names, the default method first."""
    return sorted(METHODS, key=lambda name: (name != "miss", name))


if __name__ == "__main__":
    main()
