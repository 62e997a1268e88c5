"""Words of docstrings and comments: they have a subject, functions begin with a verb, numbers have names."""

import ast
import io
import re
import tokenize

import pytest

from .conftest import ROOT

PRODUCT = ("src", "rwkv_miss", "demo", "scripts", "benchmarks")
FILES = {room: [*ROOT.glob(f"{room}/**/*.py")] for room in (*PRODUCT, "tests", "gpu_emulation")}
FILES["."] = [*ROOT.glob("*.py")]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
NO_SUBJECT = re.compile(r"(of|the same|it|its|it's|those|these|them|what)\b", re.IGNORECASE)
NO_STATEMENT = re.compile(r"(That|How|Which|Who|Whose|Why|When|Where|Whether)\b")
NO_NAME = re.compile(r"\bso\s+many\b")  # a number has a name, which stands in the signature
# articles, pronouns, prepositions, numbers, plurals and "Returns": a verb in the imperative is none of these
NO_VERB = re.compile(
    r"[^A-Z]|(A|An|The|All|Another|Any|Both|Each|Every|Everything|No|Nothing|One|Two|There|This|Such)\b"
    r"|(As|At|By|For|From|In|On|To|With|Without|Around|Beside|UserError|ValueError|Context|Number)\b|\w*[^s]s\b"
)
# a preposition that hides a relation: say of, with, next to, or in the folder of
BESIDE, MOST_BESIDES = re.compile(r"\bbeside\b"), 20


def docstrings(tree):
    """(node, docstring) of all that have one."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and (text := ast.get_docstring(node)):
            yield node, text


def is_called(node):
    """Tell a function for callers: a property's docstring is a noun, a command's is its help."""
    decorators = [ast.unparse(each) for each in getattr(node, "decorator_list", ())]
    exempt = any("property" in each or each.startswith("command(") for each in decorators)
    return isinstance(node, FUNCTIONS) and not exempt


def comments(source):
    """(line, text) where a comment begins: a block of lines is one, and so is each end of a line of code."""
    above = None
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            (line, column), alone = token.start, not token.line[: token.start[1]].strip()
            if not alone or above != (line - 1, column):
                yield line, token.string.lstrip("#: ")
            above = token.start if alone else None


@pytest.mark.parametrize("room", FILES)
def test_docstrings_and_comments(room):
    wrong = []
    for path in FILES[room]:
        source, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT)
        found = list(docstrings(ast.parse(source)))
        wrong += [
            f"{name}:{node.body[0].lineno}: {text.splitlines()[0]}"
            for node, text in found
            if NO_SUBJECT.match(text)
            or NO_STATEMENT.match(text)
            or room in PRODUCT
            and is_called(node)
            and NO_VERB.match(text)
        ]
        wrong += [f"{name}:{line}: {text}" for line, text in comments(source) if NO_SUBJECT.match(text)]
        wrong += [f"{name}: {text}" for text in NO_NAME.findall(source)]
    assert not wrong, "\n".join(wrong)


def test_few_places_say_beside():
    assert sum(map(len, FILES.values())) > 500
    found = {path: len(BESIDE.findall(path.read_text("utf-8"))) for room in FILES.values() for path in room}
    places = [f"{path.relative_to(ROOT)}: {count}" for path, count in found.items() if count]
    assert sum(found.values()) <= MOST_BESIDES, "\n".join(places)


@pytest.mark.parametrize(
    "docstring", ["What it is.", "Those of a file.", "The files.", "Bytes of a file.", "(a, b).", "Its file."]
)
def test_what_is_no_verb(docstring):
    assert NO_SUBJECT.match(docstring) or NO_VERB.match(docstring)


def test_where_comments_begin():
    source = "# one\n# of two\nx = 1  # of three\n    # it\ny = 2  # these\nz = 3  # the same\n"
    expected = [(1, "one"), (3, "of three"), (4, "it"), (5, "these"), (6, "the same")]
    assert list(comments(source)) == expected
    assert [bool(NO_SUBJECT.match(text)) for _, text in expected] == [False, True, True, True, True]
