"""Data files of every format become the same rows, and what is wrong with one is told with file, line and
reason.
"""

import gzip
import json
import math
import os
import shutil
import sys
import tracemalloc
import types

import numpy as np
import pytest

from rwkv_miss import UserError
from rwkv_miss.files import hub
from src.config import Config
from src.data import token_cache
from src.data.dataset import load_documents
from src.data.formats import Reading, Report, SourceFindings, read_records, sample, sources
from src.data.formats import tables as formats_tables
from src.data.formats import text as formats_text
from src.data.tokenizer import load_tokenizer

from .tables import cases
from .test_binidx import write_binidx

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
CHATS = [
    {"messages": CHAT},
    {"messages": [{"role": "user", "content": "2"}, {"role": "assistant", "content": "二🙂"}]},
]
ABSENT = "THE EXTRA data IS ABSENT: pip install pyarrow datasets"
PAIRS = [{"question": "q", "answer": "a"}, {"question": "2", "answer": "二🙂"}]


@pytest.fixture
def read(tmp_path, monkeypatch):
    """read(content, name, ...) -> rows, in the file's folder, so that messages begin with the name."""
    monkeypatch.chdir(tmp_path)

    def make(content, name="rows.jsonl", report=None, **reading):
        if not isinstance(content, bytes):
            content = (
                content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
            ).encode()
        (tmp_path / name).write_bytes(content)
        return [row for _, row in read_records(name, report, Reading(**reading))]

    return make


def mistake(read, *args, **options):
    with pytest.raises(UserError) as caught:
        read(*args, **options)
    return str(caught.value)


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


# layouts


Q, A = CHAT
SYSTEM, FED, ANSWERED = turn("system", "s"), turn("user", "q\nx"), turn("tool", "5", tool_call_id=1)
CALL, FUNCTION = [{"id": 1}], [{"function": {"name": "f"}}]


def talk(*turns, **more):
    return {"messages": list(turns), **more}


def sharegpt(turns, **more):
    pairs = (turn.split() for turn in turns.split(", "))
    return {"conversations": [{"from": role, "value": words} for role, words in pairs], **more}


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT},
        {"conversations": '[{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]'},
        {"prompt": [Q], "completion": [A]},
        {"instruction": "q", "input": "", "output": "a"},
        {"instruction": "q", "input": None, "output": "a"},
        {"instruction": "q", "output": "a"},
        {"question": "q", "answer": "a"},
        {"Question": "q", "Response": "a"},
        {"问题": "q", "答案": "a"},
        {"提问": "q", "回答": "a"},
        {"human": "q", "gpt": "a"},
        {"query": "q", "response": "a"},
        {"input": "q", "output": "a"},
        {"prompt": "q", "response": "a"},
        {"question": "q", "completion": "a"},
        {"system": "", "user": "q", "assistant": "a"},
    ],
    ids=str,
)
def test_layouts_of_a_question_and_an_answer(read, row):
    assert read([row]) == [{"messages": CHAT}]


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"text": "t", "meta": {"a": [1]}}, {"text": "t"}),
        ({"Text": "t", "messages": None}, {"text": "t"}),
        (talk(turn("developer", "s"), Q, A), [SYSTEM, Q, A]),
        (talk(turn("user", parts("q", "!")), A), [turn("user", "q!"), A]),
        (
            talk(Q, turn("assistant", None, tool_calls=CALL), ANSWERED, A),
            [Q, turn("assistant", "", tool_calls=CALL), ANSWERED, A],
        ),
        (
            talk(Q, turn("assistant", None, function_call=FUNCTION[0]["function"]), turn("function", "5"), A),
            [Q, turn("assistant", "", tool_calls=FUNCTION), turn("tool", "5"), A],
        ),
        (sharegpt("human q, gpt a", system="s"), [SYSTEM, Q, A]),
        (sharegpt("system own, Human q, gpt a", system="s"), [turn("system", "own"), Q, A]),
        (
            sharegpt("human q, function_call f, observation o, gpt a"),
            [Q, turn("assistant", "f"), turn("tool", "o"), A],
        ),
        ({"conversation": [{"human": "q", "assistant": "a"}] * 2, "category": "x"}, [*CHAT, *CHAT]),
        ({"instruction": "q", "input": "x", "output": "a"}, [FED, A]),
        ({"instruction": "q", "context": "x", "response": "a", "category": "c"}, [FED, A]),
        (
            {"instruction": "q", "input": "", "output": "a", "system": "s", "history": [["1", "2"]]},
            [SYSTEM, turn("user", "1"), turn("assistant", "2"), Q, A],
        ),
        ({"system_prompt": "s", "question": "q", "response": "a", "id": 1}, [SYSTEM, Q, A]),
        ({"prompt": "q", "completion": "a", "id": 7}, {"prompt": "q", "completion": "a"}),
        (talk(*CHAT, prompt="q", tools=[{"name": "f"}]), talk(*CHAT, tools=[{"name": "f"}])),
        ({"conversations": CHAT, "tools": '[{"name": "f"}]'}, talk(*CHAT, tools=[{"name": "f"}])),
    ],
    ids=str,
)
def test_layouts(read, row, expected):
    assert read([row]) == [{"messages": expected} if isinstance(expected, list) else expected]


@pytest.mark.parametrize(
    "fields, expected",
    [
        ("text", {"text": "t"}),
        ("notes", {"text": "n"}),
        ("dialogue", {"messages": CHAT}),
        ("q,r", {"messages": CHAT}),
        ("r,q", {"messages": [turn("user", "a"), turn("assistant", "q")]}),
        ("q, notes, r", {"messages": [turn("user", "q\nn"), CHAT[1]]}),
    ],
)
def test_columns_by_name(read, fields, expected):
    row = {"text": "t", "notes": "n", "dialogue": CHAT, "q": "q", "r": "a", "question": "x", "answer": "y"}
    assert read([row], fields=Reading.of(Config(sft_field=fields)).fields) == [expected]


def test_columns_that_do_not_tell(read):
    row = {"text": "t", "question": "x", "answer": "y"}
    message = mistake(read, [row])
    assert (
        "line 1: the row has several layouts, choose one with --sft_field text or --sft_field"
        " question,answer; got keys" in message
    )
    assert "--sft_field txt: no column 'txt'; got keys ['answer', 'question', 'text']" in mistake(
        read, [row], fields=("txt",)
    )
    assert "expected 1 column (text or messages), 2 (question, answer) or 3" in mistake(
        read, [{c: c for c in "abcd"}], fields=tuple("abcd")
    )


# formats


def csv_of(rows, mark):
    return "".join(mark.join(line) + "\n" for line in [list(rows[0]), *(list(row.values()) for row in rows)])


def write_parquet(rows, name):
    pyarrow = pytest.importorskip("pyarrow", reason=ABSENT)
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), name, row_group_size=1)


@pytest.mark.parametrize(
    "name, content, format",
    [
        ("rows.jsonl", "".join(json.dumps(row) + "\n" for row in PAIRS), "JSONL"),
        ("rows.json", "".join(json.dumps(row, ensure_ascii=False) + "\r\n\r\n" for row in PAIRS), "JSONL"),
        ("rows.txt", "".join(json.dumps(row) + "\n" for row in PAIRS), "JSONL"),
        ("rows.json", json.dumps(PAIRS), "JSON"),
        ("rows.jsonl", json.dumps(PAIRS, indent=1), "JSON"),
        (
            "rows",
            json.dumps({"version": "1", "tags": ["x"], "data": PAIRS, "n": {"m": []}}, indent=2),
            "JSON",
        ),
        ("rows.json", json.dumps({"data": PAIRS}), "JSON"),
        ("rows.csv", csv_of(PAIRS, ","), "CSV"),
        ("rows.csv", csv_of(PAIRS, ";"), "CSV with ;"),
        ("rows.csv", csv_of(PAIRS, "\t"), "TSV"),
        ("rows.tsv", csv_of(PAIRS, "\t"), "TSV"),
        ("rows", csv_of(PAIRS, ",").replace("\n", "\r\n"), "CSV"),
        ("rows.txt", csv_of(PAIRS, "\t"), "TSV"),
        ("rows.parquet", None, "parquet"),
        ("rows", None, "parquet"),
    ],
)
def test_the_same_rows_from_every_format(read, tmp_path, name, content, format):
    if content is None:
        write_parquet(PAIRS, name)
        files = {name: (tmp_path / name).read_bytes()}
    else:
        files = {
            name: content.encode(),
            f"{name}.gz": gzip.compress(content.encode()),
            f"windows-{name}": content.encode("utf-8-sig"),
            f"old-windows-{name}": content.encode("utf-16"),
            f"wide-{name}": content.encode("utf-32"),
        }
    for name, data in files.items():
        report = Report()
        assert read(data, name, report) == CHATS
        assert report.lines() == [f"format     {name}: {format}, 2 rows, question -> answer"]


@pytest.mark.parametrize("pack", [lambda data: data, gzip.compress])
def test_a_row_beyond_the_bound_is_named_and_not_kept(read, pack):
    rows = pack(b'{"text": "%s"}\n{"text": "b"}\n' % (b"a" * 30_000_000))
    tracemalloc.start()
    report = Report("skip")
    assert [row["text"] for row in read(rows, report=report)] == ["b"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 70_000_000, f"{peak:,} bytes for rows of at most 16 MB"
    said = "line 1: the row has 30,000,013 bytes, more than 16,000,000; split it, or give --largest_row 31"
    assert said in report.files["rows.jsonl"].reasons[0]
    assert said in mistake(read, rows)
    assert len(read(rows, row_bytes=Reading.of(Config(largest_row=31)).row_bytes)) == 2


@pytest.mark.parametrize("text", ["é" * 50, "\udc80" * 100], ids=["letters", "strange"])
def test_a_row_is_measured_in_bytes(read, text):
    row = b'{"text": "%s"}\n' % text.encode("utf-8", "surrogateescape")
    assert "the row has 113 bytes, more than 100" in mistake(read, row, row_bytes=100)
    assert "more than" not in (mistake(read, row + b"x", row_bytes=len(row)))


@pytest.mark.parametrize("text", ["é" * 50, "\\ud83d" * 100], ids=["letters", "halves"])
def test_a_row_of_an_array_has_the_bound_too(read, text):
    row = f'{{"text": ["{text}", {{"a": "{text}"}}]}}'
    said = mistake(read, f'[{{"text": "b"}},\n{row}]', row_bytes=100)
    assert said.startswith("rows.jsonl, line 2: the row has 200 bytes, more than 100")


def test_a_row_of_a_table_has_the_bound_too(read, tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason=ABSENT)
    parquet = pytest.importorskip("pyarrow.parquet", reason=ABSENT)
    parquet.write_table(pyarrow.table({"text": ["b", "a" * 200]}), tmp_path / "t.parquet")
    content = (tmp_path / "t.parquet").read_bytes()
    assert "t.parquet, row 2: the row has 200 bytes" in mistake(read, content, "t.parquet", row_bytes=100)
    assert len(read(content, "t.parquet", row_bytes=200)) == 2


@pytest.mark.parametrize("row", ["%s,c\n", '"%s,c\n', '"%s\n%s\n",c\n'])
def test_a_row_of_csv_has_the_bound_too(read, row):
    row = row.replace("%s", "é" * 49)
    said = mistake(read, f"question,answer\nq,a\n{row}q,a\n" + "r,a\n" * 50, "r.csv", row_bytes=100)
    assert said.startswith("r.csv, line 3: the row has more than 100 bytes; close its double quotes")
    assert len(read("question,answer\n" + f"{'q' * 97},a\n" * 5, "r.csv", row_bytes=100)) == 5


def test_one_packed_text_has_a_bound(read, monkeypatch):
    monkeypatch.setattr(formats_text, "LARGEST_UNPACKED", 100)
    for name in ("rows.json.gz", "rows.txt.gz"):
        assert "unpack" in mistake(read, gzip.compress(b'[{"text": "%s"}]' % (b"a" * 100)), name)
        assert read(b'[{"text": "%s"}]' % (b"a" * 100), name.removesuffix(".gz"))


def test_a_cell_may_hold_anything(read):
    rows = read(
        'id,question,answer\n1,"a ""b"", c\n\nd"," e "\n\n2,é,\n',
        report=(report := Report("skip")),
        name="rows.csv",
    )
    assert rows == [
        {"messages": [turn("user", 'a "b", c\n\nd'), turn("assistant", " e ")]},
        {"messages": [turn("user", "é"), turn("assistant", "")]},
    ]
    assert report.lines()[0] == "format     rows.csv: CSV, 2 rows, question -> answer; not used: id"
    long = "x" * 10_000_000
    assert read(f"text\n{long}\n", "rows.csv") == read([{"text": long}]) == [{"text": long}]
    assert read("text\n中文\n", "rows.csv") == [{"text": "中文"}]


QUOTE = 'question,answer\nq1,a1\nq2,"a2\nq3,a3\nq4,a 5"\nq5,a5\n'


@pytest.mark.parametrize("marks", [",", "\t"])
def test_rows_that_a_quote_swallowed_are_named(read, tmp_path, marks):
    """The rows are read, as cells may have lines, and named; also if the tokens come from the cache."""
    content, report = QUOTE.replace(",", marks), Report()
    assert len(read(content, "r.csv", report)) == 3
    warning = "2 lines in cells between double quotes look like rows, first in r.csv, line 3: close the quote"
    (said,) = report.warnings()
    assert said.startswith(warning) and f"warning    {said}" in report.lines()
    again = SourceFindings.from_json(json.loads(json.dumps(report.files["r.csv"].to_json())))
    assert again == report.files["r.csv"]
    tokens = Report()
    load_documents("r.csv", load_tokenizer("bytes", 256), 64, report=tokens)
    assert tokens.warnings() == [said]


@pytest.mark.parametrize(
    "cells",
    [
        'q,"a poem,\nof two lines,\nb"',
        'q,"print(\n  a, b\n)"',
        '"q\nr\ns",a',
        'q,"a\n\nb,c\n\nd"',
        'q,"a ""b,c""\nd"',
    ],
)
def test_lines_in_cells_that_are_no_rows(read, cells):
    report = Report()
    assert len(read(f"question,answer\n{cells}\nq,a\n", "r.csv", report)) == 2
    assert report.warnings() == []


@pytest.mark.parametrize("last, reason", [('"a4"', "',' expected after '\"'"), ('x",a4', "3 cells")])
def test_rows_within_a_bad_row_are_bad_too(read, last, reason):
    content = f'question,answer\nq1,a1\nq2,"a2\nq3,a3\nq4,{last}\nq5,a5\n'
    said = mistake(read, content, "r.csv")
    assert said.startswith("r.csv, line 3: ") and reason in said
    assert "; a double quote makes lines 3 to 5 one row: close it" in said
    report = Report("skip")
    assert len(read(content, "r.csv", report)) == 2 and report.bad == 3
    assert report.files["r.csv"].reasons[1] == "r.csv, line 4: it was read as a part of line 3"


def test_names_that_are_no_text(read):
    """Names of unused columns count, too: the plan shows them."""
    report = Report()
    assert read(r'{"text": "t", "a\ud800": 1}', report=report) == [{"text": "t"}]
    assert report.lines() == [r"format     rows.jsonl: JSONL, 1 row, text; not used: a\ud800"]
    words = "rows.csv, line 1: the header is not UTF-8 text (invalid continuation byte at byte 5)"
    assert words in mistake(read, "id,r\xe9ponse,text\n1,b,t\n".encode("latin-1"), "rows.csv")


def test_marks_blanks_and_commas_where_they_are_no_mistake(read):
    """Files with a byte order mark, put one after the other; one column, whose cells have commas; one row,
    which is an array itself.
    """
    marked = json.dumps({"text": "t"}).encode("utf-8-sig") + b"\n"
    assert read(marked + b" \n" + marked + marked.rstrip()) == [{"text": "t"}] * 3
    assert read("text\none, two\n\nthree\n", "rows.tsv") == [{"text": "one, two"}, {"text": "three"}]
    assert read(json.dumps({"messages": CHAT}, indent=1), "rows.json") == [{"messages": CHAT}]
    long = "x" * 2_000_000  # more than the format is told from
    assert read([{"text": long}, {"text": "t"}], "rows") == [{"text": long}, {"text": "t"}]


def test_plain_text_is_one_document(read):
    assert read("one\r\n\r\ntwo\n", "book.txt") == [{"text": "one\n\ntwo\n"}]
    assert read('{"no": "data"}\n', "book.txt") == [{"text": '{"no": "data"}\n'}]
    assert read("question,answer\nare two words", "book.txt") == [{"text": "question,answer\nare two words"}]


def test_rows_of_several_layouts(read):
    report = Report()
    rows = read([{"text": "t", "id": 1}, *PAIRS, {"messages": CHAT, "note": "x"}], report=report)
    assert rows == [{"text": "t"}, *CHATS, {"messages": CHAT}]
    assert report.lines() == [
        "format     rows.jsonl: JSONL, 4 rows, question -> answer (2), text (1), messages (1); not used: id,"
        " note"
    ]
    again = SourceFindings.from_json(json.loads(json.dumps(report.files["rows.jsonl"].to_json())))
    assert again == report.files["rows.jsonl"]


def test_a_number_that_is_asked_or_answered_is_its_text(tmp_path):
    rows = {
        '{"instruction": "2+2?", "output": 4}': ("2+2?", "4"),
        '{"instruction": "Halve it.", "input": 5, "output": 2.5}': ("Halve it.\n5", "2.5"),
        '{"question": 0, "answer": -12345678901234567890}': ("0", "-12345678901234567890"),
    }
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    read = [record["messages"] for _, record in read_records(tmp_path / "rows.jsonl")]
    assert [tuple(turn["content"] for turn in turns) for turns in read] == list(rows.values())
    (tmp_path / "rows.jsonl").write_text('{"prompt": 7, "completion": 49}')
    [(_, record)] = read_records(tmp_path / "rows.jsonl")
    assert record == {"prompt": "7", "completion": "49"}


# mistakes


LONG = "x" * 5000
BAD_LINES = cases(r"""
    {  not valid JSON (Expecting property name enclosed in double quotes at column 2)
    {'text': 'a'}                                         not valid JSON
    {"text": "a", }  not valid JSON (a trailing comma at column 13; take it out)
    {"m": [1, 2,], "text": "a"}  not valid JSON (a trailing comma at column 12; take it out)
    {"text": "a"}, {"text": "b"}                          not valid JSON (Extra data at column 14)
    {"text": "a", "b": , }                                not valid JSON (Expecting value at column 20)
    {"text": "a",  not valid JSON (Expecting property name enclosed in double quotes at column 14)
    {"text": "a"} x                                       not valid JSON (Extra data at column 15)
    {"text": "a                                           not valid JSON (Unterminated string
    {"text": "a", "n": NaN}                               not valid JSON (NaN; write null)
    {"text": -Infinity}                                   -Infinity; write null
    {"text": "a", "text": "b"}                            the key 'text' stands twice in one object
    {"m": {"a": 1, "a": 1}, "text": "a"}                  'a' stands twice
    {"text": 5}                                           text must be a non-empty string, got 5
    {"text": "a\u0000b"}                                  text: NUL is no text (character 2)
    {"text": true}                                        got True
    {"text": {"a": 1}}                                    got {'a': 1}
    {"text": "ab\udc00"}                                  half a surrogate pair, '\udc00', is no text
    7                                                     got int
    null                                                  got NoneType
    "text"                                                got str
    []                                                    got list
    {}                                                    got keys []
    {"question": "a"}                                     expected one of
    {"question": "a", "answer": null}                     answer must be a non-empty string, got None
    {"question": "a", "answer": true}                     got True
    {"question": "a", "answer": 1e400}                    got inf
    {"question": "a", "answer": [4]}                      got [4]
    {"question": "", "answer": "a"}                       question must be a non-empty string
    {"question": "a", "answer": "b", "response": "c"}     several layouts
    {"prompt": "a", "completion": [1]}                    completion must be
    {"instruction": "a", "input": [0], "output": "b"}     input must be a non-empty string, got [0]
    {"question": "a", "answer": "b", "history": [["a"]]}  history must be a list of [question, answer] pairs
    {"question": "a", "answer": "b", "system": 1}         system must be
    {"messages": {"role": "user"}}                        non-empty list
    {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}  got one of type 'image_url'
    {"messages": [{"role": "user", "content": ["a"]}]}    got one of type 'str'
    {"txt": "a"}                                          got keys ['txt']
    {"text": "a", "messages": []}                         got keys ['messages', 'text']
    {"text": ""}                                          text must be a non-empty string, got ''
    {"text": null}                                        got None
    {"text": ["a"]}                                       got ['a']
    {"messages": []}                                      messages must be a non-empty list
    {"messages": "a"}                                     non-empty list
    {"messages": ["a"]}                                   got 'a'
    {"messages": [{"role": "narrator", "content": "a"}]}  system | user | assistant
    {"messages": [{"role": "user"}]}                      content
    {"messages": [{"role": ["user"], "content": "a"}]}    system | user | assistant
    {"messages": [{"content": "a"}]}                      role
    {"messages": [{"role": "assistant", "content": 5}]}   'content': 5
    {"messages": [null]}                                  a message must be
    {"messages": [{"role": "assistant", "content": "\ud800"}]}  content: half a surrogate pair
    {"messages": [{"role": "assistant", "content": "a", "reasoning": 5}]}  reasoning must be
    {"messages": [{"role": "assistant", "content": "a", "tool_calls": {}}]}  tool_calls must be a list, got {}
    {"messages": [{"role": "assistant", "content": "a"}], "tools": "f"}  tools must be a list of objects
""")


@pytest.mark.parametrize(
    "line, words",
    [
        *BAD_LINES,
        ('{"text": "a"}, ', "not valid JSON (a trailing comma at column 14; take it out)"),
        ('{"text": "a\tb"}', "Invalid control character at column 12"),
        ('{"text": "a\0b"}', "Invalid control character"),
        ("[" * 100_000, "nested too deeply"),
        ('{"text":' * 100_000, "nested too deeply"),
        ('{"text": ' + "1" * 5000 + "}", "not usable JSON"),
        (b'{"text": "\xc3("}', "not UTF-8 text (invalid continuation byte at byte 11)"),
        ('{"text": "中文"}'.encode("gbk"), "if it is GBK: iconv -f GB18030 -t UTF-8"),
        ('{"text": "é"}'.encode("latin-1"), "Latin-1 or Windows-1252: iconv -f WINDOWS-1252 -t UTF-8"),
        ('{"messages": [{"role": "user", "content": [{"type": "' + LONG + '"}]}]}', "got one of type 'xxx"),
        (f'{{"{LONG}": 1, "{LONG}": 2, "text": "a"}}', "xx... stands twice in one object"),
        ('{"text": "' + "a" * 10_000_000, "not valid JSON (Unterminated"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_bad_row_is_named_or_skipped_and_counted(read, line, words):
    line = line if isinstance(line, bytes) else line.encode()
    content = b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n'
    message = mistake(read, content)
    assert message.startswith("rows.jsonl, line 3: ") and words in message and len(message) < 700
    report = Report("skip")
    assert read(content, report=report) == [{"text": "a"}, {"text": "b"}]
    assert report.lines() == [
        "format     rows.jsonl: JSONL, 2 rows, text",
        "warning    1 row cannot be used and is left out (--on_bad_row skip), such as:",
        f"    {message}",
    ]


def test_skipping_counts_and_shows_the_first_three(read):
    report = Report("skip")
    read("".join(f'{{"text": {n}}}\n' for n in range(5)) + '{"text": "a"}', report=report)
    first = [f"rows.jsonl, line {n + 1}: text must be a non-empty string, got {n}" for n in range(3)]
    assert report.bad == 5 and report.files["rows.jsonl"].reasons == first
    assert (
        report.lines()[1] == "warning    5 rows cannot be used and are left out (--on_bad_row skip), such as:"
    )
    assert "rows.jsonl (JSONL) holds no rows that can be used: all 2 are bad, such as line 1: " in mistake(
        read, "{\n[\n", report=Report("skip")
    )


ROW, UNMARKED = '{"text": "a"}\n', " looks like UTF-16 without a byte order mark; save it as UTF-8"
PACKED = gzip.compress(ROW.encode() * 99, mtime=0)
# name -> contents, and what is said behind the name
UNREADABLE = {
    "rows.json": [
        ('[{"text": "a"},\n {"text": "b"', ", line 2: not valid JSON (Expecting ',' delimiter at column 14)"),
        ('[{"text": "a"}\n {"text": "b"}]', ", line 2: not valid JSON (Expecting ',' at column 2)"),
        ('[{"text": "a"},\n]', ", line 1: not valid JSON (a trailing comma at column 15; take it out)"),
        (
            '[{"text": "a"},\n {"text": "b",\n\n }\n]',
            ", line 2: not valid JSON (a trailing comma at column 14; take it out)",
        ),
        ('{\n"text": "b",\n}', ", line 2: not valid JSON (a trailing comma at column 12; take it out)"),
        ('[{"text": "a"}]\n]', ", line 2: not valid JSON (Extra data at column 1)"),
        ('{"data": [{"text": "a"}],\n "x": }', ", line 2: not valid JSON (Expecting value at column 7)"),
        (
            '[{"text": "a"},\n{"text": "b", "text": "c"}]',
            ", line 2: the key 'text' stands twice in one object",
        ),
        ("[" * 100_000, ", line 1: not usable JSON: nested too deeply"),
        ('{"a": [{"b": 1}],\n"c": [{"d": 1}]}', ", line 1: expected one of"),
        ('[{"text": "a"},\n 5]', ", line 2: expected one of"),
        (b'[{"text": "a"},\n{"text": "\xff"}]', ", line 2: not UTF-8 text (invalid start byte at byte 11)"),
        ("text", ", line 1: not valid JSON (Expecting '[' at column 1)"),
    ],
    "rows.csv": [
        ("question,answer\na,b\nc\n", ", line 3: the row has 1 cells, the header 2"),
        ('question,answer\na,"b\nc\n', ", line 2: not valid CSV (unexpected end of data)"),
        ('question,answer\na,"b"c\n', ", line 2: not valid CSV (',' expected after '\"')"),
        ("question,question\na,b\n", ", line 1: the header has the column 'question' twice"),
        (f"{LONG},{LONG},text\na,b,c\n", f", line 1: the header has the column '{LONG[:99]}"),
        ("a,b\nc,d\n", ", line 2: expected one of"),
        (b"question,answer\na,b\xff\n", ", line 2: not UTF-8 text (invalid start byte at byte 4)"),
        ("question,answer\n", " (CSV) holds no rows"),
        ("", " (CSV) holds no rows"),
    ],
    "book.txt": [
        (b"a\nb \xe9\n", ", line 2: not UTF-8 text (unexpected end of data at byte 3)"),
        (" \n", " (plain text) holds no rows"),
    ],
    "rows.jsonl": [
        (ROW.encode("utf-16-le"), UNMARKED),
        (ROW.encode("utf-16-be"), UNMARKED),
        (ROW.encode("utf-16")[:-1], " can't be read: not UTF-16 text ("),
        (b"\x28\xb5\x2f\xfd....", " is packed (zstd); unpack it, or pack it with gzip"),
        (b"PK\x03\x04....", " is packed (zip); unpack it, or pack it with gzip"),
        (PACKED[:-9], " can't be read: the gzip file is truncated"),
        (PACKED.replace(b"\x08\0", b"\x09\0", 1), " can't be read: Unknown"),
    ],
    "base.pth": [
        (
            b"PK\x03\x04....",
            " is a model or an adapter, no data; a model goes to --load_model, --data_file takes text",
        )
    ],
    "base.gguf": [(b"GGUF....", " is a model or an adapter, no data")],
    "rows.foo": [
        (
            "what is this",
            " is of no known format; it begins with 'what is this'. Expected JSONL, JSON, CSV or TSV with",
        )
    ],
    "rows.bin": [(b"123", " can't be read: binidx data are two files, and .idx or both are absent")],
    "rows.arrow": [
        (b"\xff\xff\xff\xff\x10", " can't be read as Arrow: "),
        (b"ARROW1", " can't be read as Arrow: "),
        (b"", " can't be read as Arrow: "),
    ],
    "rows.parquet": [(b"PAR1", " can't be read as parquet: "), (b"", " can't be read as parquet: ")],
}


@pytest.mark.parametrize(
    "name, content, message",
    [(name, *case) for name, cases in UNREADABLE.items() for case in cases],
    ids=lambda value: str(value)[:40],
)
def test_a_file_that_cannot_be_read_on_is_an_error(read, name, content, message):
    if name.endswith(("parquet", "arrow")):
        pytest.importorskip("pyarrow", reason=ABSENT)
    begin = "data file " if "can't be read" in message else ""
    said = mistake(read, content, name)
    assert said.startswith(f"{begin}{name}{message}") and len(said) < 1000


@pytest.mark.parametrize(
    "name, content",
    [
        ("rows.json", '[{"text": "a"}, {"text": "b"'),
        ("rows.csv", 'text\na\n"b\nc\n'),
        ("book.txt", b"a\nb \xe9\n"),
        ("rows.jsonl.gz", PACKED[:-9]),
    ],
)
def test_what_follows_a_break_is_not_skipped(read, name, content):
    """Nobody can tell which rows are lost."""
    assert mistake(read, content, name, Report("skip")) == mistake(read, content, name)


# tables of other programs


def test_parquet_of_pyarrow(read):
    rows = [{"messages": CHAT, "n": n, "text": None} for n in range(600)] + [
        {"messages": None, "n": 1, "text": "t"}
    ]
    write_parquet(rows, "rows.parquet")
    report = Report()
    got = list(read_records("rows.parquet", report))
    assert [row for _, row in got] == [{"messages": CHAT}] * 600 + [{"text": "t"}]
    assert got[599][0] == "rows.parquet, row 600"
    assert report.lines() == [
        "format     rows.parquet: parquet, 601 rows, messages (600), text (1); not used: n"
    ]


@pytest.mark.parametrize("form", ["stream", "file"])
def test_arrow_of_pyarrow(read, form):
    pyarrow = pytest.importorskip("pyarrow", reason=ABSENT)
    table = pyarrow.Table.from_pylist([{"messages": CHAT, "n": n, "text": None} for n in range(600)])
    with getattr(pyarrow.ipc, f"new_{form}")("rows.arrow", table.schema) as writer:
        writer.write_table(table)
    report = Report()
    got = list(read_records("rows.arrow", report))
    assert [row for _, row in got] == [{"messages": CHAT}] * 600 and got[599][0] == "rows.arrow, row 600"
    assert report.lines() == ["format     rows.arrow: Arrow, 600 rows, messages; not used: n, text"]
    os.rename("rows.arrow", "rows")
    assert len(list(read_records("rows"))) == 600, "the content tells"


@pytest.mark.parametrize("form", ["stream", "file"])
def test_the_bar_of_an_arrow_file_moves(tmp_path, form):
    pyarrow = pytest.importorskip("pyarrow", reason=ABSENT)
    path = str(tmp_path / "rows.arrow")
    table = pyarrow.Table.from_pylist([{"text": "x" * 100} for _ in range(300)])
    with getattr(pyarrow.ipc, f"new_{form}")(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    position = formats_text.Position()
    shares = [position.share() for _ in formats_tables.arrow(path, position)]
    assert shares == sorted(shares) and 0 < shares[0] < 0.5 < 0.9 < shares[-1] <= 1


def test_tables_of_pandas(read, tmp_path):
    pandas = pytest.importorskip("pandas", reason=ABSENT)
    frame = pandas.DataFrame(
        [
            {"question": 'a "b",\n\nc', "answer": " é🙂\r\n", "n": 1.5},
            {"question": "q", "answer": "a", "n": None},
        ]
    )
    expected = [
        {"messages": [turn("user", row["question"]), turn("assistant", row["answer"])]}
        for row in frame.to_dict("records")
    ]
    frame.to_parquet("a.parquet")
    frame.to_csv("b.csv", index=False)
    frame.to_csv("c.tsv", sep="\t")
    frame.to_csv("d.csv.gz", sep=";", encoding="utf-8-sig")
    frame.to_json("e.jsonl", orient="records", lines=True)
    frame.to_json("f.json", orient="records", indent=1)
    for name in os.listdir():
        assert [row for _, row in read_records(name)] == expected, name


def test_data_sets_of_hugging_face(read, monkeypatch):
    datasets = pytest.importorskip("datasets", reason=ABSENT)
    train = datasets.Dataset.from_list([{"messages": CHAT, "id": i} for i in range(300)])
    test = datasets.Dataset.from_list(PAIRS)
    train.save_to_disk("one")
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk("two")
    report = Report()
    rows = list(read_records("one:2,two", report))
    assert [row for _, row in rows] == [{"messages": CHAT}] * 600 and rows[299][0] == "one, row 300"
    assert report.lines() == [
        f"format     {name}: Hugging Face data set, split train, 300 rows, messages; not used: id"
        for name in ("one", "two")
    ]
    assert [row for _, row in read_records("two", reading=Reading(split="test"))] == CHATS
    # Arrow files alone; what map() wrote into their folder is no data
    os.mkdir("alone")
    for file in sources("one")[0].files:
        if file.endswith(".arrow"):
            shutil.copy(file, "alone")
            shutil.copy(file, "alone/cache-0123.arrow")
    assert [row for _, row in read_records("alone")] == [row for _, row in rows[:300]]
    assert all(os.path.isfile(file) for file in sources("two")[0].files) and len(sources("two")[0].files) > 4
    for spec, words in (
        ("two", "two has no split 'dev'; choose one of train, test with --sft_split"),
        ("cut", "cut can't be read by datasets"),
    ):
        os.makedirs("cut", exist_ok=True)
        open("cut/state.json", "w").close()
        with pytest.raises(UserError, match=words):
            list(read_records(spec, reading=Reading(split="dev")))


def test_names_of_data_sets(read, monkeypatch, capsys):
    """A name is what is no path; datasets loads it, and says why when it cannot."""
    asked = []

    def load_dataset(*names, split):
        asked.append((names, split))
        if names[0] == "no/such":
            raise ConnectionError("offline")
        return Table([*PAIRS, *PAIRS][: int(split or 4)])

    class Table(list):
        def __getitem__(self, part):
            return {name: [row[name] for row in list(self)[part]] for name in PAIRS[0]}

    settings = types.SimpleNamespace(HF_HUB_OFFLINE=False)
    module = types.SimpleNamespace(load_dataset=load_dataset, config=settings)
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr(hub, "why_unreachable", lambda name: "")
    assert [row for _, row in read_records("org/some.data", reading=Reading(split="2"))] == CHATS
    assert [row for _, row in read_records("org/data/main:2", reading=Reading(split="2"))] == CHATS
    assert asked == [(("org/some.data",), "2"), (("org/data", "main"), "2")]
    with pytest.raises(
        UserError,
        match=(
            "no/such is no file or folder here, and datasets can't load .* split '2' .*ConnectionError:"
            " offline"
        ),
    ):
        list(read_records("no/such", reading=Reading(split="2")))
    assert "no file or folder no/such here; asking the hub" in capsys.readouterr().err
    os.mkdir("org")
    # mistyped paths, for which nothing is downloaded
    for path in ("org/some.data", "name", "org/data.jsonl", "other/data.jsonl"):
        with pytest.raises(UserError, match=f"data file {path} can't be read: No such file"):
            list(read_records(path))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        UserError, match="the data set no/such needs the package datasets: pip install pyarrow datasets"
    ):
        list(read_records("no/such"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="x.parquet needs the package pyarrow: pip install pyarrow datasets"):
        read(b"PAR1", "x.parquet")


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch):
    """Then datasets looks only into its cache; else it would ask again for half a minute."""
    was_offline = []

    def load_dataset(*names, split):
        was_offline.append(settings.HF_HUB_OFFLINE)
        raise ConnectionError("offline mode")

    settings = types.SimpleNamespace(HF_HUB_OFFLINE=False)
    module = types.SimpleNamespace(load_dataset=load_dataset, config=settings)
    monkeypatch.setitem(sys.modules, "datasets", module)
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked = []

    def repo_info(self, *names, **options):
        asked.append(names)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    with pytest.raises(UserError, match="no/such is no file or folder .*: the hub at .* can't be reached"):
        list(read_records("no/such", reading=Reading(split="2")))
    assert asked == [("no/such",)] and was_offline == [True] and settings.HF_HUB_OFFLINE is False


# several sources


def test_several_files_with_weights(read, tmp_path):
    for name in ("a.jsonl", "b,c.jsonl", "d:2"):
        (tmp_path / name).write_text(json.dumps({"text": name}))
    assert [(s.path, s.weight) for s in sources("a.jsonl")] == [("a.jsonl", 1)]
    assert [(s.path, s.weight) for s in sources("b,c.jsonl")] == [("b,c.jsonl", 1)]
    assert [(s.path, s.weight) for s in sources("a.jsonl:2, d:2:0.5,d:2")] == [
        ("a.jsonl", 2),
        ("d:2", 0.5),
        ("d:2", 1),
    ]
    assert [row for _, row in read_records("a.jsonl:3,d:2")] == [{"text": "a.jsonl"}, {"text": "d:2"}]
    assert len(list(read_records("a.jsonl,a.jsonl:0.5", report := Report()))) == 2
    assert report.lines() == ["format     a.jsonl: JSONL, 1 row, text"]
    os.mkfifo("pipe")
    for spec, words in (
        ("a.jsonl:0", "a weight is a number above 0, such as 2"),
        ("a.jsonl:-1", "got -1"),
        ("a.jsonl:nan", "got nan"),
        ("a.jsonl:inf", "got inf"),
        ("a.jsonl:1.2.3", "got 1.2.3"),
        ("a.jsonl,,d:2", "a name is missing"),
        ("absent.jsonl:2", "data file absent.jsonl can't be read: No such file"),
        ("a.jsonl:two", "a.jsonl:two can't be read"),
        ("*.jsonl", "*.jsonl can't be read: no pattern is expanded; give the folder"),
        ("pipe", "it is no regular file"),
        ("https://h/a.jsonl", "https://h/a.jsonl can't be read: no address is downloaded from"),
    ):
        with pytest.raises(UserError) as caught:
            sources(spec)
        assert words in str(caught.value)


def test_a_folder_is_its_files(read, tmp_path):
    for name in (
        "b.jsonl",
        "a.csv",
        "sub/c.txt.gz",
        ".hidden.jsonl",
        ".git/x.jsonl",
        "README.md",
        "dataset_info.json",
        "config.json",
        "lonely.bin",
    ):
        path = tmp_path / "all" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("gz"):
            path.write_bytes(gzip.compress(b"in c"))
        elif name.endswith("csv"):
            path.write_bytes(b"text\nin a")
        else:
            path.write_bytes(b'{"text": "in b"}')
    report = Report()
    assert [row["text"] for _, row in read_records("all", report)] == ["in a", "in b", "in c"]
    assert (
        report.lines()[3]
        == "folder     all: 3 data files; left out: README.md, config.json, dataset_info.json, lonely.bin"
    )
    assert [s.weight for s in sources("all:0.5")] == [0.5] * 3
    with pytest.raises(UserError, match="folder empty has no data file; expected .jsonl"):
        os.mkdir("empty")
        sources("empty")


def test_a_folder_with_splits(read, tmp_path):
    for name in (
        "data/train-00001-of-00002.jsonl",
        "data/train-00000-of-00002.jsonl",
        "data/test-00000-of-00001.jsonl",
        "trainer.jsonl",
        "validation/x.jsonl",
    ):
        path = tmp_path / "hub" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}))
    notes = []
    names = [os.path.relpath(s.path, "hub") for s in sources("hub", notes=notes)]
    assert names == ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "trainer.jsonl"]
    assert notes == [
        "folder     hub: 3 data files; left out: data/test-00000-of-00001.jsonl, validation/x.jsonl"
    ]
    assert [s.path for s in sources("hub/data", Reading(split="test"))] == [
        "hub/data/test-00000-of-00001.jsonl"
    ]
    with pytest.raises(
        UserError, match="has none for the split dev, but for test, train: choose with --sft_split"
    ):
        sources("hub/data", Reading(split="dev"))


def test_weights_are_kept_exactly_and_drawn_by_the_seed():
    for count, weight in ((7, 1), (7, 2), (100, 0.25), (100, 2.5), (5, 0.3), (0, 2)):
        drawn = sample(count, weight, 1, 0)
        times = np.bincount(drawn, minlength=count)
        assert len(drawn) == math.floor(weight) * count + round(weight % 1 * count)
        assert (np.diff(drawn) >= 0).all()
        assert not count or times.min() >= math.floor(weight) and times.max() <= math.ceil(weight)
        assert sample(count, weight, 1, 0).tolist() == drawn.tolist()
    assert len(sample(3, 0.1, 1, 0)) == len(sample(1, 0.5, 1, 0)) == 1 and len(sample(0, 0.5, 1, 0)) == 0, (
        "no source vanishes"
    )
    one = sample(100, 0.5, 1, 0).tolist()
    assert one != sample(100, 0.5, 2, 0).tolist() and one != sample(100, 0.5, 1, 1).tolist()
    assert one != list(range(0, 100, 2))


# documents


@pytest.fixture(scope="module")
def raw():
    return load_tokenizer("bytes", 256)


def test_documents_of_several_sources(read, tmp_path, monkeypatch, raw):
    """Weights, skipped rows and the report are the same from the cache and without it."""
    (tmp_path / "a.jsonl").write_text(
        "".join(f'{{"text": "a{i:03}"}}\n' for i in range(100)) + '{"text": 1}\n'
    )
    write_binidx("b", [[ord("b"), 48 + i, 0] for i in range(10)] + [[256, 0]], range(12), code=4)
    (tmp_path / "c.csv").write_text("prompt,completion\nc,d\n")
    monkeypatch.setattr(token_cache, "SMALL", 0)
    results = []
    for cache in ("none", str(tmp_path / "cache"), str(tmp_path / "cache")):
        report = Report("skip")
        documents = load_documents("a.jsonl:0.5,b:2,c.csv:3", raw, 8, cache=cache, report=report, seed=5)
        results.append(([(row.ids.tolist(), row.weights.tolist()) for row in documents], report))
    rows = [bytes(ids).decode() for ids, _ in results[0][0]]
    assert rows[50:] == [f"b{i}\0" for i in range(10) for _ in range(2)] + ["cd\0"] * 3
    assert results[0][0][-1][1] == [False, True, True]
    assert rows[:50] == [f"a{i:03}\0" for i in sample(100, 0.5, 5, 0)]
    assert results[0] == results[1] == results[2]
    assert results[0][1].lines() == [
        "format     a.jsonl: JSONL, 100 rows, text",
        "format     b: binidx, 11 rows",
        "format     c.csv: CSV, 1 row, prompt + completion",
        "warning    2 rows cannot be used and are left out (--on_bad_row skip), such as:",
        "    a.jsonl, line 101: text must be a non-empty string, got 1",
        (
            "    b.bin, document 11: id 256 is not in the vocabulary of tokenizer bytes, whose size is 256:"
            " another one made these data; give it as --tokenizer if the model was trained with it (world has"
            " ids up to 65529), else make the data again, from text"
        ),
    ]
    assert rows[:50] != [
        bytes(row.ids).decode()
        for row in load_documents("a.jsonl:0.5", raw, 8, report=Report("skip"), seed=6)
    ]
    for cache in ("none", str(tmp_path / "cache")):
        with pytest.raises(UserError, match="^a.jsonl, line 101: text must be .*; see the flag$"):
            load_documents("a.jsonl", raw, 8, cache=cache, report=Report("stop", "; see the flag"))
        # no flag that leaves rows out mends a wrong tokenizer
        with pytest.raises(
            UserError, match="^b.bin, document 11: id 256 is not .* make the data again, from text$"
        ):
            load_documents("b", raw, 8, cache=cache, report=Report("stop", "; see the flag"))
        write_binidx("d", [[300, 0], [301, 0]], range(3), code=4)
        with pytest.raises(
            UserError, match="d: no row can be used, such as d.bin, document 1: id 300 is not"
        ):
            load_documents("d", raw, 8, cache=cache, report=Report("skip"))
