"""What the documentation cites is there."""

import json
import re
import shutil
import subprocess

import pytest

from scripts import flags
from src.config import FIELDS

from .conftest import ROOT

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
    pages = {
        path: path.read_text(encoding="utf-8") for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))
    }
    cited = [
        (path, number, found)
        for path, text in pages.items()
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


def test_the_page_of_flags_is_made_from_the_settings():
    """Whoever changes a setting runs the command once more."""
    made = flags.page()
    assert made == flags.page()
    assert (ROOT / flags.OUT).read_text(encoding="utf-8") == made, "run python -m scripts.flags"
    for name, field in FIELDS.items():
        for spelling in (name, *field.metadata["alias"]):
            assert f"`--{spelling}`" in made, spelling
