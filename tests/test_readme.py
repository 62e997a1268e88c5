"""The README's commands do what they say, as they stand there, on small files of the names that they use. The
Chinese README keeps step with it, and its table of models with docs/memory.md.
"""

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

from .conftest import ROOT, make_arch, random_tensors, slow
from .pages import FENCE, HEADING, commands, links, pages, prose, python_words, spans
from .program import call, succeed

# programs that are tested elsewhere, because here they would take minutes or a network
ELSEWHERE = {
    "scripts.lr_sweep": "test_lr_sweep.py",
    "scripts.lm_eval": "test_lm_eval_model.py",
    "demo.picture": "test_picture.py",
}
MODELS = ("--load_model", "--base", "--model")
TEXTS = ("--data_file", "--questions", "--eval_file")
READMES = ("README.md", "README_zh.md")
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
        self.started = set()
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
        """Return what a command prints: in a process that begins with nothing the first time that a program
        runs, later in a forked one, which takes a tenth of the time.
        """
        name = words[words[0] == "-m"]
        if name in self.started:
            return succeed(call(words, self.path))
        self.started.add(name)
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


@pytest.mark.slow
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


@pytest.mark.parametrize("page", [READMES[0], *map(slow, READMES[1:])])
def test_every_row_of_data_in_the_readme_is_read(folder, page):
    """And what the table calls trained is what the preview marks."""
    shown = [span for span in spans(pages()[page]) if span.startswith("{")]
    assert len(shown) >= 3
    for row in shown:
        (folder.path / "row.jsonl").write_text(f"{row}\n", encoding="utf-8")
        flags = ("--loss", "dpo") if "chosen" in json.loads(row) else ()
        found = folder.run(
            "-m", "scripts.preview", "--data_file", "row.jsonl", "--tokenizer", "world", *flags
        )
        last = list(json.loads(row).values())[-1]
        trained = last[-1]["content"] if isinstance(last, list) else last
        assert re.search(rf"«\s*{re.escape(trained)}", found), found


def sections(text):
    """(level of the heading, text) of each section, the title's first. A # in a block is no heading."""
    blocks = [found.span() for found in FENCE.finditer(text)]
    starts = [
        found.start()
        for found in HEADING.finditer(text)
        if not any(begin < found.start() < end for begin, end in blocks)
    ]
    parts = [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)])]
    return [(len(part) - len(part.lstrip("#")), part) for part in parts]


def numbers(text):
    """The numbers of a text, also those in names such as fp32."""
    return set(re.findall(r"\d(?:[\d.,]*\d)?", text))


def paths(text):
    """The paths in a text: methods/, src/run.py."""
    return re.findall(r"[\w.]+/[\w./]*|\w+\.py\b", text, re.A)


def comparable(span):
    """A code span as it must be in both languages: of a row of data only the keys."""
    return re.sub(r'(?<=: )"[^"]*"', '""', span) if span.startswith("{") else span


def table(text):
    """The rows of a section's tables, as lists of cells."""
    return [line.strip("|").split("|") for line in prose(text).splitlines() if line.startswith("|")]


def test_the_chinese_readme_keeps_step():
    """Section by section: the same headings, commands, paths, code spans, links, tables and numbers."""
    english, chinese = (sections(pages()[page]) for page in READMES)
    assert [level for level, _ in english] == [level for level, _ in chinese]
    for (_, ours), (_, theirs) in zip(english, chinese):
        heading = theirs.partition("\n")[0]
        assert commands(ours) == commands(theirs), heading
        assert [paths(block[3]) for block in FENCE.findall(ours)] == [
            paths(block[3]) for block in FENCE.findall(theirs)
        ], heading
        assert sorted(map(comparable, spans(ours))) == sorted(map(comparable, spans(theirs))), heading
        linked = {
            link.replace("_zh.md", ".md") for link in links(theirs)
        }  # a page in Chinese, where there is one
        assert sorted({*links(ours)} - {*READMES}) == sorted(linked - {*READMES}), heading
        assert numbers(ours) == numbers(theirs), heading
        assert [[numbers(cell) for cell in row] for row in table(ours)] == [
            [numbers(cell) for cell in row] for row in table(theirs)
        ], heading


def test_the_models_that_fit_are_those_of_the_page_of_memory():
    """For each device and each set of flags the largest model that fits, by the tables that scripts print."""
    tables = [
        [[cell.strip() for cell in row] for row in table(part) if row[0].startswith(" RWKV-7")]
        for _, part in sections(pages()["docs/memory.md"])
        if part.startswith(("## How much does a model need on a GPU?", "## And on a CPU?"))
    ]
    gpu, cpu = tables
    (fit,) = [part for _, part in sections(pages()["README.md"]) if "laptop CPU" in part]
    free = [12, 8, 16, 24]  # GiB, as in those tables; the system has 4 of the laptop's 16
    for number, row in enumerate(table(fit)[2:]):
        for cell, sizes, gigabytes in zip(row[1:], [cpu, gpu, gpu, gpu], free):
            # the columns from `together` on are for --grad_cp 0, the last layers, 2, 1, and 1 with nf4
            column = [-5, -4, -3, -1][number]
            fitting = [
                f"{name.removeprefix('RWKV-7 ')} ({each[column]})"
                for name, *each in sizes
                if float(each[column]) <= 0.9 * gigabytes
            ]
            assert cell.strip() == fitting[-1]
