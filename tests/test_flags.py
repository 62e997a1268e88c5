"""Flags that are declared as fields of a dataclass."""

from __future__ import annotations

import pytest

from rwkv_miss.errors import UserError
from rwkv_miss.flags import flag, flags_of, options, parse_flags


@options
class Drawing:
    seed: int | None = flag(None, low=0, high=10**6)
    note: str = "not a flag"


@options
class Model:
    model: str = flag(help="a file")
    scale: float = flag(1.0, alias=("factor",), above=-2)
    drawing: Drawing = flags_of(Drawing)


@options
class Flags(Model):
    data: list[str] = flag(positional=True, nargs="+")
    adapter: list[str] = flag([])
    scale: float = flag(2.0, alias=("factor",), above=-2)
    raw: bool = flag(False)
    rows: int = flag(4, choices=(4, 8), name="limit_rows")


def parsed(*words, **defaults):
    return parse_flags(Flags, words, defaults, prog="x")


def test_a_dataclass_is_the_command_line():
    few = Flags(model="m", data=["a"])
    assert parsed("a", "--model", "m") == few and few.drawing == Drawing() and few.rows == 4
    words = "a b --model m --adapter c --adapter d --factor -1e-1 --seed 3 --raw --limit_rows 8"
    many = Flags(
        model="m",
        data=["a", "b"],
        adapter=["c", "d"],
        scale=-0.1,
        drawing=Drawing(seed=3),
        raw=True,
        rows=8,
    )
    assert parsed(*words.split()) == many
    assert parsed("a", "--model", "m", scale=3.0).scale == 3, "defaults of a preset"


@pytest.mark.parametrize(
    "words, message",
    [
        ("", "required: --model, data; x --help lists the flags"),
        ("--seed -1", "^--seed -1: must not be negative$"),
        ("--seed 1000001", "^--seed 1000001: must not be above 1e6$"),
        ("--scale -2", "^--scale -2.0: must be above -2$"),
        ("--scale nan", "^--scale nan: must be a finite number$"),
        ("--scale x", "'x': expected a number;"),
        ("--seed 1.5", "expected a whole number"),
        ("--limit_rows 5", "invalid choice: '?5"),
    ],
)
def test_errors_name_the_flag(words, message):
    with pytest.raises(UserError, match=message):
        parsed(*(["a", "--model", "m", *words.split()] if words else []))


def test_help_keeps_the_order_of_the_declaration(capsys):
    with pytest.raises(SystemExit):
        parsed("--help")
    said = capsys.readouterr().out
    places = [said.index(f"\n  {name}") for name in ("data", "--model", "--scale", "--seed", "--adapter")]
    assert places == sorted(places)
