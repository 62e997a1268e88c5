"""docs/python.md: its program runs as it stands there, and does what train.py does."""

import json
import re
import subprocess
import sys

import pytest

from .conftest import ROOT, read_rows


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(folder of the runs, what the page's program printed)"""
    folder = tmp_path_factory.mktemp("python")
    text = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```python\n(.*?)```", text, re.S))
    assert blocks.count('"out/') == 2
    code = blocks.replace('"out/', f'"{folder}/').replace("epoch_steps=4", 'epoch_steps=4, accelerator="cpu"')
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done.stdout


def losses(folder):
    return [line["loss"] for line in read_rows(folder / "metrics.jsonl")]


def test_the_program_of_the_page_trains(ran):
    folder, said = ran
    assert "4 steps of rows of 256 tokens\nchosen: the longest document has" in said
    assert "90 documents to train on, 10 held out" in said and said.count("done: step 4 of 4") == 2
    rows = (folder / "sort/rows.jsonl").read_text().splitlines()
    assert len(rows) == 100 and json.loads(rows[0]).keys() == {"question", "answer"}


def test_a_loss_of_ones_own_is_minimised(ran):
    """A token's focal loss is below its cross entropy: the first step has the same rows and weights."""
    folder, _ = ran
    lines = read_rows(folder / "focal/metrics.jsonl")
    assert 0 < lines[0]["focal"] < lines[0]["loss"] == losses(folder / "sort")[0]
    assert lines[-1]["focal"] < lines[0]["focal"] and lines[-1]["loss"] != losses(folder / "sort")[-1]
