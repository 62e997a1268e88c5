"""Words of docstrings and comments: they have a subject, functions begin with a verb, numbers have names."""

import ast
import io
import re
import tokenize

import pytest

from .conftest import ROOT

FILES = [
    path
    for room in ("src", "rwkv_miss", "demo", "scripts", "benchmarks")
    for path in ROOT.glob(f"{room}/**/*.py")
]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
NO_SUBJECT = re.compile(r"(That|Those|What|Of|How|Which|Who|Whose|Why|When|Where|Whether)\b")
NO_NAME = re.compile(r"\bso\s+many\b")  # a number has a name, which stands in the signature
# articles, pronouns, prepositions, numbers, plurals and "Returns": a verb in the imperative is none of these
NO_VERB = re.compile(
    r"[^A-Z]|(A|An|The|All|Another|Any|Both|Each|Every|Everything|Its?|No|Nothing|One|Two|There|This|Such)\b"
    r"|(As|At|By|For|From|In|On|To|With|Without|Around|Beside|UserError|ValueError|Context|Number)\b|\w*[^s]s\b"
)


def docstrings(tree):
    """(node, docstring) of all that have one."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and (text := ast.get_docstring(node)):
            yield node, text


def is_called(node):
    """Whether it is a function for callers: a property's docstring is a noun, a command's is its help."""
    decorators = [ast.unparse(each) for each in getattr(node, "decorator_list", ())]
    exempt = any("property" in each or each.startswith("command(") for each in decorators)
    return isinstance(node, FUNCTIONS) and not exempt


def comments(source):
    """All comments of a source."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [token.string for token in tokens if token.type == tokenize.COMMENT]


def test_docstrings_and_comments():
    assert len(FILES) > 250
    wrong = []
    for path in FILES:
        source = path.read_text(encoding="utf-8")
        found = list(docstrings(ast.parse(source)))
        wrong += [
            f"{path.relative_to(ROOT)}:{node.body[0].lineno}: {text.splitlines()[0]}"
            for node, text in found
            if NO_SUBJECT.match(text) or is_called(node) and NO_VERB.match(text)
        ]
        if NO_NAME.search(source):
            texts = [*comments(source), *(text for _, text in found)]
            wrong += [f"{path.relative_to(ROOT)}: {text}" for text in texts if NO_NAME.search(text)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "docstring", ["What it is.", "Those of a file.", "The files.", "Bytes of a file.", "(a, b)."]
)
def test_what_is_no_verb(docstring):
    assert NO_SUBJECT.match(docstring) or NO_VERB.match(docstring)
