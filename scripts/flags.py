"""Print the tables of docs/flags.md from the settings: python -m scripts.flags

`python -m scripts.tables` writes them into the page.
"""

from __future__ import annotations

import dataclasses
import re
import sys

if not __package__:  # started as a file, so that Python does not find src
    raise SystemExit("error: run this from the repository's folder as python -m scripts.flags")

from src.common.startup import importing

with importing():
    from rwkv_miss.errors import Parser, one_line_errors
    from src.common.formatting import markdown_table
    from src.config import FIELDS
    from src.config.schema import GROUPS, PRESETS, type_of, uncommon_bounds


def flag_names(field: dataclasses.Field) -> str:
    first, *others = (f"`--{name}`" for name in (field.name, *field.metadata["alias"]))
    return " or ".join([first, *others])


def value_kind(field: dataclasses.Field) -> str:
    """Name the values that the flag takes."""
    choices = [f"`{choice}`" for choice in field.metadata["choices"] if choice]
    if choices:
        return ", ".join(choices)
    if type_of(field.name) is dict:
        return "JSON, or key=value pairs"
    kind = {bool: "0 or 1", int: "whole number", float: "number", str: "text"}[type_of(field.name)]
    bounds = uncommon_bounds(field.name)
    return f"{kind}, {bounds}" if bounds else kind


def default_text(field: dataclasses.Field) -> str:
    if field.metadata["automatic"]:
        return "chosen"
    if field.default in ("", dataclasses.MISSING):
        return "none"
    if isinstance(field.default, bool):
        return f"`{int(field.default)}`"
    return f"`{field.default:g}`" if isinstance(field.default, float) else f"`{field.default}`"


def help_text(field: dataclasses.Field) -> str:
    """Write the help line as Markdown: flags as code, and no bar that would end the cell."""
    text = re.sub(r"(?<![\w-])--[a-z]\w*", r"`\g<0>`", field.metadata["help"])
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def table(fields: list[dataclasses.Field]) -> str:
    rows = [[flag_names(one), value_kind(one), default_text(one), help_text(one)] for one in fields]
    return markdown_table(["flag", "value", "default", "meaning"], rows, "|---")


def preset_table() -> str:
    """Write the table of presets by adapter method."""
    rows = []
    for preset, (common, by_method) in PRESETS.items():
        for method, options in by_method.items():
            adapter = ",".join(f"{name}={value}" for name, value in options.items())
            values = {**common, "peft_config": adapter}
            flags = " ".join(f"--{name} {value}" for name, value in values.items())
            rows.append([f"`{word}`" for word in (preset, method, flags)])
    return markdown_table(["preset", "with `--peft`", "settings"], rows, "|---")


def page() -> str:
    """Return the tables of docs/flags.md, with their headings."""
    names = list(FIELDS)
    begins = [names.index(first) for _, _, first in GROUPS]
    lines = []
    for (heading, about, _), begin, end in zip(GROUPS, begins, [*begins[1:], len(names)], strict=True):
        fields = [FIELDS[name] for name in names[begin:end]]
        lines += ["", f"## {heading}", "", about, "", table(fields)]
    lines += ["", "## Presets", "", "The settings of the MiSS paper's Tables 7 and 8.", "", preset_table()]
    return "\n".join(lines[1:])


def main() -> None:
    with one_line_errors():
        parser = Parser(prog="python -m scripts.flags", description=__doc__.partition("\n\n")[0])
        parser.parse_args(sys.argv[1:])
        print(page())


if __name__ == "__main__":
    main()
