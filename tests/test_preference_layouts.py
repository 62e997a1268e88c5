"""Pairs of answers and labelled answers: every layout becomes one of four forms, and a wrong row is named
with its file, its line, and what to do.
"""

import gzip
import json
import random

import pytest

from rwkv_miss import UserError
from src.config import Config
from src.data.encode import Encoder
from src.data.formats import (
    LABELS,
    PAIRS,
    SFT,
    Reading,
    Report,
    WrongSetting,
    places_text,
    read_records,
    sources,
)
from src.data.formats.layouts import canonical
from src.data.formats.preference_layouts import preference

from .test_data import assistant, user
from .test_generate import named

BYTES = named("bytes")


@pytest.fixture
def read(tmp_path, monkeypatch):
    """read(rows or text, reading, ...) -> (records, report)."""
    monkeypatch.chdir(tmp_path)

    def run(rows, kind=PAIRS, name="data.jsonl", fields="", on_bad_row="stop"):
        if not isinstance(rows, str):
            rows = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name).write_text(rows)
        report = Report(on_bad_row)
        reading = Reading(tuple(filter(None, fields.split(","))), rows=kind)
        return [record for _, record in read_records(name, report, reading)], report

    return run


def pair(chosen, rejected, **more):
    return {"chosen": chosen, "rejected": rejected, **more}


ASKED = [user("2+2?")]
YES, NO = [assistant("4")], [assistant("5")]
CHAT = pair(YES, NO, messages=ASKED)
RAW = pair("4", "5", prompt="2+2=")
SYSTEM = {"role": "system", "content": "s"}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
RESULT = {"role": "tool", "content": "4"}
FORMS = [
    ("TRL's texts", RAW, RAW),
    ("TRL's conversations", pair(YES, NO, prompt=ASKED), CHAT),
    ("TRL's implicit conversations", pair(ASKED + YES, ASKED + NO), CHAT),
    ("UltraFeedback", pair(ASKED + YES, ASKED + NO, prompt="2+2?", messages=ASKED + YES), CHAT),
    ("TRL's implicit texts", pair("So 2+2 is 4", "So 2+2 is 55"), pair(" 4", " 55", prompt="So 2+2 is")),
    (
        "hh-rlhf",
        pair("\n\nHuman: a\n\nAssistant: No x", "\n\nHuman: a\n\nAssistant: No y"),
        pair(" No x", " No y", prompt="\n\nHuman: a\n\nAssistant:"),
    ),
    ("messages, texts", pair("4", "5", messages=ASKED), CHAT),
    (
        "one message each",
        {
            "conversations": [{"from": "human", "value": "2+2?"}],
            "chosen": {"from": "gpt", "value": "4"},
            "rejected": {"from": "gpt", "value": "5"},
        },
        CHAT,
    ),
    ("a text and messages", pair(YES, "5", prompt="2+2?"), CHAT),
    ("numbers", pair(4, 5, question="2+2?"), CHAT),
    ("RWKV-LM-RLHF", {"prompt": "2+2?", "chosen": "4", "reject": "5"}, CHAT),
    ("orca_dpo_pairs", pair("4", "5", system="s", question="2+2?"), {**CHAT, "messages": [SYSTEM, *ASKED]}),
    (
        "a system column and a prompt",
        pair("4", "5", system="s", prompt="2+2?"),
        {**CHAT, "messages": [SYSTEM, *ASKED]},
    ),
    (
        "instruction, input",
        {"instruction": "Add", "input": "2+2", "chosen_response": "4", "rejected_response": "5"},
        {**CHAT, "messages": [user("Add\n2+2")]},
    ),
    (
        "history",
        pair("4", "5", query="2+2?", history=[["a", "b"]]),
        {**CHAT, "messages": [user("a"), assistant("b"), *ASKED]},
    ),
    (
        "several turns",
        pair("4", "5", messages=[user("a"), assistant("b"), *ASKED]),
        {**CHAT, "messages": [user("a"), assistant("b"), *ASKED]},
    ),
    (
        "tools",
        pair([CALL, RESULT, *YES], NO, messages=ASKED, tools=json.dumps(TOOLS)),
        pair([CALL, RESULT, *YES], NO, messages=ASKED, tools=TOOLS),
    ),
    ("implicit, equal answers", pair(ASKED + YES, ASKED + YES), {**CHAT, "rejected": YES}),
    (
        "implicit, one goes on",
        pair(ASKED + YES, ASKED + YES + ASKED + NO),
        {**CHAT, "rejected": YES + ASKED + NO},
    ),
]


@pytest.mark.parametrize("kind", [PAIRS, LABELS])
@pytest.mark.parametrize(("row", "wanted"), [form[1:] for form in FORMS], ids=[form[0] for form in FORMS])
def test_pairs(read, row, wanted, kind):
    assert read([row], kind)[0] == [wanted]
    # names of columns in any case, other columns, and nulls in place of absent ones
    odd = {name.title(): value for name, value in row.items()} | {"id": 7, "history": row.get("history")}
    if "history" not in row:
        assert read([odd], kind)[0] == [wanted]


GOOD = {"messages": ASKED, "completion": YES, "label": True}
RAW_ANSWER = {"prompt": "2+2=", "completion": "4"}
LABELLED = [
    (
        "TRL's texts",
        {"prompt": "2+2=", "completion": "4", "label": False},
        {"prompt": "2+2=", "completion": "4", "label": False},
    ),
    ("TRL's conversations", {"prompt": ASKED, "completion": YES, "label": True}, GOOD),
    ("messages", {"messages": ASKED, "completion": "4", "label": True}, GOOD),
    (
        "a question",
        {"question": "2+2?", "answer": "4", "label": True, "system": "s"},
        {**GOOD, "messages": [SYSTEM, *ASKED]},
    ),
    (
        "a whole conversation",
        {"messages": [user("a"), assistant("b"), *ASKED, CALL, RESULT, *YES], "label": True},
        {**GOOD, "messages": [user("a"), assistant("b"), *ASKED, CALL, RESULT]},
    ),
    (
        "words in a table",
        {"prompt": "2+2=", "completion": "4", "label": "False"},
        {"prompt": "2+2=", "completion": "4", "label": False},
    ),
    *(
        (repr(label), {"prompt": "2+2=", "completion": "4", "label": label}, {**RAW_ANSWER, "label": good})
        for label, good in ((1, True), (0, False), ("1", True), ("0", False), (1.0, True))
    ),
]


@pytest.mark.parametrize(("row", "wanted"), [f[1:] for f in LABELLED], ids=[f[0] for f in LABELLED])
def test_labelled_answers(read, row, wanted):
    assert read([row], LABELS)[0] == [wanted]


def test_columns_can_be_named(read):
    row = {"q": "2+2?", "good": "4", "bad": "5", "ok": True, "label": 3}
    assert read([row], fields="q,good,bad")[0] == [CHAT]
    assert read([row], LABELS, fields="q,good,bad")[0] == [CHAT]
    assert read([row], LABELS, fields="q,good,ok")[0] == [GOOD]
    assert read([{**row, "ok": 1}], LABELS, fields="q,good,ok")[0] == [GOOD]
    with pytest.raises(UserError, match="label must be true"):  # no second answer
        read([{**row, "label": "yes"}], LABELS, fields="q,good,label")
    assert read([{**RAW, "messages": ASKED}], fields="prompt,chosen,rejected")[0] == [RAW]
    whole = {"w": ASKED + YES, "l": ASKED + NO}
    assert read([whole], fields="w,l")[0] == [CHAT]


def test_supervised_training_on_the_chosen_answers(read):
    """--sft_field prompt,chosen writes them as a loss on preferences does."""
    conversation = {"messages": ASKED + YES}
    for row, fields, wanted in (
        (RAW, "prompt,chosen", {"prompt": "2+2=", "completion": "4"}),
        ({"prompt": "2+2?", "chosen": "4", "reject": "5"}, "prompt,chosen", conversation),
        ({"question": "2+2?", "chosen": "4", "rejected": "5"}, "question,chosen", conversation),
        (CHAT, "messages,chosen", conversation),
        ({"prompt": ASKED, "chosen": "4", "rejected": "5"}, "prompt,chosen", conversation),
        ({"prompt": "2+2?", "chosen": YES, "rejected": NO}, "prompt,chosen", conversation),
        ({"chosen": ASKED + YES, "rejected": ASKED + NO}, "chosen", conversation),
    ):
        assert read([row], SFT, fields=fields)[0] == [wanted]


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"prompt": "a", "completion": "b", "label": False}, "prompt,completion"),
        ({"question": "a", "Answer": "b", "Label": "true"}, "question,Answer"),
        ({"messages": ASKED + YES, "label": 0}, "messages"),
    ],
)
def test_supervised_training_does_not_take_bad_answers_for_good_ones(read, row, fields):
    with pytest.raises(UserError) as error:
        read([row], SFT)
    assert "--loss kto learns" in str(error.value) and f"--sft_field {fields} " in str(error.value)
    assert len(read([row], SFT, fields=fields)[0]) == 1
    # a class, or a label of a whole text, is no judgement of an answer
    assert (
        len(read([{"text": "a", "label": 1}, {**row, **dict.fromkeys(("label", "Label"), 3)}], SFT)[0]) == 2
    )


def test_leaving_out_is_no_advice_where_all_rows_are_alike():
    """A fault of every row of a file is mended by a flag or in the file."""
    for rows, row in (
        (SFT, RAW),
        (PAIRS, {"prompt": "a", "completion": "b", "label": True}),
        (LABELS, {"prompt": "a", "completion": "b", "label": "yes"}),
    ):
        with pytest.raises(WrongSetting):
            canonical(row) if rows == SFT else preference(row, (), rows)


def test_files_of_every_format(read, tmp_path):
    csv = "prompt,chosen,reject\n2+2?,4,5\n2+2?,4,5\n"
    assert read(csv, name="a.csv")[0] == [CHAT, CHAT]
    assert read(csv.replace(",", "\t"), name="a.txt")[0] == [CHAT, CHAT]
    assert read("prompt,completion,label\n2+2=,4,True\n", LABELS, name="l.csv")[0][0]["label"] is True
    assert read(json.dumps([RAW, RAW]), name="a.json")[0] == [RAW, RAW]
    assert read(json.dumps(RAW, indent=1), name="one.json")[0] == [RAW]
    implicit = {"chosen": ASKED + YES, "rejected": ASKED + NO}
    assert read(json.dumps(implicit, indent=1), name="two.json")[0] == [CHAT]
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps(RAW).encode()))
    found = [record for _, record in read_records("b.jsonl.gz", reading=Reading(rows=PAIRS))]
    assert found == [RAW]


def test_tables_of_other_programs(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="PARQUET IS NOT TESTED: pip install pyarrow")
    import pyarrow.parquet

    rows = [{"chosen": ASKED + YES, "rejected": ASKED + NO}] * 2
    pyarrow.parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    found = list(read_records(tmp_path / "p.parquet", reading=Reading(rows=PAIRS)))
    assert [record for _, record in found] == [CHAT, CHAT] and found[1][0].endswith("p.parquet, row 2")


def test_any_row_is_used_or_refused():
    """Nothing but a UserError for rows with wrong values in any place, and pairs that are pairs."""
    rng = random.Random(0)
    texts = ("", "a", "b c", "x\n\nAssistant: y", "\0", "\ud800", " ")
    values = (None, True, 0, 1.5, float("inf"), -(10**400), {}, [], ["a"], [[]], {"role": "assistant"})
    turns = (user("q"), *YES, CALL, RESULT, SYSTEM, {"role": "x"}, {"from": "gpt", "value": "v"})
    rows = [row for _, row, _ in (*FORMS, *LABELLED)]
    names = sorted({name for row in rows for name in row})
    used = 0
    for _ in range(3000):
        row = dict(rng.choice(rows))
        for name in rng.sample(names, rng.randint(0, 2)):
            row[name] = rng.choice((rng.choice(texts), rng.choice(values), rng.choices(turns, k=2)))
        fields = tuple(rng.sample(names, rng.randint(1, 3))) if rng.random() < 0.1 else ()
        try:
            _, record = preference(row, fields, rng.choice((PAIRS, LABELS)))
            documents = Encoder(BYTES).encode(record)
        except UserError:
            continue
        used += 1
        begins = {int(weights.argmax()) for _, weights in documents}
        assert len(begins) == 1 and min(begins) > 0 and len(documents) == (2 if "chosen" in record else 1)
    assert used > 500


def test_the_loss_says_what_rows_are():
    assert [Reading.of(Config(loss=loss)).rows for loss in ("sft", "dpo", "orpo", "kto")] == [
        SFT,
        PAIRS,
        PAIRS,
        LABELS,
    ]


BAD = [
    (PAIRS, {"prompt": "a", "chosen": "b"}, "'chosen' and no rejected answer", "rejected or reject or"),
    (PAIRS, {"prompt": "a", "reject": "b"}, "'reject' and no chosen answer", "chosen or chosen_response"),
    (PAIRS, pair("b", None, prompt="a"), "rejected must be", "got None"),
    (PAIRS, pair(None, NO, prompt=ASKED), "chosen must be a text or a list", "None"),
    (PAIRS, pair("b", "c", prompt=None), "do not share their beginning", "same prompt"),
    (PAIRS, pair(YES + ASKED, NO, prompt=ASKED), "the last message is from user", ""),
    (PAIRS, pair(YES, NO, prompt=ASKED + YES), "prompt ends with the assistant's", ""),
    (PAIRS, pair(ASKED + YES, [user("3+3?"), *NO]), "do not share their beginning", "message 1"),
    (
        PAIRS,
        pair(ASKED + YES + [user("a")] + NO, ASKED + YES + [user("b")] + NO),
        "part at message 3",
        "user's",
    ),
    (PAIRS, pair(ASKED + YES, ASKED + NO, prompt=[SYSTEM]), "prompt is not its beginning", ""),
    (PAIRS, pair([{**YES[0], "weight": 0}], NO, prompt=ASKED), "has the weight 0", "leave it out"),
    (PAIRS, pair([{"role": "wizard", "content": "x"}], NO, prompt=ASKED), "a message must be", "wizard"),
    (PAIRS, pair(["b"], "c", prompt="a"), "a message must be", ""),
    (PAIRS, pair(True, "c", prompt="a"), "chosen must be a non-empty string, got True", ""),
    (PAIRS, pair("b", "c", prompt=""), "prompt must be a non-empty string", ""),
    (
        PAIRS,
        pair("b", "c", prompt="a", messages=ASKED),
        "several columns for one thing, messages, prompt",
        "--sft_field",
    ),
    (PAIRS, {"messages": ASKED + YES}, "--loss sft trains", "expected a pair"),
    (PAIRS, {"text": "a"}, "--loss sft trains", "expected a pair"),
    (PAIRS, {"prompt": "a", "completion": "b", "label": True}, "is for --loss kto", "expected a pair"),
    (PAIRS, {"a": 1}, "expected a pair", "got keys"),
    (PAIRS, ["a"], "expected a pair", "got list"),
    (PAIRS, {"ids": [1]}, "nothing tells a prompt from an answer in tokens", "give text"),
    (LABELS, {"prompt": "a", "completion": "b"}, "--loss sft trains", '"label": true'),
    (LABELS, {"prompt": "a", "completion": "b", "label": 2}, "label must be true", "got 2"),
    (LABELS, {"prompt": "a", "completion": "b", "label": "yes"}, "label must be true", "without quotes"),
    (LABELS, {"prompt": "a", "completion": "b", "label": None}, "label must be true", "got None"),
    (LABELS, {"prompt": "a", "completion": "b", "label": "good"}, "label must be true", "'good'"),
    (LABELS, {"prompt": "a", "label": True}, "expected an answer with a label", ""),
    (LABELS, {"text": "a", "label": True}, "expected an answer with a label", ""),
    (LABELS, {"completion": "a", "label": True}, "expected an answer with a label", ""),
    (LABELS, {"messages": "a b", "label": True}, "nothing tells the prompt from the answer", ""),
    (LABELS, {"messages": YES, "label": True}, "do not share", ""),
    (SFT, RAW, "is for --loss dpo, ipo, orpo, simpo or kto", "--sft_field prompt,chosen"),
    (SFT, {"prompt": ASKED, "chosen": YES, "reject": NO}, "is for --loss dpo", "got keys"),
    (
        SFT,
        {"question": "a", "Chosen": "b", "rejected": "c"},
        "is for --loss dpo",
        "--sft_field question,Chosen ",
    ),
    (SFT, pair(ASKED + YES, NO), "is for --loss dpo", "--sft_field chosen trains"),
]


@pytest.mark.parametrize(("kind", "row", "wrong", "todo"), BAD, ids=range(len(BAD)))
def test_a_wrong_row_is_named_with_what_to_do(read, kind, row, wrong, todo):
    good = {PAIRS: RAW, LABELS: {"prompt": "a", "completion": "b", "label": True}, SFT: {"text": "x"}}[kind]
    with pytest.raises(UserError) as error:
        read([good, row], kind)
    message = str(error.value)
    assert message.startswith("data.jsonl, line 2: ") and wrong in message and todo in message
    assert "\n" not in message and len(message) < 330
    # and with --on_bad_row skip the others are used
    records, report = read([good, row, good], kind, on_bad_row="skip")
    assert records == [good, good] and report.bad == 1 and wrong in report.lines()[-1]


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        (PAIRS, {"prompt": "a", "chosen": "b", "rejected": ""}),
        (PAIRS, {"prompt": "a", "chosen": " \n", "rejected": "b"}),
        (PAIRS, {"prompt": ASKED, "chosen": YES, "rejected": [assistant("")]}),
        (PAIRS, {"question": "a", "chosen": "", "rejected": "b"}),
        (PAIRS, {"chosen": "a\n\nAssistant:", "rejected": "a\n\nAssistant: b"}),
        (LABELS, {"prompt": "a", "completion": "", "label": False}),
    ],
)
def test_an_empty_answer_is_left_out_and_named(read, kind, row):
    good = {"prompt": "a", "completion": "b", "label": True} if kind == LABELS else RAW
    records, report = read([row, good, row], kind)
    assert records == [good] and report.bad == 0
    assert report.lines()[-1] == "left out   2 rows, in which an answer is empty: data.jsonl, line 1, line 3"
    with pytest.raises(
        UserError, match="holds no rows that can be used: 1 row, in which an answer is empty: data.jsonl"
    ):
        read([row], kind)


def test_a_file_is_named_once_for_its_rows():
    assert places_text(4, ["a, b.csv, line 3", "a, b.csv, line 7", "c.txt, row 1"]) == (
        "a, b.csv, line 3, line 7, c.txt, row 1 ..."
    )
    assert places_text(2, ["a.txt", "b.txt"]) == "a.txt, b.txt" and places_text(0, []) == ""


def test_an_empty_cell_is_an_empty_answer(read):
    records, report = read("prompt,chosen,reject\n2+2?,4,5\n2+2?,4,\n2+2?,,5\n", name="a.csv")
    assert records == [CHAT] and report.bad == 0
    assert "left out   2 rows, in which an answer is empty" in report.lines()[-1]
    lines = "prompt,completion,label\na,,true\na,b,\na,b,true\n"
    records, report = read(lines, LABELS, "a.csv", on_bad_row="skip")
    assert len(records) == report.bad == 1 and [*report.files["a.csv"].left_out] == ["an answer is empty"]


def test_thoughts_and_calls_are_no_empty_answers(read):
    rows = [{"prompt": ASKED, "chosen": [CALL], "rejected": [{**NO[0], "content": "", "reasoning": "hm"}]}]
    assert len(read(rows)[0]) == 1


@pytest.mark.parametrize("fields", ["prompt", "prompt,chosen,worse"])
def test_wrong_names_of_columns(read, fields):
    with pytest.raises(UserError, match=f"--sft_field {fields}: "):
        read([RAW], fields=fields)


def test_formats_are_told_by_the_columns_of_pairs(tmp_path):
    (tmp_path / "a.txt").write_text("prompt\tchosen\treject\na\tb\tc\n")
    (tmp_path / "b.txt").write_text(json.dumps({"chosen": "a b", "rejected": "a c"}))
    assert [sources(str(tmp_path / name))[0].format for name in ("a.txt", "b.txt")] == ["TSV", "JSONL"]
