"""The preview of --loss grpo: what is asked, what right answers get, and each trouble where it is."""

import json

import pytest

from src.config import Config
from src.data.encode import Encoder
from src.data.formats import Report
from src.data.rwkv_template import MODES
from src.data.templates import load_template
from src.planning.draft import Draft
from src.planning.plan import read_data

from .conftest import write_rows
from .test_generate import named
from .test_preview import show  # noqa: F401

GOOD = [{"question": f"{i}+{i}?", "answer": str(2 * i)} for i in range(1, 6)]


@pytest.fixture
def look(show):  # noqa: F811
    """look(rows, *flags) -> (what --json prints, {finding: (count, line, rest)})."""

    def run(rows, *flags, held=()):
        code, output = show([*GOOD, *rows], "--loss", "grpo", "--json", "--strict", *flags, held=held)
        found = json.loads(output)
        names = {}
        for finding in found["findings"]:
            line, _, rest = finding["first"].partition(".jsonl, line ")[2].partition(", ")
            names[finding["name"]] = (finding["count"], line.partition(":")[0], rest)
        assert code == bool(names)
        return found, names

    return run


def test_good_questions(look, tmp_path):
    """The figures are those that a run chooses."""
    flags = ("--rewards", "exact=1,number=2,boxed=0")
    found, names = look([], *flags, "--bos", "auto")
    assert names == {"unrewarded": (5, "1", "boxed")}
    found, names = look([], "--bos", "auto", "--rewards", "partial=1,exact=1")
    assert names == {}
    assert found["rewards"] == {
        name: {"judged": 5, "mean": 1.0, "least": 1.0, "below": 0} for name in ("partial", "exact")
    }
    config = Config(
        loss="grpo",
        data_file=str(tmp_path / "data.jsonl"),
        bos="auto",
        rewards={"partial": 1.0, "exact": 1.0},
    )
    draft = Draft(config)
    data = read_data(draft, named("bytes"), load_template("rwkv"))
    chosen = draft.config
    assert (found["max_tokens"], found["ctx_len"]) == (chosen.max_tokens, chosen.ctx_len) == (2 + 16, 256)
    assert (found["questions"], found["tokens"]) == (5, data.documents.tokens)
    assert found["right_lengths"] == {"0%": 3, "50%": 3, "90%": 4, "99%": 4, "100%": 4}


@pytest.mark.parametrize(
    ("name", "rows", "flags", "wanted"),
    [
        ("bad row", [{"question": "a", "answer": None}], [], (1, "6", "got None")),
        (
            "nothing asked",
            [{"question": " ", "answer": "1"}, {"question": "a", "answer": ""}],
            [],
            (2, "6", ""),
        ),
        ("blank line", [{"question": "a\n\nb", "answer": "1"}], [], (1, "6", "")),
        ("bare question", [{"prompt": "Why?", "completion": "1"}], [], (1, "6", "")),
        ("duplicate", [GOOD[2]], [], (1, "6", "")),
        ("other answer", [{**GOOD[2], "answer": "7"}], [], (1, "6", "")),
        ("too long", [{"question": "a" * 90, "answer": "1"}], ["--ctx_len", "90"], (1, "6", "")),
        ("unrewarded", [{"question": "a", "answer": "b"}], ["--rewards", "number=1"], (1, "6", "number")),
        (
            "unrewarded",
            [{"question": "a", "answer": "bcdef"}],
            ["--rewards", "exact=1,length=1", "--reward_length", "4"],
            (1, "6", "length"),
        ),
    ],
)
def test_one_kind_of_trouble(look, name, rows, flags, wanted):
    found, names = look(rows, *flags)
    assert names == {name: wanted}


def test_an_answer_that_is_longer_than_the_limit_gets_nothing(look):
    rows = [{"question": "a", "answer": "x" * 9}]
    found, names = look(rows, "--max_tokens", "10", "--rewards", "exact=1,partial=1")
    assert names == {"long answer": (1, "6", ""), "unrewarded": (1, "6", "exact")}
    assert found["longer_than_max_tokens"] == 1 and found["rewards"]["exact"]["below"] == 1
    assert found["rewards"]["partial"]["below"] == 0
    assert look(rows, "--max_tokens", "11")[1] == {}


def test_a_question_that_is_held_out_too(look):
    held = [{"question": "9?", "answer": "1"}, {**GOOD[3], "answer": "other"}]
    _, names = look([], held=held)
    assert list(names) == ["known prompt"] and names["known prompt"][:2] == (1, "2")


@pytest.mark.parametrize("mode", MODES)
def test_a_right_answer_is_drawn_as_the_template_writes_it(look, mode):
    """After empty thoughts where the template begins them: it gets the full reward in every mode."""
    found, names = look([{"question": "a", "answer": "b\n\nc"}], "--template", mode)
    assert names == {} and found["rewards"]["exact"]["mean"] == 1
    assert {weight for sample in found["samples"] for _, weight in sample} == {0}  # none is trained


def test_what_people_read(show):  # noqa: F811
    code, output = show(
        GOOD, *"--loss grpo --rewards exact=1,regex=0.5 --reward_regex [24] --samples 1 --strict".split()
    )
    assert code == 1
    assert "questions  5; a prompt has 22 tokens" in output
    assert (
        "1.25 times the longest reference answer, plus 16, for the reward exact; no reference answer is"
        " longer" in output
    )
    assert "reward     exact: 1 in the mean of 5 reference answers\n" in output
    assert "reward     regex: 0.4 in the mean of 5 reference answers, at least 0\n" in output
    assert "finding    unrewarded, 3 rows" in output
    assert (
        "question 1 of 5, 22 tokens, as it is asked:\n    | User: 1+1?\n    | \n    | Assistant:\n" in output
    )
    assert "it gets exact 1, regex 1; together 1.5:\n    | 2\n" in output


def test_wrong_settings_are_one_line(show, capsys):  # noqa: F811
    for flags, said in (
        (["--rewards", "exakt=1"], "--rewards exakt: expected one of"),
        (["--rewards", "regex=1"], "--rewards regex needs --reward_regex"),
        (["--rewards", "exact=0"], "no reward has a weight"),
    ):
        with pytest.raises(SystemExit) as stopped:
            show(GOOD, "--loss", "grpo", *flags)
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and said in error and error.count("\n") == 1


def test_reading_for_a_run_counts_what_the_preview_finds(tmp_path):
    """--on_bad_row skip leaves out bad rows, and the report has what is empty."""
    rows = [*GOOD, {"question": "a", "answer": None}, {"question": " ", "answer": "1"}]
    write_rows(tmp_path / "data.jsonl", rows)
    config = Config(loss="grpo", data_file=str(tmp_path / "data.jsonl"), on_bad_row="skip")
    data = read_data(Draft(config), named("bytes"), load_template("rwkv"))
    assert len(data.documents) == 5 and isinstance(data.found, Report) and data.found.bad == 1
    assert isinstance(data.encoder, Encoder)
    lines = "\n".join(data.found.lines())
    assert "1 row cannot be used and is left out" in lines
    assert "1 row, in which the question is empty" in lines and "line 7" in lines
