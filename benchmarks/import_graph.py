"""The test files that reach a file: by imports, by programs that they start, by kernels that they build.

Imports are read from the syntax trees, those within functions included. In a test or a benchmark a text that
names a module or a file of the repository counts, too; elsewhere one that names a file in its folder, a
worker. A file of fixtures counts by definition: a test reaches what the fixtures that it asks for reach.
Tests of the pages reach the programs that README.md names.
"""

from __future__ import annotations

import ast
import functools
import heapq
import pathlib
import re
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[1]
ROOMS = ("src", "rwkv_miss", "demo", "scripts", "benchmarks", "tests", "gpu_emulation")
# folder of tests -> the file with its fixtures
TESTS = {"tests": "tests/conftest.py", "gpu_emulation": "gpu_emulation/drawn_cases.py"}
# tests that fail after any change of a text: of the record of sources, and of the places of planted faults
SEE_ALL = {"tests/test_ptxas.py", "tests/test_planted_faults.py"}
STARTING = ("tests/", "gpu_emulation/", "benchmarks/")  # where a text may name any file or program
# hops counted for a package that runs only because a module in it is imported
PASSING = 10
COMMAND = re.compile(r"-m ([\w.]+)|([\w./-]+\.(?:py|sh))")


def is_file(name: str) -> bool:
    return (ROOT / name).is_file()


def module_files(name: str, program: bool = False) -> list[str]:
    """List the files that an import of a module runs, packages first. `program`: its __main__.py, too."""
    parts = name.split(".")
    if parts[0] not in (*ROOMS, "train"):
        return []
    places = ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]
    files = [file for place in places for file in (f"{place}/__init__.py", f"{place}.py")]
    return list(filter(is_file, [*files, *([f"{places[-1]}/__main__.py"] if program else [])]))


def named_files(text: str, file: str) -> list[str]:
    """List the files that a text in a Python file names: sources of kernels, pages, a file, or a module."""
    folder, starts_others = str(pathlib.PurePosixPath(file).parent), file.startswith(STARTING)
    if re.fullmatch(r"\*\w*\.(cu|cpp)", text):
        # src/ops/build.py compiles *.cu for a GPU alone
        return [f"cuda/{p.name}" for p in (ROOT / "cuda").glob(text) if starts_others or p.suffix == ".cpp"]
    if text == "*.md" and starts_others:
        return ["README.md"]
    if re.fullmatch(r"[\w./-]+\.(py|sh|cpp|cu)", text):
        return [
            name for name in (f"{folder}/{text}", text) if is_file(name) and (starts_others or name != text)
        ]
    if text == "page":  # the folder of scripts that a browser runs
        return [path.relative_to(ROOT).as_posix() for path in (ROOT / folder / text).glob("*.js")]
    is_module = starts_others and re.fullmatch(r"\w+(\.\w+)+", text)
    return module_files(text)[-1:] if is_module and is_file(f"{text.replace('.', '/')}.py") else []


def imported(tree: ast.AST, file: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (name in the code, files) for every import, and ("", files) for every "-m", "NAME"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.asname or alias.name.partition(".")[0], module_files(alias.name)
        elif isinstance(node, ast.ImportFrom):
            above = pathlib.PurePosixPath(file).parts[: -node.level] if node.level else ()
            for alias in node.names:
                name = ".".join(filter(None, [*above, node.module, alias.name]))
                yield alias.asname or alias.name, module_files(name)
        elif (
            file.endswith("__init__.py")
            and isinstance(node, ast.Attribute)
            and node.attr in ("iter_modules", "import_module")
        ):  # imports modules of its own package by their names
            modules = (ROOT / file).parent.rglob("*.py")
            yield from (("", [module.relative_to(ROOT).as_posix()]) for module in modules)
        elif isinstance(node, ast.List | ast.Tuple | ast.Call):
            of_node = node.args if isinstance(node, ast.Call) else node.elts
            texts = [one.value if isinstance(one, ast.Constant) else "" for one in of_node]
            programs = [name for flag, name in zip(texts, texts[1:]) if flag == "-m"]
            yield from (("", module_files(str(name), program=True)) for name in programs)


def words(tree: ast.AST) -> set[str]:
    """Collect names, arguments and texts of a tree."""
    kinds = {ast.Name: "id", ast.arg: "arg", ast.alias: "name", ast.Constant: "value"}
    found = {getattr(node, kinds[type(node)]) for node in ast.walk(tree) if type(node) in kinds}
    return {word for word in found if isinstance(word, str)}


@functools.cache
def fixtures(conftest: str) -> dict[str, list[list[str]]]:
    """Map each definition in a conftest.py to the groups of files that it reaches."""
    if not conftest:
        return {}
    tree = ast.parse((ROOT / conftest).read_text("utf-8"))
    names, found = dict(imported(tree, conftest)), {}
    parts = {one.name: one for one in tree.body if isinstance(one, ast.FunctionDef | ast.ClassDef)}
    for name, part in parts.items():
        used = words(part)
        found[name] = [[f"{conftest}::{other}"] for other in used & (parts.keys() - {name})]
        found[name] += [names[other] for other in used & names.keys()]
        found[name] += [[one] for text in used for one in named_files(text, conftest)]
    return found


def groups(file: str) -> list[list[str]]:
    """List the files that a file reaches, in groups: the last of a group is meant, the others run on the
    way."""
    file, _, fixture = file.partition("::")
    if fixture:
        return fixtures(file)[fixture]
    text = (ROOT / file).read_text("utf-8")
    if file.startswith("cuda/"):
        return [[f"cuda/{name}"] for name in re.findall(r'#include "([\w.]+)"', text)]
    if not file.endswith(".py"):
        return [module_files(name, program=True) or [path] for name, path in COMMAND.findall(text)]
    tree = ast.parse(text)
    used = words(tree)
    found = [files for _, files in imported(tree, file)]
    found += [[one] for text in used for one in named_files(text, file)]
    conftest = TESTS.get(file.partition("/")[0], "")
    return found + [[f"{conftest}::{name}"] for name in used & fixtures(conftest).keys()]


@functools.cache
def neighbours(file: str) -> dict[str, int]:
    """Map each file that a file reaches directly -> its distance in hops."""
    reached = groups(file)
    found = {one: PASSING for files in reached for one in files[:-1]}
    found |= {files[-1]: 1 for files in reached if files}
    files = {one: one.partition("::")[0] for one in found.keys() - set(TESTS.values())}
    return {one: found[one] for one, path in files.items() if is_file(path)}


@functools.cache
def all_hops() -> dict[str, dict[str, int]]:
    """Map each test file to the files that it reaches, with their distances in hops."""
    result = {}
    of_folders = [(ROOT / folder).glob("test_*.py") for folder in TESTS]
    tests = {path.relative_to(ROOT).as_posix() for paths in of_folders for path in paths}
    for test in tests - SEE_ALL:
        found, waiting = {}, [(0, test)]
        while waiting:
            far, file = heapq.heappop(waiting)
            if file not in found:
                found[file] = far
                for other, more in neighbours(file).items():
                    heapq.heappush(waiting, (far + more, other))
        result[test] = found
    return result


def reaching_tests(file: str) -> list[str]:
    """List the test files that reach a file: nearest first, then those that name it, then the smallest."""
    name = pathlib.Path(file).stem
    near = [
        (found[file], name not in (ROOT / test).read_text("utf-8"), (ROOT / test).stat().st_size, test)
        for test, found in all_hops().items()
        if file in found
    ]
    return [test for *_, test in sorted(near)]
