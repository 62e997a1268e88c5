"""Rooms of src/ and their imports from each other: python -m scripts.rooms

Imports are read from the syntax trees, also those within functions. tests/test_rooms.py checks them against
the order in docs/architecture.md.
"""

from __future__ import annotations

import argparse
import ast
import functools
import pathlib

ROOT = pathlib.Path(__file__).parents[1]


def modules() -> dict[str, pathlib.Path]:
    """Map dotted name -> file, for every module of src."""
    files = sorted((ROOT / "src").rglob("*.py"))
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
        for file in files
    }


def room(module: str) -> str:
    """Return the room of a module: src.data.formats.text -> data; src.run is a room by itself."""
    return module.split(".")[1] if "." in module else module


@functools.cache
def imports() -> dict[str, set[str]]:
    """Map module -> the modules of src that it imports."""
    names = modules()
    return {name: set(_imported(name, file, names)) - {name} for name, file in names.items()}


def _imported(name: str, file: pathlib.Path, known: dict[str, pathlib.Path]):
    package = name if file.stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        if not isinstance(node, ast.ImportFrom):
            continue
        source = node.module
        if node.level:
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            source = ".".join([*above, node.module] if node.module else above)
        for alias in node.names:
            if (inner := f"{source}.{alias.name}") in known:
                yield inner
            elif source in known:
                yield source


def between_rooms() -> dict[str, set[str]]:
    """Map room -> the rooms that it imports."""
    found: dict[str, set[str]] = {}
    for name, imported in imports().items():
        found.setdefault(room(name), set()).update(room(other) for other in imported)
    return {name: others - {name} for name, others in found.items() if name != "src"}


def main() -> None:
    about = __doc__.partition("\n\n")[0]
    argparse.ArgumentParser(
        prog="python -m scripts.rooms", description=about, allow_abbrev=False
    ).parse_args()
    found = between_rooms()
    for name in sorted(found, key=lambda name: (len(found[name]), name)):
        print(f"{name:12} imports {', '.join(sorted(found[name])) or 'nothing of src'}")


if __name__ == "__main__":
    main()
