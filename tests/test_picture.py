"""The README's picture of the demo."""

import io
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from demo import picture
from rwkv_miss import write_checkpoint

from .conftest import ROOT, write_rows


@pytest.fixture
def run(tmp_path):
    """A run's folder in which the merged file is the base, of four questions."""
    shutil.copy(ROOT / picture.BASE, tmp_path / "merged.pth")
    write_checkpoint(tmp_path / "adapter.pth", [])
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f'{{"step": {i}, "loss": {4 / i}}}\n' for i in range(1, 9))
    )
    pairs = [("sort abc", "cba"), ("sort bca", "abc"), ("sort fed", "def"), ("sort cab", "abc")]
    rows = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in pairs]
    write_rows(tmp_path / "sort-heldout.jsonl", ({"messages": row} for row in rows))
    return tmp_path


def draw(monkeypatch, run):
    out = run / "picture.png"
    arguments = ["picture", "--run", str(run), "--base", str(ROOT / picture.BASE), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    picture.main()
    return out.read_bytes()


def test_the_same_run_gives_the_same_opaque_picture(run, monkeypatch, capsys):
    first = draw(monkeypatch, run)
    assert "loss 4.00 to 0.50 in 8 steps" in capsys.readouterr().out
    assert first == draw(monkeypatch, run)
    image = Image.open(io.BytesIO(first))
    assert image.size == (1600, 800)
    assert "transparency" not in image.info
    pixels = np.asarray(image.convert("RGB"))
    assert (pixels[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all(), "no white background"


def test_examples_are_the_first_questions_that_the_base_gets_wrong(run):
    questions, share, answers = picture.answers_of(str(ROOT / picture.BASE), str(run / "sort-heldout.jsonl"))
    right = [answer == question.answer for question, answer in zip(questions, answers, strict=True)]
    assert share == sum(right) / 4
    shown = picture.examples(questions, answers, answers)
    assert [row[0] for row in shown] == [
        q for q, is_right in zip(questions, right, strict=True) if not is_right
    ]
    assert shown and any(right), "the test needs both"


@pytest.mark.parametrize("name", ["metrics.jsonl", "adapter.pth", "merged.pth", "sort-heldout.jsonl"])
def test_what_is_missing_is_named_with_the_command_that_makes_it(name, run, monkeypatch, capsys):
    (run / name).unlink()
    with pytest.raises(SystemExit):
        draw(monkeypatch, run)
    error = capsys.readouterr().err
    assert name in error and picture.DEMO in error
    assert not (run / "picture.png").exists()


def test_the_committed_picture_is_small():
    assert (ROOT / picture.OUT).stat().st_size <= 150_000
