"""demo/colab.ipynb runs from top to bottom, as on a machine without a GPU and with a tiny model."""

import os
import pathlib
import subprocess
import sys
import zipfile

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parent.parent
BASE = ROOT / "demo" / "rwkv7-reverse.pth"


def test_the_notebook_gets_the_program_from_an_uploaded_zip(tmp_path, monkeypatch):
    """The first two cells without REPOSITORY; the zip has a folder around the files, as GitHub's have."""
    with zipfile.ZipFile(tmp_path / "main.zip", "w") as archive:
        archive.writestr("rwkv-miss-main/train.py", "")
        archive.writestr("rwkv-miss-main/requirements.txt", "")
    notebook = nbformat.read(ROOT / "demo" / "colab.ipynb", as_version=4)
    notebook.cells = [cell for cell in notebook.cells if cell.cell_type == "code"][:2]
    notebook.cells[1].source += "\nprint('here:', pathlib.Path('train.py').resolve())"
    assert "pip install" in notebook.cells[1].source
    notebook.cells[1].source = notebook.cells[1].source.replace("%pip install", "# pip install")
    nbclient.NotebookClient(
        notebook, timeout=60, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    printed = "".join(output.get("text", "") for output in notebook.cells[1].outputs)
    assert f"here: {tmp_path}/rwkv-miss/rwkv-miss-main/train.py" in printed


@pytest.mark.rare
def test_the_notebook_trains_on_rows_and_answers_a_new_question(tmp_path, monkeypatch):
    """The cells themselves clone, install, check, train, merge and chat; only the addresses are others."""
    if subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("not a git repository, and the notebook clones one")
    notebook = nbformat.read(ROOT / "demo" / "colab.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in code), "it is kept without outputs"
    (parameters,) = (cell for cell in code if cell.metadata.get("tags") == ["parameters"])
    assert 'REPOSITORY = ""' in parameters.source
    parameters.source = parameters.source.replace('REPOSITORY = ""', f"REPOSITORY = {str(ROOT)!r}")
    parameters.source += f"\nMODEL = {str(BASE)!r}\n"
    # a notebook's `!python` is the first on PATH
    monkeypatch.setenv("PATH", os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]))
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()

    printed = ["".join(output.get("text", "") for output in cell.outputs) for cell in code]
    assert "training works here" in printed[2] and "no GPU" in printed[2]
    assert "56 rows" in printed[4] and "verdict:   learnt" in printed[4]
    shown = [output.data for output in code[5].outputs]
    assert "image/png" in shown[0] and "verdict" in shown[1]["text/markdown"]
    # the rows never ask in these words
    assert "On Wednesday we are open from 12 to 20." in printed[6]
    assert "merged.pth" in printed[7] and (tmp_path / "rwkv-miss" / "out" / "run" / "merged.pth").exists()
