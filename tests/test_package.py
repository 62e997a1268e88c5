"""The library as others install it: every public function is typed, and the wheel is whole."""

import ast
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

from rwkv_miss import read_checkpoint

from .conftest import ROOT, close

PACKAGE = ROOT / "rwkv_miss"

# runs in the empty environment: what can be imported there, and where the package lies
IMPORTS = """
import importlib, importlib.resources, json, pkgutil
import rwkv_miss
found = [module.name for module in pkgutil.walk_packages(rwkv_miss.__path__, "rwkv_miss.")]
for name in found:
    importlib.import_module(name)
typed = importlib.resources.files("rwkv_miss").joinpath("py.typed").is_file()
print(json.dumps({"modules": found, "typed": typed, "file": rwkv_miss.__file__}))
"""


def modules():
    """Dotted name -> file, of every module of the package."""
    paths = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        paths[name.removesuffix(".__init__")] = path
    return paths


def public_functions(body, inside_class=False):
    """(function, its parameters but for self and cls) of a module and of its public classes."""
    for node in body:
        special = getattr(node, "name", "").startswith("__")
        if not special and getattr(node, "name", "_").startswith("_"):
            continue
        if isinstance(node, ast.ClassDef):
            yield from public_functions(node.body, True)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
            args = node.args
            positional = args.posonlyargs + args.args
            parameters = positional[1:] if inside_class and not static else positional
            yield node, [*parameters, *args.kwonlyargs, *filter(None, (args.vararg, args.kwarg))]


def test_every_public_function_is_typed():
    bare, seen = [], 0
    for path in modules().values():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for function, parameters in public_functions(tree.body):
            seen += 1
            missing = [parameter.arg for parameter in parameters if parameter.annotation is None]
            missing += ["return"] if function.returns is None else []
            if missing:
                place = f"{path.relative_to(ROOT)}:{function.lineno}"
                bare.append(f"{place}: {function.name} lacks {', '.join(missing)}")
    assert seen > 200
    assert not bare, "\n".join(bare)


def run(*command, cwd):
    """stdout of a program outside the checkout, which finds no module of it."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def empty_environment(folder):
    """Make an environment that has torch and the packages in its folder, but nothing of this project."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    [packages] = folder.glob("lib/python*/site-packages")
    # torch takes 800 MB and is borrowed; .pth files in its folder, as of the checkout, are not read
    folder_of_torch = pathlib.Path(torch.__file__).parent.parent
    (packages / "borrowed.pth").write_text(f"{folder_of_torch}\n")
    return folder / "bin"


@pytest.mark.slow
def test_the_wheel_merges_in_an_empty_environment_outside_the_checkout(tmp_path, merging):
    # a copy without build/, which could hold modules that are gone
    source = tmp_path / "source"
    shutil.copytree(PACKAGE, source / "rwkv_miss", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source, cwd=tmp_path)
    shutil.rmtree(source)
    [wheel] = tmp_path.glob("*.whl")
    programs = empty_environment(tmp_path / "environment")
    python = programs / "python"
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)

    there = json.loads(run(python, "-c", IMPORTS, cwd=tmp_path))
    assert pathlib.Path(there["file"]).is_relative_to(tmp_path / "environment")
    assert {"rwkv_miss", *there["modules"]} == set(modules())
    assert there["typed"]

    merging()
    merging.adapter("adapter.pth")
    files = ("--base", "base.pth", "--adapter", "adapter.pth", "--out", "merged.pth")
    run(programs / "rwkv-miss", "merge", *files, cwd=tmp_path)
    merged = read_checkpoint(tmp_path / "merged.pth")
    assert list(merged) == list(merging.tensors)
    name = "blocks.0.att.key"
    want = merging.tensors[f"{name}.weight"].double() + merging.delta("adapter.pth", name)
    close("the merged weight", merged[f"{name}.weight"], want, 1e-6)
