"""The README's commands do what they say, as they stand there, on small files of the names that they use."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch

import rwkv_miss
from src.model import RWKV

from .conftest import ROOT, make_arch, random_tensors
from .pages import commands, pages, python_words, spans

# programs that are tested elsewhere, because here they would take minutes or a network
ELSEWHERE = {
    "scripts.lr_sweep": "test_lr_sweep.py",
    "scripts.lm_eval": "test_lm_eval_model.py",
    "demo.picture": "test_picture.py",
}
MODELS = ("--load_model", "--base", "--model")
TEXTS = ("--data_file", "--questions", "--eval_file")
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def rows():
    """Short conversations, enough of them that some are held out."""
    for n in range(120):
        yield {"question": f"What is {n} + 1?", "answer": f"It is {n + 1}."}


class Folder:
    """A folder that looks like the checkout, where the commands find their files."""

    def __init__(self, path):
        self.path = path
        for entry in ROOT.iterdir():
            if entry.name not in ("out", ".git", ".venv", "build"):
                (path / entry.name).symlink_to(entry)
        self.store = path / "store"
        self.store.mkdir()
        tensors = random_tensors(make_arch(7, n_embd=64, head_size=64, vocab_size=65536), torch.bfloat16)
        rwkv_miss.write_checkpoint(self.store / "base.pth", tensors.items())
        model = RWKV.load(self.store / "base.pth", torch.float32)
        rwkv_miss.inject(model, "miss", rank=4)
        for name, p in model.named_parameters():
            if name.endswith(".miss"):
                p.data += 0.01 * torch.randn_like(p)
        rwkv_miss.save_adapter(model, self.store / "adapter.pth")
        lines = "".join(json.dumps(row) + "\n" for row in rows())
        (self.store / "rows.jsonl").write_text(lines)
        self.run("-m", "rwkv_miss", "convert", "store/adapter.pth", "store/bone.pth", "--to", "rwkv-peft")

    def bring(self, kind, name):
        """A file of a kind under the name that a command uses. What lies in out/ a command has written."""
        path = self.path / name
        if not path.exists() and not name.startswith("out/"):
            shutil.copy(self.store / kind, path)

    def bring_inputs(self, words):
        for flag, value in zip(words, words[1:]):
            if flag in MODELS:
                self.bring("base.pth", value)
            elif flag in TEXTS:
                self.bring("rows.jsonl", value)
            elif flag == "--adapter":
                self.bring("adapter.pth", value.rpartition("=")[2])
        if "convert" in words:
            source, target = words[words.index("convert") + 1 :][:2]
            self.bring("bone.pth" if "native" in words else "adapter.pth", source)
            # an output of an earlier command in the README
            (self.path / target).unlink(missing_ok=True)

    def run(self, *words):
        done = subprocess.run(
            [sys.executable, *words],
            cwd=self.path,
            env=ONE_THREAD,
            stdin=subprocess.DEVNULL,  # a chat ends at once
            capture_output=True,
            encoding="utf-8",
            timeout=600,
        )
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return Folder(tmp_path_factory.mktemp("readme"))


def test_every_command_of_the_readme_runs(folder):
    """In their order, so that a merge takes the adapter of the run before it."""
    assert all((ROOT / "tests" / test).is_file() for test in ELSEWHERE.values())
    ran = set()
    for words in map(python_words, commands(pages()["README.md"])):
        if not words or words[1] in ELSEWHERE:
            continue
        folder.bring_inputs(words)
        folder.run(*words)
        ran.add(words[1] if words[0] == "-m" else words[0])
    assert {"train.py", "rwkv_miss", "demo.chat"} <= ran


def test_every_row_of_data_in_the_readme_is_read(folder):
    """And what the table calls trained is what the preview marks."""
    shown = [span for span in spans(pages()["README.md"]) if span.startswith("{")]
    assert len(shown) >= 3
    for row in shown:
        (folder.path / "row.jsonl").write_text(f"{row}\n", encoding="utf-8")
        found = folder.run("-m", "scripts.preview", "--data_file", "row.jsonl", "--tokenizer", "world")
        last = list(json.loads(row).values())[-1]
        trained = last[-1]["content"] if isinstance(last, list) else last
        assert re.search(rf"«\s*{re.escape(trained)}", found), found
