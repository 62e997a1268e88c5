"""From messages to text: RWKV's modes and the user's Jinja, what is trained of them, and that a chat asks in
the tokens of the training.
"""

import json
import pickle

import jinja2
import numpy as np
import pytest

import rwkv_miss
from demo import chat
from rwkv_miss import UserError
from src.chat import program
from src.data.dataset import load, load_documents
from src.data.encode import Encoder
from src.data.loss_mask import marked, record_segments
from src.data.questions import read_questions
from src.data.rwkv_template import DEFAULT, MODES, RwkvTemplate
from src.data.templates import answer_text, choose_template, from_record, load_template, recorded_template
from src.data.tokenizer import load_tokenizer
from src.inference.conversation import Conversation
from src.inference.sampling import GREEDY
from src.model import RWKV

from .answering import Scripted, scripted
from .conftest import make_arch, random_tensors
from .tables import cases
from .test_data import assistant, user, whole_blank_line_tokenizer
from .test_generate import named, without_adapters


def system(text):
    return {"role": "system", "content": text}


def thinking(thoughts, text):
    return {"role": "assistant", "content": text, "reasoning_content": thoughts}


def calling(name, arguments):
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def shown(segments):
    """Pieces parted by |, the trained ones between < and >."""
    return "|".join(f"<{text}>" if trained else text for text, trained in segments)


# RWKV's own


HI, CLOSED = [user("hi"), assistant("yo")], "\nhm\n</think>\nyo>"
THOUGHT, SPACED = [user("hi"), thinking("hm", "yo")], [user("hi "), thinking("hm", "yo")]


@pytest.mark.parametrize(
    "name, messages, expected",
    [
        ("rwkv", [user("hi"), thinking(" hm\n", "yo")], "User: hi\n\nAssistant:|< <think>" + CLOSED),
        (
            "rwkv",
            [user("hi"), assistant("<think>hm</think>\n\nyo")],
            "User: hi\n\nAssistant:|< <think>" + CLOSED,
        ),
        ("rwkv", [user("hi"), assistant("<think> is a tag")], "User: hi\n\nAssistant:|< <think> is a tag>"),
        ("think", THOUGHT, "User: hi\n\nAssistant: <think|<>" + CLOSED),
        (
            "think",
            [user("hi"), assistant("<think>" + CLOSED[:-1])],
            "User: hi\n\nAssistant: <think|<>" + CLOSED,
        ),
        (
            "think",
            [user("hi"), {**assistant("yo"), "reasoning": "hm"}],
            "User: hi\n\nAssistant: <think|<>" + CLOSED,
        ),
        ("think", HI, "User: hi\n\nAssistant: <think|<>\n</think>\nyo>"),
        ("think-normal", SPACED, "User: hi (think)\n\nAssistant: <think|<>" + CLOSED),
        (
            "think-short",
            [system("s"), *THOUGHT],
            "System: s\n\nUser: hi (think a bit)\n\nAssistant: <think|<>" + CLOSED,
        ),
        (
            "think-long",
            [user("a"), thinking("b", "c"), user("d"), thinking("e", "f")],
            "User: a (think a lot)\n\nAssistant: <think|<>\nb\n</think>\nc>|<\n\n>|"
            "User: d (think a lot)\n\nAssistant: <think|<>\ne\n</think>\nf>",
        ),
        ("think-normal-2025", SPACED, "User: hi think\n\nAssistant: <think|<>" + CLOSED),
        ("think-short-2025", HI, "User: hi think a bit\n\nAssistant: <think|<>\n</think>\nyo>"),
        ("think-long-2025", THOUGHT, "User: hi think a lot\n\nAssistant: <think|<>" + CLOSED),
        ("fake-think", HI, "User: hi\n\nAssistant: <think>\n</think|<>\nyo>"),
        ("fake-think-compact", HI, "User: hi\n\nAssistant: <think></think|<>\nyo>"),
        (
            "rwkv",
            [
                user("2+2"),
                calling("add", '{"a": [2, "é"]}'),
                {"role": "tool", "content": "4\n\n\nok"},
                assistant("4"),
            ],
            'User: 2+2\n\nAssistant:|< <tool_call>\n{"name": "add", "arguments": {"a": [2, "é"]}}\n'
            "</tool_call>>|<\n\n>|Tool: 4\nok\n\nAssistant:|< 4>",
        ),
        (
            "think-chinese",
            [user("hi"), thinking("嗯，他", "yo"), user("c"), thinking("好", "d"), user("e"), assistant("f")],
            "User: hi\n\nAssistant: <think>嗯|<，他\n</think>\nyo>|<\n\n>|User: c\n\nAssistant:"
            " <think>嗯|<，好\n</think>\nd>|<\n\n>|User: e\n\nAssistant: <think>嗯|<\n</think>\nf>",
        ),
        (
            "flower",
            [system("s"), user("a\n\n✿b"), thinking("b", "c\n\nd"), user("e"), assistant("f")],
            "System✿s✿\nUser✿a\n❀b✿\nBot✿<think|<>\nb\n</think>\nc\n\nd>|<✿>|\nUser✿e✿\nBot✿<think|<>\n"
            "</think>\nf>|<✿>",
        ),
        (
            "flower-fake-think",
            [user("a"), {**assistant("b"), "weight": 0}, {"role": "tool", "content": "c"}, assistant("d")],
            "User✿a✿\nBot✿<think></think|>\nb|✿|\nTool✿c✿\nBot✿<think></think|<>\nd>|<✿>",
        ),
        (
            "rwkv",
            [user("a"), {**assistant("b"), "weight": 0}, user("c"), {**assistant("d"), "weight": 1}],
            "User: a\n\nAssistant:| b|\n\n|User: c\n\nAssistant:|< d>",
        ),
    ],
)
def test_modes_of_the_g1_models(name, messages, expected):
    assert shown(load_template(name).segments(messages)) == expected


def test_a_prompt_ends_where_the_answer_begins():
    turns = [user("a"), assistant("b"), user("c")]
    for name, (after, opening, _) in MODES.items():
        segments = load_template(name).segments(turns, ask=True)
        plain = f"User: c{after}\n\nAssistant:{opening}"
        assert segments[-1] == (f"\nUser✿c✿\nBot✿{opening}" if "flower" in name else plain, False)
        answered = load_template(name).segments([*turns, assistant("d")])
        assert answered[: len(segments)] == segments
        assert load_template(name).next_turn(turns[:2], turns[2:]) == [piece for piece, _ in segments[-2:]]
    assert DEFAULT.segments([], ask=True) == [("Assistant:", False)]
    assert shown(DEFAULT.segments(turns[:2], ask=True)) == "User: a\n\nAssistant:|< b>|<\n\n>|Assistant:"
    assert (
        shown(DEFAULT.segments([user("a")], [{"name": "é"}], ask=True))
        == 'System: <tools>\n{"name": "é"}\n</tools>\n\nUser: a\n\nAssistant:'
    )


@pytest.mark.parametrize(
    "name, message, words",
    [
        ("think", assistant("<think>hm"), "an answer opens <think> and never closes it: '<think>hm'"),
        ("think", thinking("a", "<think>b</think>c"), "has its thoughts twice, such as in reasoning_content"),
        ("fake-think", assistant("<think>a</think><think>b</think>c"), "an answer has its thoughts twice"),
        ("fake-think", THOUGHT[1], "thoughts, for which --template fake-think has no place; use think"),
        ("rwkv", calling("f", "{"), "a tool call must be"),
        ("rwkv", {"role": "assistant", "content": "", "tool_calls": ["f"]}, "a tool call must be"),
        ("flower", assistant("a ✿"), "an answer holds ✿, which ends a turn in --template flower"),
        ("flower", thinking("✿", "a"), "an answer holds ✿"),
        ("flower-fake-think", thinking("hm", "a"), "thoughts, for which --template flower-fake-think has no"),
    ],
)
def test_answers_that_a_mode_has_no_form_for(name, message, words):
    with pytest.raises(UserError) as caught:
        load_template(name).segments([user("hi"), message])
    assert words in str(caught.value)


def test_what_an_answer_says():
    for name, said in (
        ("rwkv", " yo"),
        ("rwkv", " <think>\nhm\n</think>\nyo\n\nUser: more"),
        ("think", ">\nhm\n</think>\nyo"),
        ("fake-think", ">\nyo "),
        ("fake-think-compact", ">\nyo"),
        ("think-chinese", "，\n\nhm</think>\nyo\n\nUser: more"),
        ("flower", ">\nhm\n\nhm</think>\nyo✿\nUser✿more"),
        ("flower-fake-think", ">\nyo✿"),
    ):
        template = load_template(name)
        assert answer_text(said, template, template.opening) == "yo"


# Jinja

CHATML = """\
{%- if tools %}
tools={{ tools | tojson }}
{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif -%}
"""
MARKED = CHATML.replace(
    "+ message.content + '<|im_end|>\\n' }}",
    """}}
{%- if message.role == 'assistant' -%}
{% generation %}{{ message.content }}<|im_end|>
{% endgeneration %}
{%- else -%}
{{ message.content + '<|im_end|>\\n' }}
{%- endif -%}
""",
)
SHORT = (
    "{% for m in messages %}{{ m.role[0] }}: {{ m.content | trim }}\n{% endfor %}{% if add_generation_prompt"
    " %}a:{% endif %}"
)
WITH_EOS = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{%"
    " endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
# as those are that take the thoughts out of all answers but the last
FORGETFUL = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content if loop.last or m.role == 'user' else '-' }};{% endfor"
    " %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "generation": MARKED, "short": SHORT, "eos": WITH_EOS}
TURNS = [system("s é"), user(" 1\n\n2"), assistant("x\n\ny"), user("🙂"), assistant(".")]
TURNS += [user("3"), assistant("z")]


@pytest.fixture
def jinja(tmp_path):
    def make(source, eos=""):
        (tmp_path / "template.jinja").write_text(source, encoding="utf-8")
        return load_template(str(tmp_path / "template.jinja"), eos)

    return make


def reference(source, **values):
    """Render with jinja2 alone, with the settings that Hugging Face has."""
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    return environment.from_string(source).render(bos_token="", **values)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("count", range(1, 8))
def test_the_pieces_are_the_text_that_jinja_makes(jinja, name, count):
    template = jinja(TEMPLATES[name], "</s>")
    for ask in (False, True):
        segments = template.segments(TURNS[:count], ask=ask)
        assert "".join(text for text, _ in segments) == reference(
            TEMPLATES[name.replace("generation", "chatml")],
            messages=TURNS[:count],
            add_generation_prompt=ask,
            eos_token="</s>",
        )
        assert all(text for text, _ in segments)


def test_hugging_face_marks_the_same_tokens(jinja):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    (whole,), (spans,) = utils.render_jinja_template(
        [TURNS], chat_template=MARKED, return_assistant_tokens_mask=True, bos_token="", eos_token=""
    )
    segments = jinja(MARKED).segments(TURNS)
    assert "".join(text for text, _ in segments) == whole
    ours = [flag for text, flag in segments for _ in text]
    assert ours == [any(begin <= place < end for begin, end in spans) for place in range(len(whole))]
    # without the marks the same turns are found
    assert jinja(CHATML).segments(TURNS) == segments


WITH_MARKS = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n|<b>|<<|im_end|>\n>"


@pytest.mark.parametrize(
    "name, stop, expected",
    [
        *((name, "<|im_end|>", WITH_MARKS) for name in ("chatml", "generation")),
        ("short", "\nu:", "u: a\na:|< b>|<\n>"),
        ("eos", "</s>", "[user]a[assistant]|<b>|<</s>>"),
    ],
)
def test_the_answer_and_the_end_of_its_turn_are_trained(jinja, name, stop, expected):
    template = jinja(TEMPLATES[name], "</s>")
    assert shown(template.segments([user("a"), assistant("b")])) == expected and template.stops == (stop,)
    context = template.segments([user("a"), {**assistant("b"), "weight": 0}, user("c"), assistant("d")])
    assert [text.strip() for text, trained in context if trained] == ["d", template.turn_end.strip()]


def test_alpaca_is_what_the_alpaca_prompt_is():
    template = load_template("alpaca")
    asked = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the"
        " request.\n\n### Instruction:\n{}\n\n### Response:"
    )
    assert shown(template.segments([user("a"), assistant("b")])) == f"{asked.format('a')}|<b>"
    turns = [user("a"), assistant("b"), user("c")]
    text = "".join(part for part, _ in template.segments(turns, ask=True))
    assert text == f"{asked.format('a')}b\n\n### Instruction:\nc\n\n### Response:"
    assert template.stops == ("\n\n### Instruction:",)
    assert shown(template.segments([system("s"), user("a")], ask=True)).startswith("s\n\n### Instruction:\na")
    assert "{%" in template.record, "so that any version can read it"
    with pytest.raises(UserError, match="no form for a turn of tool"):
        template.segments([user("a"), {"role": "tool", "content": "1"}, assistant("b")])


def test_a_block_without_the_end_of_the_turn_trains_just_that(jinja):
    template = jinja(MARKED.replace("<|im_end|>\n{% endgeneration %}", "{% endgeneration %}\n<|im_end|>\n"))
    turns = [user("a"), assistant("b"), user("c"), assistant("d")]
    assert [text for text, trained in template.segments(turns) if trained] == ["b", "d"]


def test_an_answer_in_several_blocks_has_its_weight_in_all_of_them(jinja):
    template = jinja(
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'user' %}{{ m.content }}{% else %}{% generation"
        " %}({% endgeneration %}-{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    turns = [user("a"), assistant("b"), user("c"), assistant("d")]
    whole = "[user]a|[assistant]|<(>|-|<b>|[user]c|[assistant]|<(>|-|<d>"
    assert shown(template.segments(turns)) == whole
    context = template.segments([*turns[:3], {**turns[3], "weight": 0}])
    assert shown(context) == whole.replace("<(>|-|<d>", "(|-|d")


CALL = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
CALLS = "(message.tool_calls | tojson if message.tool_calls else '') + message.content +"
FORGOTTEN = CALLS.replace(
    "if message.tool_calls", "if message.tool_calls and loop.last"
)  # in earlier turns, as thoughts often are


@pytest.mark.parametrize(
    "source, calls, tools, words",
    [
        (CHATML, [CALL], None, "does not write tool_calls; choose another --template"),
        (CHATML.replace("if tools", "if false"), [], [{"name": "f"}], "does not write tools;"),
        (CHATML.replace("if tools", "if tools and tools.x.y"), [], [{"name": "f"}], "has no attribute"),
        (CHATML.replace("message.content +", CALLS), [CALL], [{"name": "f"}], None),
        (CHATML.replace("message.content +", FORGOTTEN), [CALL], [{"name": "f"}], None),
        (
            CHATML.replace("message.content +", CALLS),
            [CALL, {"function": {"name": "f", "arguments": "{not json"}}],
            None,
            "a tool call must be",
        ),
    ],
)
def test_no_tool_and_no_call_is_lost_without_a_word(jinja, tmp_path, source, calls, tools, words):
    """In training and in evaluation: an error with file and row."""
    called = {"role": "assistant", "content": None, "tool_calls": calls} if calls else assistant("b")
    row = {"messages": [user("a"), called, user("c"), assistant("d")], **({"tools": tools} if tools else {})}
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": [user("a"), assistant("b")]}) + "\n" + json.dumps(row) + "\n")
    template, tokenizer = jinja(source), load_tokenizer("bytes", 65536)
    if not words:
        assert len(read_questions(path, template)) == 2
        documents = load_documents(str(path), tokenizer, 10**6, template)
        assert sum('"arguments"' in tokenizer.decode(d.ids[d.weights > 0].tolist()) for d in documents) == 1
        return
    for read in (
        lambda: load_documents(str(path), tokenizer, 10**6, template),
        lambda: read_questions(path, template),
    ):
        with pytest.raises(UserError) as caught:
            read()
        assert "data.jsonl, line 2: " in str(caught.value) and words in str(caught.value)


def test_tools_and_a_document_end(jinja, tmp_path):
    template = jinja(CHATML)
    assert template.segments([user("a")], [{"n": "<é>"}], ask=True)[0].text.startswith(
        'tools=[{"n": "<é>"}]\n<|im_start|>user'
    )
    # the template ends the last answer with the token that ends a document: there is one, not two
    tokenizer = whole_blank_line_tokenizer(tmp_path)
    template = load_template(WITH_EOS, tokenizer.decode(tokenizer.eod))
    [(ids, trained)] = Encoder(tokenizer, template).encode({"messages": [user("a"), assistant("b")]})
    assert ids.tolist() == tokenizer.encode("[user]a[assistant]b<end>")
    assert trained.tolist() == [False] * (len(ids) - 2) + [True] * 2


WRONG = r"""
    a\n{% for m in messages %}                     line 2:
    \n\n{{ messages[0] x }}                        line 3:
    {{ messages[0].content.nope() }}               line 1:
    \n{{ raise_exception('needs a system turn') }}  line 2: needs a system turn
    {{ ''.__class__.__mro__ }}                     line 1: access to attribute
    {{ 1 / 0 }}                                    line 1: division by zero
    hello {{ mesages }}                            without the user's words; got 'hello '
    {% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}  without the assistant's words
    {% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}\
        changes when it follows ('1A question?' becomes '2A question?2An answer.'
    {% for m in messages %}{{ m.content }}{% endfor %}{% generation %}{% endgeneration %}\
        {% generation %} does not enclose
    {% for m in messages %}{% generation %}{% generation %}{{ m.content }}{% endgeneration %}\
{% endgeneration %}{% endfor %}  inside another
"""


@pytest.mark.parametrize("source, words", cases(WRONG))
def test_a_wrong_template_is_named_with_its_line_before_anything_starts(jinja, source, words):
    with pytest.raises(UserError) as caught:
        jinja(source)
    assert "template.jinja" in str(caught.value) and words in str(caught.value)


def test_a_template_that_rewrites_earlier_turns(jinja):
    """Each answer is in a document of its own, and a chat reads the whole text again."""
    template = jinja(FORGETFUL)
    one = template.segments([user("a"), assistant("b")])
    assert shown(one) == "[user]a;[assistant]|<b>|<;>"
    two = template.documents([user("a"), assistant("b"), user("c"), assistant("d")])
    assert [*map(shown, two)] == [
        "[user]a;[assistant]|<b>|<;>",
        "[user]a;[assistant]-;[user]c;[assistant]|<d>|<;>",
    ]
    assert template.next_turn([user("a"), assistant("b")], [user("c")]) is None


def test_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match="cannot read absent.jinja as a template: .* takes auto, rwkv, think"):
        load_template("absent.jinja")
    with pytest.raises(UserError, match="no such file; --template takes .*; did you mean think\\?"):
        load_template("thnk")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot read"):
        load_template(str(tmp_path / "binary"))


# chat


@pytest.mark.parametrize("kind", ["world", "bytes", "utf16", "whole blank line"])
@pytest.mark.parametrize("name", [*MODES, *TEMPLATES, "alpaca"])
def test_a_chat_feeds_the_tokens_of_the_training(tmp_path, name, kind):
    tokenizer = whole_blank_line_tokenizer(tmp_path) if kind.startswith("whole") else named(kind)
    template = load_template(TEMPLATES.get(name, name), tokenizer.decode(tokenizer.eod))
    conversation = Conversation(scripted(tokenizer), GREEDY, system="s é", template=template)
    for question, answer in zip(TURNS[1::2], TURNS[2::2]):
        said = [text for text, trained in template.segments([user("q"), answer]) if trained][0]
        ending = template.stops[0] if name not in MODES else template.turn_end
        conversation.engine = scripted(tokenizer, [*tokenizer.encode(said + ending), *tokenizer.eod])
        assert "".join(conversation.answer(question["content"])) == said
    [(ids, _)] = Encoder(tokenizer, template).encode({"messages": TURNS})
    rest = tokenizer.encode(template.turn_end)
    eod = [] if tuple(rest) == tuple(tokenizer.eod) else tokenizer.eod
    assert [*conversation.state, *rest, *eod] == ids.tolist()


def test_a_chat_reads_all_again_where_earlier_turns_change():
    tokenizer = named("bytes")
    template = load_template(FORGETFUL)
    conversation = Conversation(scripted(tokenizer), GREEDY, template=template)
    for question, said in (("a", "b"), ("c", "d"), ("e", "f")):
        conversation.engine = scripted(tokenizer, [*tokenizer.encode(f"{said};[user]more"), *tokenizer.eod])
        assert "".join(conversation.answer(question)) == said
    assert (
        bytes(conversation.state).decode() == "[user]a;[assistant]-;[user]c;[assistant]-;[user]e;[assistant]f"
    )


def test_adapter_and_merged_file_record_the_template_for_the_chat(tmp_path, jinja, monkeypatch, capsys):
    tokenizer = named("bytes")
    base, adapter, merged = (tmp_path / f"{name}.pth" for name in ("base", "adapter", "merged"))
    rwkv_miss.write_checkpoint(base, random_tensors(make_arch(7)).items())
    model = RWKV.load(base)
    rwkv_miss.inject(model, "miss", rank=4)
    for template in (load_template("think-short"), jinja(CHATML)):
        rwkv_miss.save_adapter(model, adapter, template=template.record)
        merged.unlink(missing_ok=True)
        rwkv_miss.merge_file(base, adapter, merged)
        (tmp_path / "template.jinja").unlink(missing_ok=True)  # the record is enough
        for paths in ((adapter, base), (None, merged), (adapter,)):
            found = recorded_template("auto", tokenizer, *paths)
            assert found.segments(TURNS) == template.segments(TURNS) and found.record == template.record
        assert recorded_template("rwkv", tokenizer, adapter).name == "rwkv"
        flags = f"--model {merged} --tokenizer bytes --prompt q --max_tokens 3 --temperature 0".split()
        monkeypatch.setattr(
            program, "load_named", lambda args: (without_adapters(Scripted(tokenizer, b"yes")), tokenizer)
        )
        monkeypatch.setattr(program, "fastest", lambda model, *_, **options: (model, "as the script says"))
        chat.main(flags)
        assert capsys.readouterr().out == template.opening.lstrip() + "yes\n"
    for path in (base, None):
        assert recorded_template("auto", tokenizer, path).name == "rwkv"
    rwkv_miss.save_adapter(model, adapter, template="think-long:hermes")
    assert recorded_template("auto", tokenizer, adapter, merged).name == "think-long", (
        "an adapter's word comes before its base's"
    )


@pytest.mark.parametrize(
    "record", ["/etc/hostname", "think", "think:", "think:jason", ":hermes", "auto", 7, ["rwkv"]]
)
def test_a_record_that_is_none_names_no_file(record):
    with pytest.raises(UserError, match="the template that the file records is .*, expected NAME:TOOL_STYLE"):
        from_record(record)


def test_what_a_user_chooses_comes_before_what_was_recorded(jinja):
    world, small = load_tokenizer("world", 65536), named("bytes")
    for spec, tool_style, recorded, tokenizer, meant in (
        ("auto", "auto", None, world, "rwkv:json"),
        ("auto", "signatures", "rwkv:json", world, "rwkv:signatures"),
        ("auto", "auto", None, small, "rwkv:hermes"),
        ("auto", "auto", None, None, "rwkv:hermes"),
        ("think", "auto", None, world, "think:json"),
        ("think", "auto", "rwkv:hermes", world, "think:hermes"),
        ("auto", "auto", "think-short-2025:hermes", world, "think-short-2025:hermes"),
        ("auto", "hermes", "think:json", world, "think:hermes"),
        ("think", "auto", CHATML, small, "think:hermes"),
        ("auto", "auto", CHATML, world, CHATML),
        (CHATML, "auto", "rwkv:json", world, CHATML),
        ("think", "json", "of tomorrow:json", world, "think:json"),
    ):
        assert choose_template(spec, tool_style, recorded, tokenizer).record == meant
    for style in ("json", "hermes"):
        with pytest.raises(UserError, match=f"--tool_style {style} is about RWKV's template, and"):
            choose_template("auto", style, CHATML, small)


def test_templates_reach_other_processes(jinja):
    for template in (RwkvTemplate("think"), jinja(CHATML)):
        assert pickle.loads(pickle.dumps(template)).segments(TURNS) == template.segments(TURNS)


# masks


def test_loss_masks_of_every_kind_of_row():
    rows = [{"text": "User: a\n\nAssistant: b"}, {"messages": HI}, {"prompt": "a ", "completion": "b"}]
    for mask, *expected in (
        ("assistant", "<User: a\n\nAssistant: b>", "User: hi\n\nAssistant:|< yo>", "a |<b>"),
        ("all", "<User: a\n\nAssistant: b>", "<User: hi\n\nAssistant:>|< yo>", "<a >|<b>"),
        ("Assistant:", "User: a\n\nAssistant:|< b>", "User: hi\n\nAssistant:|< yo>", "a b"),
    ):
        assert [shown(*record_segments(row, DEFAULT, mask)) for row in rows] == expected
    assert shown(*record_segments(rows[2], DEFAULT, "a")) == "a|< b>"


MARKED_TEXTS = r"""
    Assistant:  no such word  no such word
    Assistant:  Assistant:  Assistant:
    Assistant:  User: a\n\nAssistant: b\n\nc\n\nUser: d\n\nAssistant: e\
        User: a\n\nAssistant:|< b\n\nc>|<\n\n>|User: d\n\nAssistant:|< e>
    Assistant:  Assistant: b\nUser: c  Assistant:|< b\nUser: c>
    Assistant:  Assistant: b\n\nTool: c  Assistant:|< b>|<\n\n>|Tool: c
    [...]  a[b]c[d]e[f  a[|<b>|]c[|<d>|]e[|<f>
    [...]  [a[b]  [|<a>|[|<b>|]
    Bot✿  User✿a✿\nBot✿b✿c✿\nUser✿d✿\nBot✿e  User✿a✿\nBot✿|<b✿c>|<✿>|\nUser✿d✿\nBot✿|<e>
    Bot✿<think  Bot✿<think>\nhm</think>b✿\nTool✿c✿  Bot✿<think|<>\nhm</think>b>|<✿>|\nTool✿c✿
    ### Assistant  ### User\na\n### Assistant\nb\n# c\n### User\nd\n### Assistant\ne\n### Tool Output\nf\
        ### User\na\n### Assistant|<\nb\n# c>|<\n>|### User\nd\n### Assistant|<\ne>|<\n>|### Tool Output\nf
    ### Assistant  ### Assistant\nb\n### Users\nc  ### Assistant|<\nb\n### Users\nc>
    Assistant:  Assistant: b\n### User\nc  Assistant:|< b\n### User\nc>
"""


@pytest.mark.parametrize(
    "marker, text, expected",
    [
        *cases(MARKED_TEXTS),
        ("Assistant:", "", ""),
        (
            "Response:...\\n\\nInstruction:",
            "Response: a\n\nUser: b\n\nInstruction: c\n\nResponse: d",
            "Response:|< a\n\nUser: b>|\n\nInstruction: c\n\nResponse:|< d>",
        ),
    ],
)
def test_a_marker(marker, text, expected):
    assert shown(marked(text, marker)) == expected
    assert "".join(piece for piece, _ in marked(text, marker)) == text


def test_a_marker_that_no_row_has_is_an_error(tmp_path):
    """Before a run that would learn to stop, and nothing else."""
    (tmp_path / "rows.jsonl").write_text('{"text": "User: a\\n\\nAssistant: b"}\n{"text": "c"}\n')
    with pytest.raises(UserError, match="no row has anything after the marker 'Asistant:'"):
        load_documents(tmp_path / "rows.jsonl", named("bytes"), 99, loss_mask="Asistant:")
    assert load_documents(tmp_path / "rows.jsonl", named("bytes"), 99, loss_mask="Assistant:").targets == 4


@pytest.mark.parametrize("think_weight, prompt_weight", [(1, 1), (0.5, 0.5), (0, 0.5), (1, 0.5)])
def test_a_marker_is_there_also_where_prompts_weigh_as_much(tmp_path, think_weight, prompt_weight):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "User: a\\n\\nAssistant:<think>b</think>"}\n')
    for marker in ("Assistant:", "<think>...</think>"):
        if marker == "Assistant:" or think_weight:
            weights = {"think_weight": think_weight, "prompt_weight": prompt_weight}
            encoder = Encoder(named("bytes"), loss_mask=marker, **weights)
            assert load(str(rows), encoder).documents(99).targets


def test_the_marker_assistant_is_the_mask_of_a_conversation():
    turns = [system("s"), user("a\n\nb"), assistant("c\n\nd"), user("e"), assistant("f"), assistant("g")]
    assert record_segments({"messages": turns}, DEFAULT, "Assistant:") == [DEFAULT.segments(turns)]
    flower = load_template("flower")
    assert record_segments({"messages": turns[:-1]}, flower, "Bot✿<think") == [flower.segments(turns[:-1])]
    markdown = RwkvTemplate("think", "markdown")
    mask = "### Assistant\\n<think"
    assert record_segments({"messages": turns}, markdown, mask) == [markdown.segments(turns)]


@pytest.mark.parametrize("kind", ["world", "bytes"])
def test_a_marker_in_tokens(kind):
    """A file of tokens has the mask of its text, token for token, where no token runs across a border."""
    tokenizer = named(kind)
    texts = {
        "Assistant:": "User: é你\n\nAssistant: 🙂 b\n\nUser: c\n\nAssistant: d",
        "Bot✿": "User✿é你✿\nBot✿🙂 b✿\nUser✿c✿\nBot✿d✿",
    }
    for marker, text in texts.items():
        ids = np.array(tokenizer.encode(text), dtype=np.int32)
        [(got, trained)] = Encoder(tokenizer, DEFAULT, marker).encode({"ids": ids})
        [(want, mask)] = Encoder(tokenizer, DEFAULT, marker).encode({"text": text})
        assert got.tolist() == want.tolist() == [*ids, *tokenizer.eod] and trained.tolist() == mask.tolist()
    [(whole, everything)] = Encoder(tokenizer).encode({"ids": got})
    assert whole.tolist() == got.tolist() and everything.all(), "the end of document is there already"
    with pytest.raises(UserError, match="give the data as text"):
        Encoder(load_tokenizer("utf16", 256), DEFAULT, "x").encode({"ids": ids % 256})
