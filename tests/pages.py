"""The pages of the documentation: their commands, code spans, links and headings."""

import functools
import re
import shlex

from .conftest import ROOT

# pages of the past: a sentence that was true on a day stays as it was written
HISTORY = {"CHANGELOG.md", "docs/worklog.md", "docs/worklog-archive.md"}

# folders of ours that `python -m` starts modules in
PROGRAMS = ("rwkv_miss", "scripts", "benchmarks", "demo")

FENCE = re.compile(r"^( *)(`{3,})(\w*)[^\n]*\n(.*?)^\1\2", re.S | re.M)
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)[^)]*\)|<(?:img|a)\s[^>]*(?:src|href)=\"([^\"]+)\"")
HEADING = re.compile(r"^#{1,6} +(.+?)#* *$", re.M)


@functools.cache
def pages():
    """Path from the root -> text, of every page."""
    paths = (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted(paths)}


def prose(text):
    """A page without its fenced blocks."""
    return FENCE.sub("", text)


def spans(text):
    """Find the texts between single backticks."""
    return SPAN.findall(prose(text))


def links(text):
    return [first or second for first, second in LINK.findall(prose(text))]


def anchors(text):
    """The anchors that GitHub gives a page's headings."""
    found = []
    for heading in HEADING.findall(prose(text)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
        earlier = sum(1 for other in found if re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other))
        found.append(f"{slug}-{earlier}" if earlier else slug)
    return found


def commands(text):
    """The commands of a page's shell blocks, as lists of words, without variables that are set before one."""
    found = []
    for *_, language, block in FENCE.findall(text):
        if language not in ("bash", "sh", "shell", "console"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            found += simple_commands(line.strip().removeprefix("$ "))
    return found


def simple_commands(line):
    """The commands of a line, which are joined by && or ; or pipes."""
    reader = shlex.shlex(line, posix=True, punctuation_chars="&|;")
    reader.whitespace_split = True
    reader.commenters = "#"
    found = [[]]
    for word in reader:
        if word and set(word) <= set("&|;"):
            found.append([])
        elif found[-1] or not re.fullmatch(r"[A-Z_]+=\S*", word):
            found[-1].append(word)
    return [words for words in found if words]


def python_words(words):
    """The words after `python` of a command that starts one of ours, also under a launcher; else None."""
    if words[0] == "rwkv-miss":
        return ["-m", "rwkv_miss", *words[1:]]
    if words[0] in ("torchrun", "deepspeed", "srun"):
        if "train.py" in words:
            return words[words.index("train.py") :]
        words = words[words.index("python") :] if "python" in words else words
    if words[0] not in ("python", "python3") or foreign_module(words):
        return None
    return words[1:]


def foreign_module(words):
    """The module of another project that a command starts, or ""."""
    if words[0] not in ("python", "python3") or words[1:2] != ["-m"]:
        return ""
    return "" if words[2].partition(".")[0] in PROGRAMS else words[2]
