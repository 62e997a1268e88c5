"""Modes that a released G1 model was trained with, by its name."""

import pytest

from src.data.released import modes_note, released
from src.data.templates import load_template
from src.reporting.plan_text import released_modes

LENGTHS = {"think-normal", "think-short", "think-long"}


@pytest.mark.parametrize(
    "file, name, lengths, flower",
    [
        ("rwkv7-g1-0.1b-20250307-ctx4096.pth", "G1", "", False),
        ("rwkv7-g1a-0.4b-20250905-ctx4096.pth", "G1a", "", False),
        ("rwkv7-g1a-0.1b-20250922-ctx4096.pth", "G1a", "-2025", False),
        ("rwkv7-g1a4-2.9b-20251118-ctx8192.pth", "G1a", "-2025", False),
        ("rwkv7-g1b-1.5b-20251202-ctx8192.pth", "G1b", "-2025", False),
        ("rwkv7-g1c-7.2b-20251231-ctx8192.pth", "G1c", "parentheses", False),
        ("rwkv7-g1g-13.3b-20260601-ctx8192.pth", "G1g", "parentheses", False),
        ("rwkv7-g1h-2.9b-20260710-ctx10240.pth", "G1h", "parentheses", True),
        ("rwkv7-g1k-0.1b-20260930-ctx25600.pth", "G1k", "parentheses", True),
    ],
)
def test_names_of_released_models(file, name, lengths, flower):
    found = released(f"/models/{file}")
    assert (found.file, found.name) == (file, name)
    modes = set(found.modes)
    assert {"rwkv", "think", "fake-think", "fake-think-compact"} <= modes
    assert (LENGTHS <= modes) == (lengths == "parentheses")
    assert ({f"{length}-2025" for length in LENGTHS} <= modes) == (lengths == "-2025")
    assert ({"flower", "flower-fake-think"} <= modes) == flower
    for mode in modes:
        assert modes_note(file, load_template(mode)).endswith(f"; chosen is {mode}")


@pytest.mark.parametrize(
    "file",
    [
        "rwkv7-g1d-0.1b-20260129-ctx8192-merged.pth",
        "RWKV-x070-World-0.1B-v2.8-20241210-ctx4096.pth",
        "rwkv7a-g1b-0.1b-20250819-ctx4096.pth",
        "rwkv7-g1d-0.1b-20260129-ctx8192.pth/adapter.pth",
        "",
    ],
)
def test_nothing_is_guessed_of_other_names(file):
    assert released(file) is None and modes_note(file, load_template("think")) == ""


def test_a_mode_that_the_model_does_not_know_is_named_with_its_own():
    new, old = "rwkv7-g1d-0.1b-20260129-ctx8192.pth", "rwkv7-g1b-1.5b-20251202-ctx8192.pth"
    for file, mode, other in (
        (new, "think-short-2025", "think-short"),
        (old, "think-short", "think-short-2025"),
        (new, "flower", ""),
        (old, "think-chinese", ""),
    ):
        note = modes_note(file, load_template(mode))
        assert f", not with {mode}, which is chosen" in note
        assert note.endswith(f"--template {other} is its form" if other else "which is chosen")
    assert "chosen is Jinja" in modes_note(
        new, load_template("{% for m in messages %}{{ m.role }}{{ m.content }};{% endfor %}")
    )
    assert released_modes(f"x/{new}", load_template("rwkv")) == [
        f"template   {new} is a released G1d, trained with --template rwkv, think, fake-think,"
        " fake-think-compact, think-normal, think-short, think-long; chosen is rwkv"
    ]
    assert released_modes("base.pth", load_template("rwkv")) == []
