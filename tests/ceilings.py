"""Sizes of the repository, which tests/ceilings.txt bounds: `python -m tests.ceilings` prints them.

Statements are Python's own (ast.stmt). Docstrings, comments, blank lines and long lines count nothing, so
that neither a deleted docstring nor a move between files is a saving.
"""

import ast
import functools
import pathlib
from collections.abc import Iterator

from src.config import FIELDS

from .conftest import ROOT

FOLDERS = ("src", "rwkv_miss", "scripts", "demo", "benchmarks", "tests", "gpu_emulation")
PRODUCT = FOLDERS[:4]
MOST_PARAMETERS, MOST_LINES = 7, 500
FILE = ROOT / "tests/ceilings.txt"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def files(folder: str) -> Iterator[pathlib.Path]:
    return (path for path in sorted((ROOT / folder).rglob("*.py")) if "__pycache__" not in path.parts)


def statements(tree: ast.AST) -> int:
    """Count the statements, without docstrings."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    return sum(not (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant)) for one in found)


def parameters(function: ast.FunctionDef) -> int:
    """Count the parameters, without self and cls."""
    arguments = function.args
    names = [one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


@functools.cache
def sizes() -> dict[str, int]:
    """Measure everything that has a ceiling but the walks, which a benchmark counts."""
    trees = {
        folder: {path: ast.parse(path.read_text("utf-8")) for path in files(folder)} for folder in FOLDERS
    }
    product = [tree for folder in PRODUCT for tree in trees[folder].values()]
    functions = [node for tree in product for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]
    paths = [path for folder in PRODUCT for path in trees[folder]]
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    return {
        **{f"statements in {name}": sum(map(statements, trees[name].values())) for name in FOLDERS},
        "words in *.md and docs/*.md": sum(
            len(page.read_text("utf-8").split()) for page in pages if "worklog" not in page.name
        ),
        "flags of train.py": len(FIELDS),
        "lines of the longest function": max(node.end_lineno - node.lineno + 1 for node in functions),
        f"functions of more than {MOST_PARAMETERS} parameters": sum(
            parameters(node) > MOST_PARAMETERS for node in functions
        ),
        f"files of more than {MOST_LINES} lines": sum(
            path.read_text("utf-8").count("\n") > MOST_LINES for path in paths
        ),
    }


def ceilings() -> dict[str, int]:
    """Read tests/ceilings.txt: a number and what it bounds on each line."""
    lines = [line for line in FILE.read_text("utf-8").splitlines() if line and not line.startswith("#")]
    return {what: int(number) for number, what in (line.split(maxsplit=1) for line in lines)}


if __name__ == "__main__":
    for what, size in sizes().items():
        print(f"{size:>7} {what}")
