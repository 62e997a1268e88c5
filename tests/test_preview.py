"""The preview: every kind of trouble is found where it is and nowhere else, and the colours are the mask,
token for token.
"""

import json
import re
import subprocess
import sys

import pytest

from scripts import preview
from scripts.preview_lint import MEANINGS
from src.config import Config
from src.data.dataset import load_documents
from src.data.encode import Encoder
from src.data.rwkv_template import MODES
from src.data.templates import load_template
from src.data.tokenizer import load_tokenizer
from src.data.tool_styles import STYLES

from .conftest import ROOT, write_rows
from .test_data import EMPTY_ANSWERS, assistant, user
from .test_templates import CHATML

GOOD = [
    {"text": "A text\n\nof two paragraphs. User: not a turn"},
    {"text": "x"},
    {"messages": [user("line\nline"), assistant("a\n\nb"), user("c"), assistant("<think>\nhm\n</think>\nd")]},
    {"messages": [user("2+2?"), assistant("4")]},
]


@pytest.fixture
def show(tmp_path, capsys):
    """show(rows, *flags) -> (exit code, stdout); the rows are in data.jsonl, and the tokenizer is bytes."""

    def run(rows, *flags, held=()):
        for name, content in (("data", rows), ("held", held)):
            write_rows(tmp_path / f"{name}.jsonl", content)
        code = preview.main(
            [
                *f"--data_file {tmp_path}/data.jsonl --tokenizer bytes".split(),
                *flags,
                *(["--eval_file", str(tmp_path / "held.jsonl")] if held else []),
            ]
        )
        return code, capsys.readouterr().out

    return run


def findings(show, rows, *flags, held=()):
    code, output = show([*GOOD, *rows], "--json", "--strict", *flags, held=held)
    found = json.loads(output)["findings"]
    assert code == bool(found)
    return {
        finding["name"]: (finding["count"], re.search(r"\w+\.jsonl, line \d+", finding["first"])[0])
        for finding in found
    }


def test_good_data(show):
    assert findings(show, []) == {}
    code, output = show(GOOD)
    assert code == 0 and "finding    none" in output


@pytest.mark.parametrize(
    "name, rows, flags",
    [
        ("empty answer", EMPTY_ANSWERS, []),
        ("bad row", [{"words": "a"}], []),
        ("bad row", [{"text": "\ud800"}], []),
        ("bad row", [{"messages": [user("a"), assistant("<think>b")]}], ["--template", "think"]),
        ("blank line", [{"messages": [user("a\n\nb"), assistant("c")]}], []),
        (
            "blank line",
            [{"messages": [{"role": "system", "content": "a\r\n\r\nb"}, user("a"), assistant("c")]}],
            ["--template", "think"],
        ),
        (
            "blank line in text",
            [{"text": "User: a\n\nmore\n\nAssistant: b\n\nmore"}],
            ["--loss_mask", "Assistant:"],
        ),
        ("trained question", [{"text": "User: a\n\nAssistant: b\n\nmore"}], []),
        ("trained question", [{"text": "System✿s✿\nUser✿a✿\nBot✿b✿"}], []),
        ("trained question", [{"text": "### User\na\n\nc\n### Assistant\nb"}], []),
        ("flower", [{"messages": [user("a ✿"), assistant("b")]}], ["--template", "flower"]),
        ("bad row", [{"messages": [user("a"), assistant("b ✿")]}], ["--template", "flower"]),
        ("open thoughts", [{"messages": [user("a"), assistant("so <think> it")]}], []),
        ("broken text", [{"text": "caf\ufffd"}], []),
        ("cut", [{"messages": [user("a"), assistant("b" * 190)]}], ["--ctx_len", "100"]),
        ("duplicate", [{"text": "once"}, {"text": "once"}, GOOD[3]], []),
        ("contradiction", [{"question": "2+2?", "answer": "5"}], []),
        ("contradiction", [{"messages": [*GOOD[2]["messages"][:3], assistant("e")]}], []),
    ],
)
def test_one_kind_of_trouble(show, name, rows, flags):
    found = findings(show, rows, *flags)
    expected = {
        name: (
            len(rows) if name != "duplicate" else 2,
            f"data.jsonl, line {len(GOOD) + (1 if name != 'duplicate' else 2)}",
        )
    }
    if flags[:1] == ["--loss_mask"]:
        assert found.pop("only the end") == (2, "data.jsonl, line 1")  # the texts without an Assistant:
    if flags[:1] == ["--template"]:
        assert found.pop("no thoughts")[0] == 2 + (name != "bad row")
    assert found == expected


def test_troubles_that_come_together(show):
    question = "q" * 200
    found = findings(show, [{"messages": [user(question), assistant("a")]}] * 2, "--ctx_len", "100")
    assert found == {
        "cut": (2, "data.jsonl, line 5"),
        "no target": (2, "data.jsonl, line 5"),
        "duplicate": (1, "data.jsonl, line 6"),
    }
    code, output = show([{"messages": [user(question), assistant("a")]}], "--ctx_len", "100")
    assert "1 conversation of more tokens, cut: 120 tokens lost" in output
    assert (
        "\nfinding    no target, 1 row: no token within --ctx_len is trained, so it teaches nothing; first: "
        in output
    )


def test_what_is_no_contradiction(show):
    """Other thoughts, an answer that is context only, another beginning, running text, other raw prompts."""
    rows = [
        {"messages": [user("2+2?"), assistant("<think>hm</think>4")]},
        {"messages": [user("2+2?"), {**assistant("5"), "weight": 0}, user("No."), assistant("4")]},
        {"messages": [{"role": "system", "content": "s"}, user("2+2?"), assistant("5")]},
        {"messages": [user("2+2?"), assistant("4"), user("3+3?"), assistant("6")]},
        {"messages": [user("2+2?"), assistant("4"), user("4+4?"), assistant("8")]},
        {"text": "y"},
        {"prompt": "2+2?", "completion": " 4"},
        {"prompt": "3+3?", "completion": " 6"},
    ]
    assert findings(show, rows) == {}
    copies = [{"prompt": "2+2?", "completion": " 4"}, {"prompt": "2+2?", "completion": "4"}]
    assert findings(show, [*copies, {"prompt": "2+2?", "completion": "5"}]) == {
        "contradiction": (1, "data.jsonl, line 7")
    }


def test_held_out_data(show):
    held = [
        GOOD[3],
        {"messages": [user("2+2?"), assistant("5")]},
        {"messages": [user("3+3?"), assistant("6")]},
        {"text": "another"},
    ]
    assert findings(show, [], held=held) == {
        "held out": (1, "held.jsonl, line 1"),
        "known prompt": (1, "held.jsonl, line 2"),
    }


def test_every_kind_has_a_test():
    tested = {
        mark.args[1][i][0] for mark in test_one_kind_of_trouble.pytestmark for i in range(len(mark.args[1]))
    }
    together = {"no thoughts", "only the end", "no target", "held out", "known prompt"}
    together |= {"rows in a cell"}  # CSV: in test_formats.py
    together |= {"too long", "bare question", "left out"}  # preferences: below
    # questions: in test_preview_questions.py
    together |= {"nothing asked", "long answer", "unrewarded", "other answer"}
    # asked otherwise is in test_rewritten_turns.py
    assert set(MEANINGS) - tested == {*together, "asked otherwise", "lost thoughts"}


WITHOUT_TAGS = CHATML.replace(".content +", ".content.split('</think>')[-1] +")
WITH_REASONING = CHATML.replace(".content +", ".content + (message.reasoning or '') +")


@pytest.mark.parametrize(
    "source, message, lost",
    [
        (CHATML, {"content": "4", "reasoning_content": "4"}, True),
        (CHATML, {"content": "4", "reasoning": "hm"}, True),
        (CHATML, {"content": "4", "reasoning": "hm", "weight": 0}, False),
        (CHATML, {"content": "<think>\nhm\n</think>\n4"}, False),
        (WITHOUT_TAGS, {"content": "<think>4</think>4"}, True),
        (WITH_REASONING, {"content": "4", "reasoning": "4"}, False),
        (WITH_REASONING, {"content": "4", "reasoning_content": "4"}, True),
    ],
)
def test_thoughts_that_the_template_does_not_write(show, source, message, lost):
    rows = [{"messages": [user("2+2?"), {"role": "assistant", **message}, user("more"), assistant("5")]}]
    code, output = show(rows, "--template", source, "--json")
    found = {finding["name"]: finding["count"] for finding in json.loads(output)["findings"]}
    assert found == ({"lost thoughts": 1} if lost else {})


def test_calls_that_the_template_does_not_write_are_bad_rows_told_once(show):
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    calls = {**assistant(""), "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    row = {"messages": [user("a"), calls], "tools": [tool]}
    code, output = show([GOOD[3], row], "--template", CHATML.replace("if tools", "if false"))
    assert output.count("data.jsonl, line 2") == 1 and "warning" not in output
    assert re.search(r"finding +bad row, 1 row: .*does not write tools; choose another --template", output)


def test_the_figures_are_those_of_the_training(show, tmp_path):
    rows = [*GOOD, {"text": "y" * 77}, {"messages": [user("a"), assistant("b" * 50)]}]
    _, output = show(rows, "--json", "--ctx_len", "30", "--template", "rwkv", "--loss_mask", "all")
    figures = json.loads(output)
    documents = load_documents(
        str(tmp_path / "data.jsonl"), load_tokenizer("bytes", 256), 30, loss_mask="all"
    )
    shown = ["".join(text for text, _ in sample) for sample in figures["samples"]]
    assert len(shown) == 3 and shown[-1] == bytes(documents[len(documents) - 1].ids.tolist()).decode()
    assert (figures["rows"], figures["documents"]) == (6, len(documents))
    assert (
        (figures["split"], figures["cut"], figures["cut_tokens"])
        == (documents.split, documents.cut, documents.cut_tokens)
        == (2, 2, 85)
    )
    assert figures["fill"] == pytest.approx(
        (documents.tokens - len(documents)) / (figures["packed_rows"] * 30)
    )
    assert figures["trained"] == figures["tokens"] and figures["lengths"]["100%"] == 78
    assert figures["lengths"]["0%"] == 2
    path = tmp_path / "data.jsonl"
    _, output = show(rows, "--json", "--ctx_len", "30", "--data_file", f"{path}:2,{path}:0.5")
    figures, documents = (
        json.loads(output),
        load_documents(f"{path}:2,{path}:0.5", load_tokenizer("bytes", 256), 30, seed=Config.random_seed),
    )
    assert figures["rows"] == 12 and figures["documents"] == len(documents) > 18
    assert figures["cut_tokens"] == documents.cut_tokens
    assert figures["fill"] * figures["packed_rows"] * 30 == documents.tokens - len(documents)


def test_what_is_cut_is_what_a_run_cuts(show, tmp_path):
    """To the token: a conversation that just fits, and one whose first trained token just does not."""
    rows = [{"messages": [user(asked), assistant("b" * n)]} for asked, n in (("a", 1), ("c", 2), ("d", 40))]
    length = len(Encoder(load_tokenizer("bytes", 256)).encode(rows[0])[0][0])
    asked = len("User: a\n\nAssistant:")
    for ctx_len, cut in ((length - 1, 2), (length - 2, 3), (asked, 3), (asked - 1, 3)):
        _, output = show(rows, "--json", "--ctx_len", str(ctx_len))
        found = {finding["name"]: finding["count"] for finding in json.loads(output)["findings"]}
        assert found == {"cut": cut} | ({"no target": 3} if ctx_len < asked else {})
        if ctx_len >= asked:
            documents = load_documents(str(tmp_path / "data.jsonl"), load_tokenizer("bytes", 256), ctx_len)
            assert documents.cut == cut and documents.target_counts.all()


def test_weights_are_shown(show, monkeypatch):
    rows = [{"messages": [user("a"), assistant("<think>b</think>c") | {"weight": 3}]}]
    flags = ["--template", "rwkv", "--think_weight", "0.1", "--prompt_weight", "0.05"]
    _, output = show(rows, *flags)
    assert "prompts times 0.05" in output and "thoughts times 0.1" in output
    assert "| «User: a\n    | \n    | Assistant:»×0.05« <think>»×3«\n" in output
    assert "»×3«\n    | b\n    | »×0.3«</think>\n    | c␀»×3\n" in output
    assert "weights    0.05 on 19 tokens, 0.3 on 3 tokens, 3 on " in output
    _, output = show(rows, *flags, "--json")
    weights = json.loads(output)["weights"]
    assert weights.keys() == {"0.05", "0.3", "3"} and sum(weights.values()) == json.loads(output)["trained"]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    _, output = show(rows, *flags)
    codes = {code for code, _ in ESCAPE.findall(output)}
    assert {"30;43", "30;45"} <= codes and not codes & {"30;42", "30;102"}


ESCAPE = re.compile(r"\x1b\[([\d;]+)m(.*?)\x1b\[0m")


def test_the_colours_are_the_mask_token_for_token(show, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    turns = [user("你好 friend"), assistant("🙂 well\nthen"), user("b"), assistant("c")]
    world, template = load_tokenizer("world", 65536), load_template("think-short")
    _, output = show([{"messages": turns}], "--tokenizer", "world", "--template", "think-short")
    lines = [line.removeprefix("    | ") for line in output.splitlines() if line.startswith("    | ")]
    tokens = [(code in ("30;42", "30;102"), text) for code, text in ESCAPE.findall("\n".join(lines)) if text]
    [(ids, trained)] = Encoder(world, template).encode({"messages": turns})
    wanted, decoder = [], world.decoder()
    for token, flag in zip(ids[:-1].tolist(), trained.tolist()):
        text = decoder.push(token).replace("\n", "⏎\n")
        wanted += [(flag, part) for part in text.split("\n") if part]
    assert tokens == [*wanted, (True, "␃")]
    codes = [code for code, text in ESCAPE.findall("\n".join(lines)) if text != "⏎"]
    assert all(a != b for a, b in zip(codes, codes[1:])), "neighbours must differ"
    assert "".join(lines).count("⏎") == sum(text.count("\n") for text, _ in template.segments(turns))
    _, output = show([{"text": "é" * 400}], "--ctx_len", "1024")
    assert ESCAPE.sub(r"\2", output.splitlines()[-2]) == f"    | {'é' * 300} ... (801 tokens)"


def test_without_colours(show, monkeypatch):
    for setting in ("pipe", "NO_COLOR", "--plain"):
        monkeypatch.setattr("sys.stdout.isatty", lambda setting=setting: setting != "pipe")
        monkeypatch.setenv("NO_COLOR", "1" if setting == "NO_COLOR" else "")
        _, output = show(GOOD, "--samples", "9", *(["--plain"] if setting == "--plain" else []))
        assert "\x1b" not in output and "    | Assistant:« 4␀»" in output and output.count("\ndocument ") == 4
    assert "tokens, " not in show(GOOD, "--samples", "0")[1]


def test_flags_and_settings_of_a_run(show, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("ctx_len: 7\nloss_mask: all\nload_model: ''\npeft: miss\n")
    _, output = show(
        GOOD, *f"--config {tmp_path}/config.yaml --micro_bsz 3 --epoch_save 1 --samples 1".split()
    )
    assert "ctx_len    7:" in output and "loss on everything" in output
    for flags, words in (
        (["--ctx_len", "-1"], "must not be negative"),
        (["--loss_mask", "se"], "START...END"),
        (["--samples", "-1"], "negative"),
        (["--template", "absent"], "cannot read"),
    ):
        with pytest.raises(SystemExit) as caught:
            show(GOOD, *flags)
        assert caught.value.code == 2 and words in capsys.readouterr().err


def test_without_data_every_form_is_shown(capsys, tmp_path):
    """Questions and trained texts of all modes, or of the one that is chosen."""

    def forms(*flags):
        assert preview.main([*flags, "--plain"]) == 0
        output = capsys.readouterr().out
        return output, re.findall(r"(?m)^(template [\w-]+|tools, --tool_style \w+)", output)

    output, titles = forms("--tokenizer", "world")
    assert titles == [
        "template rwkv",
        *(f"template {name}" for name in MODES),
        *(f"tools, --tool_style {style}" for style in STYLES),
    ]
    blocks = re.split(r"(?m)^(?:template|tools, --tool_style) ", output)
    for block in blocks[1:-1]:
        mode = MODES.get(re.match(r"[\w-]+", block)[0])
        if mode:  # every answer stands between the marks, and begins right after the opening
            asked = f"{mode.form.ask}{mode.opening}".replace("\n", "\n    | ")
            assert block.count("«") == block.count("»") == block.count(f"{asked}«") == 2, block
    output, titles = forms("--template", "think-short", "--tokenizer", "bytes")
    assert titles == ["template think-short", *(f"tools, --tool_style {style}" for style in STYLES)]
    assert "User: 6 times 7? (think a bit)" in output and "top_p 0.76" in output
    _, titles = forms("--template", "flower", "--tool_style", "signatures")
    assert titles == ["template flower", "tools, --tool_style signatures"]
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}")
    output, _ = forms("--template", str(tmp_path / "t.jinja"))
    assert "system:Be brief.;user:6 times 7?;" in output and "«" in output
    with pytest.raises(SystemExit):
        forms("--json")
    assert "give --data_file" in capsys.readouterr().err


def test_the_preview_imports_no_trainer():
    code = (
        "import sys, scripts.preview; print({'lightning', 'pytorch_lightning', 'deepspeed', 'matplotlib',"
        " 'jinja2.sandbox'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stdout + done.stderr


def test_rows_are_as_long_as_a_run_would_choose(show):
    """Nothing is cut that a run would not cut, and what would be is."""
    long = [{"prompt": "p", "completion": "c" * 5000}]
    _, output = show([*GOOD, *long])
    assert "ctx_len    4096:" in output and "finding    cut" in output
    _, output = show([*GOOD, *long], "--chunk_ctx", "64")
    assert "ctx_len    8192:" in output and "finding    cut" not in output


# preferences

PAIRS = [
    {"messages": [user("a"), assistant("b"), user("c")], "chosen": "d", "rejected": "e e"},
    {"messages": [user("f")], "chosen": "same", "rejected": "same"},
    {"messages": [user("f")], "chosen": "", "rejected": "g"},
    {"messages": [user("c")], "chosen": "hh", "rejected": "i"},
    {"messages": [user("c")], "chosen": "i", "rejected": "hh"},
    {"messages": [user("x" * 90)], "chosen": "j", "rejected": "k"},
    {"messages": [user("c")], "chosen": "i", "rejected": "hh"},
    {"prompt": "no answer"},
]


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_what_is_found_in_preferences(show, loss):
    code, output = show(PAIRS, "--json", "--loss", loss, "--ctx_len", "90")
    found = json.loads(output)
    assert found["left_out"] == {"both answers are the same": 1, "an answer is empty": 1} and code == 0
    assert found["too_long"] == (1 if loss == "dpo" else 2) and found["rows"] == 5
    assert (found["chosen"], found["rejected"], found["documents"]) == (4, 4, 4 if loss == "dpo" else 8)
    assert found["chosen_length"] == 3.0 and found["rejected_length"] == 4.0  # with a space and the end
    assert found.get("chosen_longer") == (0.25 if loss == "dpo" else None)
    wanted = {"bad row": (1, 8), "too long": (1, 6), "contradiction": (2, 5), "duplicate": (1, 7)}
    assert {f["name"]: f["count"] for f in found["findings"]} == {name: n for name, (n, _) in wanted.items()}
    for finding in found["findings"]:
        assert f"data.jsonl, line {wanted[finding['name']][1]}" in finding["first"] and finding["meaning"]
    # a rejected answer has negative weights
    signs = [[(weight > 0) - (weight < 0) for _, weight in sample] for sample in found["samples"]]
    assert signs[0] == ([0, 1, -1] if loss == "dpo" else [0, 1]) and len(signs) == 3


def test_half_of_the_pairs_left_out_is_a_finding(show):
    good, empty, equal = PAIRS[0], {**PAIRS[0], "chosen": ""}, {**PAIRS[0], "chosen": "x", "rejected": "x"}
    for rows, count in (([good, equal, empty], 2), ([good, equal], 1), ([good, PAIRS[3], equal], None)):
        _, output = show(rows, "--json", "--loss", "dpo")
        found = {f["name"]: f for f in json.loads(output)["findings"]}
        assert found.keys() == ({"left out"} if count else set())
        if count:
            assert found["left out"]["count"] == count
            assert re.search(r"data.jsonl, line [23]$", found["left out"]["first"])


BARE = {
    "What is 2+2?": ("4", True),
    "2+2等于几？": ("4", True),
    "Write a poem": ("Roses are red", True),
    "Sort the letters.": ("abc", True),
    "User: 2+2?\n\nAssistant:": (" 4", False),
    "User: 2+2?\n\nAssistant": (": 4", False),
    "<|im_start|>user\nwhy?": ("b", False),
    "2+2=": ("4", False),
    "The sky is": (" blue", False),
    "天空是": ("蓝色的", False),
}


def test_a_question_among_raw_prompts_is_a_finding(show):
    for prompt, (answer, bare) in BARE.items():
        pair = {"prompt": prompt, "chosen": answer, "rejected": answer + "!"}
        labelled = {"prompt": prompt, "completion": answer, "label": True}
        for row, loss in ((pair, "dpo"), (labelled, "kto")):
            _, output = show([row], "--json", "--loss", loss)
            assert [f["name"] for f in json.loads(output)["findings"]] == ["bare question"] * bare, row
    question = {"question": "What is 2+2?", "chosen": "4", "rejected": "5"}
    assert "finding    none" in show([question], "--loss", "dpo")[1]


def test_a_guessed_tokenizer_is_said(show):
    assert "tokenizer world (a guess; with --load_model it " in show(GOOD, "--tokenizer", "auto")[1]
    assert "a guess" not in show(GOOD)[1]


def test_a_held_out_pair_has_a_prompt_of_its_own(show):
    held = [
        PAIRS[0],
        {**PAIRS[3], "rejected": "other"},
        {"messages": [user("new")], "chosen": "1", "rejected": "2"},
    ]
    _, output = show([PAIRS[0], PAIRS[3]], "--json", "--loss", "dpo", held=held)
    assert {f["name"]: f["count"] for f in json.loads(output)["findings"]} == {
        "held out": 1,
        "known prompt": 1,
    }


def test_a_pair_is_shown_with_what_is_compared(show):
    code, output = show(PAIRS[:6], "--plain", "--samples", "1", "--loss", "dpo", "--ctx_len", "90")
    assert code == 0
    shown = """\
pair 1 of 3, 90 tokens of a row; the prompt:
    | User: a
    | 
    | Assistant: b
    | 
    | User: c
    | 
    | Assistant:
  chosen, 3 tokens compared:
    |« d␀»
  rejected, 5 tokens compared:
    |« e e␀»
"""
    assert shown.replace("|«", "| «") in output
    for line in (
        "pairs      3; a chosen answer has 3 tokens in the median, a rejected one 4; the chosen one is longer"
        " in 33% of the pairs, shorter in 67%",
        "left out   1 row, in which an answer is empty: ",
        "left out   1 pair of more than --ctx_len 90 tokens, both answers counted: ",
        "template   rwkv, loss on the answers;",
    ):
        assert f"\n{line}" in output
    _, output = show([{"prompt": "a", "completion": "b", "label": False}], "--samples", "1", "--loss", "kto")
    assert "answer 1 of 1, 2 tokens of a row; the prompt:\n    | a\n" in output
    assert "\n  completion, label false, 2 tokens compared:\n" in output
    assert "\nanswers    1 to avoid, of 2 tokens in the median\n" in output
    assert "\nwarning    all 1 answer have label false: nothing says what to prefer, " in output


def test_a_pair_under_sft_says_what_to_do(show, capsys):
    with pytest.raises(SystemExit) as stopped:
        show(PAIRS[:1])
    assert stopped.value.code == 2
    assert "is for --loss dpo, ipo, orpo, simpo or kto" in capsys.readouterr().err
