"""Documentation: the commits, commands, flags, files, links and anchors that it cites are there."""

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import unicodedata

import pytest

from scripts import memory_table, tables
from src.config import FIELDS, legacy

from .conftest import ROOT
from .pages import (
    HISTORY,
    PROGRAMS,
    anchors,
    commands,
    foreign_module,
    links,
    pages,
    prose,
    python_words,
    spans,
)
from .parse_commands import has_parser

# flags of launchers and other tools that stand in code spans
FOREIGN_FLAGS = {
    "--force-reinstall",
    "--index-url",
    "--hostfile",
    "--launcher",
    "--local_addr",
    "--logdir",
    "--master_addr",
    "--no_ssh",
    "--node_rank",
    "--pid",
    "--rdzv_backend",
    "--rdzv_conf",
    "--rdzv_endpoint",
}
# a key of safetensors files, which looks like a module
NOT_HERE = {"rwkv_miss.checkpoint"}
# in a path, a word that stands for the reader's own
PLACEHOLDER = re.compile(r"\b(?!README)[A-Z]{2,}\b")
# other programs that the blocks of commands may begin with
TOOLS = {
    "python",
    "pip",
    "git",
    "cd",
    "wget",
    "curl",
    "hf",
    "huggingface-cli",
    "sbatch",
    "tensorboard",
    "uv",
    "docker",
    "export",
    "open-webui",
    "aider",
}

ROOMS = "benchmarks|cuda|demo|docs|gpu_emulation|rwkv_miss|scripts|src|tests"
FILE = re.compile(rf"(?:{ROOMS}|\.ci|\.github)/[\w./*-]*")
MODULE = re.compile(rf"(?:{ROOMS})(?:\.\w+)+")

# 7 or more hexadecimal digits with a digit and a letter among them: neither a word nor a number
HASH = re.compile(r"(?<![\w#/.+-])(?=[a-f]*\d)(?=\d*[a-f])(?:[0-9a-f]{7,12}|[0-9a-f]{40})(?!\w)")


def git(*arguments):
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True).stdout.strip()


@pytest.fixture
def history():
    """The commits up to this one, or a skip where they are not at hand."""
    if not shutil.which("git") or git("rev-parse", "--show-toplevel") != str(ROOT.resolve()):
        pytest.skip("NO GIT HISTORY: that the commits which the documentation cites exist is not tested")
    if git("rev-parse", "--is-shallow-repository") == "true":
        pytest.skip("A SHALLOW CLONE: that the commits which the documentation cites exist is not tested")
    return git("log", "--format=%H").split()


def test_every_commit_that_is_cited_is_in_the_history(history):
    cited = [
        (ROOT / page, number, found)
        for page, text in pages().items()
        for number, line in enumerate(text.splitlines(), 1)
        for found in HASH.findall(line)
    ]
    results = [*ROOT.glob("docs/results/*.json")]
    cited += [(path, "commit", json.loads(path.read_text(encoding="utf-8"))["commit"]) for path in results]
    assert results and len(cited) > len(results)
    unknown = [
        f"{path.relative_to(ROOT)}:{place}: {found}"
        for path, place, found in cited
        if not any(commit.startswith(found) for commit in history)
    ]
    assert not unknown, "\n".join(unknown)


BLOCKS = [
    (page, found[2], found[3]) for page, text in pages().items() for found in tables.BLOCK.finditer(text)
]
# a model of a table of memory takes seconds: scripts/test.sh counts one of one table, --all two of each
CASES = [
    pytest.param(*block, model, id=f"{block[1]} of {model}", marks=[pytest.mark.slow] * is_slow)
    for block in BLOCKS
    for model, is_slow in (("0.4B", "memory_table --" in block[1]), ("7.2B", True))
    if "memory_table" in block[1] or model == "0.4B"
]


def test_tables_that_commands_print():
    commands = {command for _, command, _ in BLOCKS}
    memory = {f"scripts.memory_table{flag}" for flag in ("", " --cpu", " --moments", " --scaling")}
    methods = {"scripts.methods_table", "scripts.methods_table --options"}
    assert commands == {"scripts.flags", "gpu_emulation.fake_gpu --launches", *memory, *methods}
    marks = sum(text.count("<!-- begin: ") + text.count("<!-- end: ") for text in pages().values())
    assert marks == 2 * len(BLOCKS), "a table without its end"


@pytest.mark.parametrize("page, command, table, counted", CASES)
def test_a_table_is_what_its_command_prints(page, command, table, counted, monkeypatch):
    models = memory_table.MODELS
    monkeypatch.setattr(memory_table, "MODELS", {counted: models[counted]})
    made = tables.printed(command)
    if command.startswith("scripts.memory_table"):
        left_out = [f"RWKV-7 {name}" for name in models if name != counted]
        lines = table.splitlines(keepends=True)
        assert len(lines) == 2 + len(models)
        table = "".join(line for line in lines if line.split(" | ")[0].strip("| ") not in left_out)
    assert table == made, f"{page}: run python -m scripts.tables"


def test_every_spelling_of_a_flag_is_on_their_page():
    for name, field in FIELDS.items():
        for spelling in (name, *field.metadata["alias"]):
            assert f"`--{spelling}`" in pages()["docs/flags.md"], spelling


def current_pages():
    """Page -> text, of those that tell what is true today."""
    return {page: text for page, text in pages().items() if page not in HISTORY}


def cited_programs():
    """(page, command as it is written, words after `python`, whether it is complete) of our programs."""
    for page, text in current_pages().items():
        for words in commands(text):
            after_python = python_words(words)
            if after_python:
                yield page, shlex.join(words), after_python, "..." not in shlex.join(words)
        for span in spans(text):
            if re.match(r"(python3?|rwkv-miss|torchrun|deepspeed) ", span):
                after_python = python_words(shlex.split(span))
                if after_python:
                    yield page, span, after_python, False


def source_of(words):
    """The file of the repository that `python WORDS` runs."""
    if words[0] != "-m":
        return ROOT / words[0]
    path = ROOT.joinpath(*words[1].split("."))
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


def programs():
    """The words after `python` of every program here that reads a command line."""
    yield ["train.py"]
    for room in PROGRAMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
            runs = path.name == "__main__.py" or '__name__ == "__main__"' in path.read_text(encoding="utf-8")
            if runs and has_parser(["-m", module]):
                yield ["-m", module]


@pytest.fixture(scope="module")
def parsed():
    """(what is wrong or "", flags of the program) of every cited command, and of every program."""
    cited = [each for each in cited_programs() if source_of(each[2]).is_file()]
    given = [(words, complete) for _, _, words, complete in cited] + [(words, False) for words in programs()]
    done = subprocess.run(
        [sys.executable, "-m", "tests.parse_commands"],
        input=json.dumps(given),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    answers = json.loads(done.stdout)
    return list(zip(cited, answers)), answers[len(cited) :]


def test_every_command_starts_a_program_that_is_here():
    for page, text in current_pages().items():
        for words in commands(text):
            after_python = python_words(words)
            written = f"{page}: {shlex.join(words)}"
            if after_python:
                assert source_of(after_python).is_file(), written
            elif foreign_module(words):
                assert importlib.util.find_spec(foreign_module(words)), written
            elif words[0] in ("bash", "source") or "/" in words[0]:
                script = next(word for word in words if "/" in word)
                assert script == ".venv/bin/activate" or (ROOT / script).is_file(), written
            else:
                assert words[0] in TOOLS or words[0].startswith("--"), f"{written}: unknown program"


def test_every_command_parses(parsed):
    """Under its program's own parser: the flags exist, take their values, and none is missing."""
    commands_with_answers, _ = parsed
    assert len(commands_with_answers) > 30
    wrong = [
        f"{page}: {written}: {answer}" for (page, written, *_), (answer, _) in commands_with_answers if answer
    ]
    assert not wrong, "\n".join(wrong)


def test_every_flag_in_the_text_is_one_of_a_program(parsed):
    _, answers = parsed
    assert len(answers) > 30 and not [answer for answer, _ in answers if answer]
    flags = {flag for _, own in answers for flag in own}
    flags |= {f"--{name}" for name in legacy.NAMES} | FOREIGN_FLAGS
    unknown = [
        f"{page}: {span}"
        for page, text in current_pages().items()
        for span in spans(text)
        if set(re.findall(r"(?<![\w-])--[a-z][\w-]*", span)) - flags
    ]
    assert not unknown, "\n".join(unknown)


def is_here(name):
    """Tell whether a file, a folder, a pattern, a module or something in a module is in the repository."""
    if FILE.fullmatch(name):
        return any(ROOT.glob(name.rstrip("/")))
    path = ROOT.joinpath(*name.split("."))
    if path.is_dir() or path.with_suffix(".py").is_file():
        return True
    module, _, attribute = name.rpartition(".")
    try:
        return hasattr(importlib.import_module(module), attribute)
    except ImportError:
        return False


def test_every_file_and_module_in_the_text_is_here():
    missing = []
    for page, text in current_pages().items():
        for span in spans(text):
            named = FILE.fullmatch(span) or MODULE.fullmatch(span)
            if named and span not in NOT_HERE and not PLACEHOLDER.search(span) and not is_here(span):
                missing.append(f"{page}: {span}")
    assert not missing, "\n".join(missing)


def test_every_link_leads_to_a_file_and_a_heading():
    broken = []
    for page, text in pages().items():
        for link in links(text):
            if re.match(r"(https?|mailto):", link):
                continue
            name, _, anchor = link.partition("#")
            target = (ROOT / page).parent / name if name else ROOT / page
            if not target.exists():
                broken.append(f"{page}: {link}")
            elif anchor and anchor not in anchors(target.read_text(encoding="utf-8")):
                broken.append(f"{page}: {link}: no such heading")
    assert not broken, "\n".join(broken)


def test_the_index_has_every_page_in_english_and_in_chinese():
    english, chinese = pages()["docs/README.md"].split("## 中文目录")
    names = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    for index in (english, chinese):
        assert {name for name in names if f"]({name})" not in index} == set()


def columns(line):
    """Columns of a line on a terminal, without the addresses of links and without commands."""
    line = re.sub(r"\]\([^)]*\)|`[^` ]+ [^`]*`", "", line)
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in line)


def test_prose_has_at_most_110_columns():
    """Tables, links and commands may have more, and so may the pages that benchmarks.paper writes."""
    too_long = [
        f"{page}: {line}"
        for page, text in pages().items()
        if not re.fullmatch(r"docs/results/(?!README).*", page)
        for line in prose(text).splitlines()
        if not line.startswith("|") and columns(line) > 110
    ]
    assert not too_long, "\n".join(too_long)


def test_the_commands_for_a_fresh_machine_are_those_of_ci():
    """So that they are known to work where nothing was set up before."""
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
    blocks = [words for words in commands(pages()["README.md"]) if words[0] in ("bash", "source")]
    assert ["bash", "demo/demo-training-miss.sh"] in blocks and ["bash", "scripts/test.sh"] in blocks
    for program, script, *_ in blocks:
        assert re.search(rf"^[^#\n]*\b{program} {re.escape(script)}(?!\S)", ci, re.M), f"{program} {script}"
    workflow = (ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8")
    assert "bash .ci/run" in workflow and "bash .ci/versions" in workflow
