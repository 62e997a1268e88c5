"""Sizes stay below tests/ceilings.txt, and the file follows them down."""

import ast

import pytest

from . import ceilings
from .ceilings import parameters, statements

SIZES, CEILINGS = ceilings.sizes(), ceilings.ceilings()


def test_every_size_has_a_ceiling():
    walks = {name for name in CEILINGS if name.startswith("files that ")}
    assert CEILINGS.keys() - walks == SIZES.keys() and len(walks) == 5, "test_benchmarks counts the walks"


@pytest.mark.parametrize("what", SIZES)
def test_nothing_grows_beyond_its_ceiling(what):
    size, most = SIZES[what], CEILINGS[what]
    assert size <= most, (
        f"{size} {what}, and tests/ceilings.txt allows {most}: what can go in its place? The ceiling rises in"
        " a commit of its own, which says what fell elsewhere"
    )
    assert most <= size * 1.01 + 1, f"{size} {what}: lower the ceiling of {most}, so that it stays so"


def test_what_is_counted():
    tree = ast.parse('''
"""A page."""
class A:
    """A class."""
    x: int = 1  # one line, two statements: that of the class and this

    def f(self, a, b, /, c, *, d): return (a, b,
                                           c, d)
''')
    assert statements(tree) == 4 and parameters(tree.body[1].body[2]) == 4
