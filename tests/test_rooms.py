"""Imports between the rooms of src go one way, and no module is in a circle."""

import ast
import graphlib

import pytest

from scripts import rooms

# a room imports those before it; docs/architecture.md has the same as a picture
ORDER = {
    "common": set(),
    "config": {"common", "losses"},
    "ops": {"common"},
    "model": {"common", "ops"},
    "losses": {"common", "ops", "model"},
    "data": {"common", "config", "ops", "losses"},
    "distributed": {"common", "config"},
    "inference": {"common", "config", "ops", "model", "data"},
    "serving": {"common", "model", "data", "inference"},
    "evaluation": {"common", "config", "ops", "model", "losses", "data", "inference"},
    "chat": {"common", "data", "model", "inference", "evaluation"},
    "export": {"common", "config", "ops", "model", "data"},
    "sources": {
        "common",
        "config",
        "ops",
        "model",
        "losses",
        "data",
        "distributed",
        "inference",
        "evaluation",
    },
    "planning": {"common", "config", "ops", "model", "losses", "data", "sources"},
    "training": {
        "common",
        "config",
        "ops",
        "model",
        "losses",
        "data",
        "distributed",
        "planning",
        "inference",
        "evaluation",
        "sources",
    },
    "reporting": {
        "common",
        "config",
        "model",
        "losses",
        "data",
        "planning",
        "evaluation",
        "sources",
        "training",
    },
    "studio": {"common", "config", "model", "data", "export", "serving", "training"},
}
ALL = {"run": set(ORDER), **ORDER}


def test_every_room_has_its_place_in_the_order():
    assert rooms.between_rooms().keys() == ALL.keys()


@pytest.mark.parametrize("room", ALL)
def test_a_room_imports_only_what_is_below_it(room):
    assert rooms.between_rooms()[room] <= ALL[room]


def test_no_module_is_in_a_circle():
    assert len(list(graphlib.TopologicalSorter(rooms.imports()).static_order())) == len(rooms.modules())


def test_a_circle_is_found():
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()


@pytest.mark.parametrize("room", ORDER)
def test_a_room_says_what_lives_there_and_what_it_may_import(room):
    said = ast.get_docstring(ast.parse((rooms.ROOT / "src" / room / "__init__.py").read_text()))
    assert said and "Imports" in said


# programs that a folder may import; benchmarks take the sizes of released models from scripts
PROGRAMS = {
    "demo": {"demo"},
    "scripts": {"scripts"},
    "benchmarks": {"benchmarks", "demo", "scripts", "train"},
}


@pytest.mark.parametrize("folder", ["src", "rwkv_miss", *PROGRAMS])
def test_programs_keep_apart(folder):
    programs = {"train", *PROGRAMS}
    found = set()
    for file in (rooms.ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.partition(".")[0])
    assert found & programs <= PROGRAMS.get(folder, set())


def test_imports_are_read_from_the_trees():
    """From a room's own package, from a file of another room, of a module, and within a function."""
    found = rooms.imports()
    assert "src.model.rwkv" in found["src.model"]
    assert "src.ops" in found["src.planning.plan"]
    assert "src.config.launcher" in found["src.distributed.processes"]
    assert "src.data.jinja_template" in found["src.data.templates"]
