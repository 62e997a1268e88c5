"""Jinja templates that rewrite earlier turns, or ask with words that end in a tag: which documents a
conversation becomes, that a chat asks in their tokens, and that these documents stay together.
"""

import json
import random

import numpy as np
import pytest

from rwkv_miss import UserError
from scripts import binidx, preview
from src.config import Config
from src.data import token_cache
from src.data.dataset import load_documents
from src.data.encode import Encoder
from src.data.formats import Report, sources
from src.data.held_out import hold_out, questions
from src.data.questions import read_questions
from src.data.templates import load_template
from src.data.token_cache import tokenise
from src.data.tokenizer import load_tokenizer
from src.inference.conversation import Conversation
from src.inference.sampling import GREEDY
from src.reporting import data_text

from .answering import scripted
from .conftest import write_rows
from .test_data import assistant, user, whole_blank_line_tokenizer
from .test_generate import named
from .test_templates import CHATML, MARKED, reference, shown, system, thinking

# G1's: earlier answers have no thoughts, and what asks ends inside the tag
G1 = """\
{%- for tool in tools or [] -%}
{{- ('### Tools\\n' if loop.first else '') + '### `' + tool.function.name + '`\\n\\n' -}}
{%- endfor -%}
{%- for m in messages -%}
{%- set parts = m.content.split('</think>') -%}
{%- set said = parts[-1] | trim -%}
{%- if m.tool_calls -%}
{%- set calls -%}
{%- for call in m.tool_calls -%}
**Tool Call:**{{- '\\n```json\\n' + call.function.arguments + '\\n```' -}}
{%- endfor -%}
{%- endset -%}
{%- set said = said + calls -%}
{%- endif -%}
{%- set thoughts = (m.reasoning_content or parts[:-1] | join) | replace('<think>', '') | trim -%}
{%- if m.role != 'assistant' -%}
{{- HEAD(m.role) + m.content | trim + '\\n\\n' -}}
{%- elif loop.last and thoughts -%}
{{- HEAD('assistant') + '<think>\\n' + thoughts + '\\n</think>\\n' + said + '\\n\\n' -}}
{%- elif loop.last -%}
{{- HEAD('assistant') + 'EMPTY' + said + '\\n\\n' -}}
{%- else -%}
{{- HEAD('assistant') + said + '\\n\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- HEAD('assistant') + 'OPENING' -}}{%- endif -%}
"""
COLON = "{%- macro HEAD(role) -%}{{ role | capitalize + ': ' }}{%- endmacro -%}\n"
MARKDOWN = "{%- macro HEAD(role) -%}{{ '### ' + role | capitalize + '\\n' }}{%- endmacro -%}\n"


def g1(head, opening, empty="<think></think>"):
    return head + G1.replace("EMPTY", empty).replace("OPENING", opening)


LLAMA = """\
{%- for m in messages -%}
{{- '<|start|>' + m.role + '<|end|>\\n\\n' + m.content | trim + '<|eot|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant<|end|>\\n\\n' -}}{%- endif -%}
"""
# thoughts stay until the next question of the user, so that they outlive the results of tools
QWEN = """\
{%- set ns = namespace(query=-1) -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{%- set ns.query = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- set said = m.content.split('</think>')[-1].lstrip('\\n') -%}
{%- set thoughts = m.reasoning_content or '' -%}
{%- if '</think>' in m.content -%}
{%- set thoughts = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
{%- endif -%}
{%- if m.role == 'assistant' and loop.index0 > ns.query -%}
{{- '<think>\\n' + thoughts + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- said + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
QWEN_MARKED = QWEN.replace(
    "{{- '<think>\\n' + thoughts", "{%- generation -%}{{- '<think>\\n' + thoughts"
).replace(
    "+ '\\n</think>\\n\\n' -}}\n{%- endif -%}\n{{- said + '<|im_end|>\\n' -}}",
    "+ '\\n</think>\\n\\n' + said + '<|im_end|>\\n' -}}{%- endgeneration -%}\n"
    "{%- else -%}{{- said + '<|im_end|>\\n' -}}{%- endif -%}",
)
FORGETFUL = {
    "open": g1(COLON, "<think"),
    "open, markdown": g1(MARKDOWN, "<think", "<think>\\n</think>\\n"),
    "fake": g1(COLON, "<think></think"),
    "fake, markdown": g1(MARKDOWN, "<think></think"),
    "qwen": QWEN,
    "qwen, generation": QWEN_MARKED,
}
LASTING = {"chatml": CHATML, "llama": LLAMA, "generation": MARKED}
PLAIN = [system("s é"), user("1"), assistant("x\n\ny"), user("🙂"), assistant("."), user("3"), assistant("z")]
THOUGHTFUL = [
    user("1"),
    thinking("hm", "x\n\ny"),
    user("🙂"),
    thinking("é é", "."),
    user("3"),
    assistant("z"),
]


def tokenizer_of(kind, tmp_path):
    return whole_blank_line_tokenizer(tmp_path) if kind == "whole blank line" else named(kind)


def said_turns(source, messages):
    """(the messages up to an answer, what asks for it, what it adds), from jinja2 alone."""
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            asked, answered = (
                reference(source, messages=messages[:end], add_generation_prompt=ask, eos_token="")
                for end, ask in ((i, True), (i + 1, False))
            )
            assert answered.startswith(asked)
            yield messages[: i + 1], asked, answered.removeprefix(asked)


def is_fake(name):
    return name.startswith("fake")


@pytest.mark.parametrize("name", [*FORGETFUL, *LASTING])
@pytest.mark.parametrize("kind", ["world", "bytes", "whole blank line"])
def test_a_chat_asks_in_the_tokens_of_the_training(name, kind, tmp_path):
    """Each answer is trained after the very tokens that a chat reads before it, and in those that it says."""
    source, tokenizer = {**FORGETFUL, **LASTING}[name], tokenizer_of(kind, tmp_path)
    plain = {"generation": CHATML, "qwen, generation": QWEN}.get(name, source)
    template = load_template(source, tokenizer.decode(tokenizer.eod))
    for messages in (PLAIN, THOUGHTFUL) if not is_fake(name) and name in FORGETFUL else (PLAIN,):
        encoded = Encoder(tokenizer, template).encode({"messages": messages})
        assert len(encoded) == (3 if name in FORGETFUL else 1)
        system_words = messages[0]["content"] if messages[0]["role"] == "system" else ""
        conversation = Conversation(scripted(tokenizer), GREEDY, system=system_words, template=template)
        for number, (before, asked, text) in enumerate(said_turns(plain, messages)):
            said, end = text.removesuffix(template.turn_end), tokenizer.encode(template.turn_end)
            conversation.engine = scripted(tokenizer, [*tokenizer.encode(said + template.stops[0])])
            assert "".join(conversation.answer(before[-2]["content"])) == said
            ids, weights = encoded[number if name in FORGETFUL else 0]
            read = conversation.state
            assert ids[: len(read)].tolist() == read
            count = len(tokenizer.encode(said))
            assert weights[len(read) - count : len(read)].all() and not weights[len(read) - count - 1]
            if name in FORGETFUL:
                assert ids.tolist() == [*read, *end, *tokenizer.eod]
                assert ids[: len(read) - count].tolist() == tokenizer.encode(asked)
                assert weights.sum() == len(ids) - len(read) + count, "nothing else is trained"
        assert ids.tolist() == [*read, *end, *tokenizer.eod]


def trained_answers(documents, turn_end):
    """(the text before an answer, the answer) of every answer that has a weight."""
    for segments in documents:
        before = ""
        for (text, weight), after in zip(segments, [*segments[1:], ("", 0)], strict=True):
            if weight and text != turn_end:
                yield before, text + (after[0] if after[0] == turn_end else "")
            before += text


@pytest.mark.parametrize("name", [*FORGETFUL, *LASTING])
def test_every_answer_with_a_weight_is_trained_once_after_what_asks_for_it(name):
    """Conversations are random, with results of tools, unanswered questions, and answers as context only."""
    source, rng = {**FORGETFUL, **LASTING}[name], random.Random(name)
    plain = {"generation": CHATML, "qwen, generation": QWEN}.get(name, source)
    template = load_template(source)
    for _ in range(8):
        messages: list[dict] = []
        for i in range(rng.randint(1, 6)):
            thoughts = "" if is_fake(name) or name in LASTING else rng.choice(["", "hm"])
            answer = thinking(thoughts, f"a{i}") if thoughts else assistant(f"a{i}")
            messages.append(rng.choice([user(f"u{i}"), {"role": "tool", "content": f"t{i}"}]))
            messages += rng.choice([[], [answer], [{**answer, "weight": rng.choice([0, 0.5])}]])
        wanted = [
            (asked, said)
            for before, asked, said in said_turns(plain, messages)
            if before[-1].get("weight", 1)
        ]
        documents = template.documents(messages)
        assert [*trained_answers(documents, template.turn_end)] == wanted
        assert len(documents) <= max(1, len(wanted))


def test_documents_of_the_g1_template():
    template = load_template(FORGETFUL["open"])
    assert template.opening == "<think" and template.stops == ("\n\nUser:",)
    assert [*map(shown, template.documents(THOUGHTFUL))] == [
        "User: 1\n\nAssistant: <think|<>\nhm\n</think>\nx\n\ny>|<\n\n>",
        "User: 1\n\nAssistant: x\n\ny\n\nUser: 🙂\n\nAssistant: <think|<>\né é\n</think>\n.>|<\n\n>",
        "User: 1\n\nAssistant: x\n\ny\n\nUser: 🙂\n\nAssistant: .\n\nUser: 3\n\n"
        "Assistant: <think|<></think>z>|<\n\n>",
    ]
    assert shown(template.segments(THOUGHTFUL[:3], ask=True)) == (
        "User: 1\n\nAssistant: x\n\ny\n\nUser: 🙂\n\nAssistant: <think"
    )


def test_an_answer_of_weight_0_has_no_document():
    template = load_template(FORGETFUL["open"])
    whole = template.documents(PLAIN)
    turns = [*PLAIN[:4], {**PLAIN[4], "weight": 0}, *PLAIN[5:]]
    assert template.documents(turns) == [whole[0], whole[2]]
    nothing = [{**message, "weight": 0} for message in PLAIN]
    [document] = template.documents(nothing)
    assert "".join(text for text, _ in document) == "".join(text for text, _ in whole[2])
    assert not any(weight for _, weight in document)
    assert template.documents(PLAIN[:2]) == [[("System: s é\n\nUser: 1\n\n", False)]]
    # a turn without an answer is no part of a document whose turns it would rewrite
    assert template.documents(PLAIN[:4]) == whole[:1]


@pytest.mark.parametrize("name", [*FORGETFUL, *LASTING])
def test_an_answer_without_weight_has_the_same_tokens(name, tmp_path):
    """The end of its turn is a piece by itself too, as a chat reads it."""
    template = load_template({**FORGETFUL, **LASTING}[name])
    encoder = Encoder(whole_blank_line_tokenizer(tmp_path), template)
    turns = [*PLAIN[:-1], assistant("z\n")]
    for weight in (0, 0.5):
        weighed = [*turns[:2], {**turns[2], "weight": weight}, *turns[3:]]
        got, whole = (
            {tuple(ids.tolist()) for ids, _ in encoder.encode({"messages": m})} for m in (weighed, turns)
        )
        assert got <= whole and len(got) == len(whole) - (weight == 0 and name in FORGETFUL)


def test_turns_of_an_earlier_document_have_no_prompt_weight():
    """Else the first question would have it three times, and answers that are rewritten would have it."""
    encoder = Encoder(BYTES, load_template(QWEN), prompt_weight=0.25)
    tool = {"role": "tool", "content": "4"}
    turns = [user("2+2"), thinking("hm", "add"), tool, thinking("so", "4"), user("ok?"), thinking("é", "yes")]
    first, second = [
        "".join({0: "0", 0.25: "p", 1: "1"}[weight] for weight in weights.tolist())
        for _, weights in encoder.encode({"messages": turns})
    ]
    prompt = len("<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n")
    assert first[: prompt + 1] == "p" * prompt + "1" and "0" not in first and first.count("1p") == 1
    assert set(second[: 2 * prompt]) == {"0"} and "p" not in second and second.endswith("1")
    # a document that nothing is trained in is left out, so that the prompt is in no earlier one
    turns = [user("q"), {**thinking("hm", "a"), "weight": 0}, user("r"), assistant("b")]
    [(ids, weights)] = encoder.encode({"messages": turns})
    prompt = bytes(ids.tolist()).index(b"<think>")
    assert weights.tolist() == [0.25] * prompt + [1] * (len(ids) - prompt)


def test_a_document_ends_only_where_something_is_rewritten():
    """Thoughts that outlive a tool's result: both answers are in one document, as a chat has read them."""
    tool = {"role": "tool", "content": "4"}
    turns = [user("2+2"), thinking("hm", "add"), tool, thinking("so", "4"), user("ok?"), thinking("é", "yes")]
    head, say = "<|im_start|>", "<|im_start|>assistant\n"
    first = f"{head}user\n2+2<|im_end|>\n{say}"
    documents = load_template(QWEN).documents(turns)
    assert [*map(shown, documents)] == [
        f"{first}|<<think>\nhm\n</think>\n\nadd>|<<|im_end|>\n>|{head}tool\n4<|im_end|>\n{say}"
        "|<<think>\nso\n</think>\n\n4>|<<|im_end|>\n>",
        f"{first}add<|im_end|>\n{head}tool\n4<|im_end|>\n{say}4<|im_end|>\n{head}user\nok?<|im_end|>\n{say}"
        "|<<think>\né\n</think>\n\nyes>|<<|im_end|>\n>",
    ]
    # so does a question for the model
    asked = load_template(QWEN).segments(turns[:3], ask=True)
    assert asked == documents[0][: len(asked)]


@pytest.mark.parametrize("name", LASTING)
def test_where_nothing_is_rewritten_there_is_one_document(name):
    template = load_template(LASTING[name])
    for count in range(len(PLAIN) + 1):
        assert template.documents(PLAIN[:count]) == [template.segments(PLAIN[:count])]


# a question has words that the answer's text lacks: thoughts are opened, or are empty in another form
OTHERWISE = {
    "no tag": (g1(COLON, "<think", ""), "Assistant:", " z"),
    "another form": (
        g1(COLON, "<think></think", "<think>\\n</think>\\n"),
        "Assistant: <think",
        ">\n</think>\nz",
    ),
    "no tag, fake": (g1(COLON, "<think></think", ""), "Assistant:", " z"),
    "no tag, markdown": (g1(MARKDOWN, "<think", ""), "### Assistant\n", "z"),
    "no tag, closed": (g1(COLON, "<think>\\n", ""), "Assistant:", " z"),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_the_prompt_is_cut_where_a_token_of_what_asks_ends(name):
    """Every token before the answer is a token of what asks, and the next one would not be."""
    source, prompt, answer = OTHERWISE[name]
    tokenizer, template = named("world"), load_template(source)
    encoded = Encoder(tokenizer, template).encode({"messages": PLAIN})
    assert len(encoded) == 3
    for (ids, weights), end in zip(encoded, (2, 4, 6), strict=True):
        asked = tokenizer.encode(
            reference(source, messages=PLAIN[:end], add_generation_prompt=True, eos_token="")
        )
        start = int(np.argmax(weights > 0))
        assert ids[:start].tolist() == asked[:start] and ids[start] != asked[start]
        assert weights[start:].all()
    text = tokenizer.decode(ids[:start].tolist())
    assert text.endswith(prompt) and tokenizer.decode(ids[start:-1].tolist()) == f"{answer}\n\n"
    assert template.documents(PLAIN)[2][0].text.startswith(text)
    # a chat asks in the words of the template, and so does a question
    conversation = Conversation(scripted(tokenizer), GREEDY, system="s é", template=template)
    for turn in PLAIN[1::2]:
        conversation.engine = scripted(tokenizer, [*tokenizer.encode("></think>x"), *tokenizer.eod])
        list(conversation.answer(turn["content"]))
        assert conversation.messages[-1]["content"] == template.opening + "></think>x"
    read = tokenizer.decode(conversation.state)
    assert read.count(template.opening) == 1, "the earlier answers were read as the template writes them"


def test_a_tokenizer_that_changes_the_text_cuts_at_the_character(monkeypatch):
    tokenizer = load_tokenizer("bytes", 256)
    encoder = Encoder(tokenizer)
    assert encoder.token_end("aé", 2) == 2 and encoder.token_end("aé", 1) == 1
    monkeypatch.setattr(type(tokenizer), "decode", lambda self, ids: "other words")
    assert encoder.token_end("a <think", 2) == 2


@pytest.mark.parametrize(
    "source, words",
    [
        # the number of messages stands at the beginning
        (
            "{{ messages | length }}|{% for m in messages %}{{ m.content }};{% endfor %}{% if"
            " add_generation_prompt %}A:{% endif %}",
            "('1|A question?;A:' becomes '2|A question?;An answer.;')",
        ),
        # the end of the text stands after the last message alone
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '</s>' if loop.last }}{% endfor %}{% if"
            " add_generation_prompt %}assistant:{% endif %}",
            "('</s>assistant:' becomes 'assistant: An answer.</s>')",
        ),
        # an answer is asked for in words that are never written before one
        (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt"
            " %}[model]{% endif %}",
            "('[model]' becomes '<assistant>An answer.')",
        ),
        # a second answer changes the first question
        (
            "{% for m in messages %}{{ m.content if messages | length < 4 else '-' }};{% endfor %}{% if"
            " add_generation_prompt %}A:{% endif %}",
            "becomes",
        ),
    ],
)
def test_a_template_without_hope_is_refused_before_any_row(source, words):
    with pytest.raises(
        UserError, match="changes when it follows .* can't be found; enclose them in"
    ) as caught:
        load_template(source)
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["open", "fake, markdown"])
def test_two_answers_in_a_row_are_refused_where_the_first_is_rewritten(name):
    with pytest.raises(UserError, match="two assistant messages follow each other.*make one message of them"):
        load_template(FORGETFUL[name]).documents([user("1"), thinking("x", "a"), assistant("b")])


def test_marks_tell_what_of_an_answer_is_trained():
    """The documents are those of the same template without marks."""
    plain, marked = load_template(QWEN), load_template(QWEN_MARKED)
    assert marked.documents(THOUGHTFUL) == plain.documents(THOUGHTFUL)
    # thoughts are written, but not trained
    words = "{%- endif -%}\n{%- generation -%}{{- said + '<|im_end|>\\n' -}}{%- endgeneration -%}"
    source = QWEN.replace("{%- endif -%}\n{{- said + '<|im_end|>\\n' -}}", words)
    documents = load_template(source).documents(THOUGHTFUL)
    assert [[text for text, weight in segments if weight] for segments in documents] == [
        [said, "<|im_end|>\n"] for said in ("x\n\ny", ".", "z")
    ]
    assert documents[1][1:3] == [("<think>\né é\n</think>\n\n", 0), (".", 1)]


def test_marks_alone_help_where_no_rule_does():
    answer = "{% generation %}{{ m.content }};{% endgeneration %}"
    source = (
        "{{ messages | length }}{% for m in messages %}[{{ m.role }}]"
        f"{{% if m.role == 'user' %}}{{{{ m.content }}}};{{% else %}}{answer}{{% endif %}}{{% endfor %}}"
    )
    template = load_template(source)
    turns = [user("a"), {**assistant("b"), "weight": 0.5}, user("c"), assistant("d")]
    [segments] = template.documents(turns)
    assert segments == [("4[user]a;[assistant]", 0), ("b;", 0.5), ("[user]c;[assistant]", 0), ("d;", 1)]
    assert segments == template.segments(turns) and template.asked_only == ""
    twice = source.replace(
        "{{ m.content }};{% endgen", "({% endgeneration %}{% generation %}{{ m.content }};{% endgen"
    )
    with pytest.raises(
        UserError, match='has 4 {% generation %} blocks for 2 answers; which of them has "weight": 0.5'
    ):
        load_template(twice).documents(turns)


def test_masks_other_than_the_assistants_take_the_whole_conversation_once():
    tokenizer, template = named("bytes"), load_template(FORGETFUL["open"])
    whole = reference(FORGETFUL["open"], messages=PLAIN, add_generation_prompt=False, eos_token="")
    for mask in ("all", "Assistant:"):
        [(ids, weights)] = Encoder(tokenizer, template, mask).encode({"messages": PLAIN})
        assert bytes(ids[:-1].tolist()).decode() == whole
        assert weights.all() == (mask == "all") and weights[-3:].all()


def test_calls_of_tools_are_answers_like_any_other():
    template = load_template(FORGETFUL["fake, markdown"])
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    call = {**assistant(""), "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}]}
    turns = [user("1+1"), call, {"role": "tool", "content": "2"}, assistant("It is 2.")]
    prompt = "### Tools\n### `add`\n\n### User\n1+1\n\n### Assistant\n"
    said = '**Tool Call:**\n```json\n{"a": 1}\n```'
    assert [*map(shown, template.documents(turns, tools))] == [
        f"{prompt}<think></think|<>{said}>|<\n\n>",
        f"{prompt}{said}\n\n### Tool\n2\n\n### Assistant\n<think></think|<>It is 2.>|<\n\n>",
    ]
    # a chat has the call in its words
    assert template.next_turn([turns[0], assistant(template.opening + ">" + said)], turns[2:3], tools) is None


# the data of a run


def conversation(name, turns=3):
    messages = []
    for i in range(turns):
        messages += [user(f"{name} {i}?"), assistant(f"{name} says {i}")]
    return {"messages": messages}


@pytest.fixture
def rows(tmp_path):
    """A file of 40 conversations: every fourth of one turn, the others of three."""
    path = tmp_path / "rows.jsonl"
    content = [conversation(f"n{i}", 3 if i % 4 else 1) for i in range(40)]
    write_rows(path, content)
    return str(path)


def names_of(documents):
    """The name of the conversation that each document is of."""
    return [bytes(row.ids.tolist()).decode().split()[1] for row in documents]


BYTES, TEMPLATE = load_tokenizer("bytes", 256), load_template(FORGETFUL["open"])


def load(path, **how):
    return load_documents(path, BYTES, 500, TEMPLATE, **how)


def test_the_documents_of_a_conversation_are_held_out_together(rows):
    documents = load(rows)
    assert len(documents) == 100 and documents.rewritten == (30, 90)
    for seed in range(5):
        train, held = hold_out(Config(eval_split=0.2, random_seed=seed), documents, None)
        assert len(train) + len(held) == 100 and 18 <= len(held) <= 24
        assert not set(names_of(train)) & set(names_of(held))
        conversations = [side.rewritten[0] for side in (train, held)]
        assert sum(conversations) == 30 and held.rewritten[1] == 3 * held.rewritten[0]
    alone = documents.take(np.arange(len(documents)))
    alone.conversation = None
    train, held = hold_out(Config(eval_split=0.2), alone, None)
    assert set(names_of(train)) & set(names_of(held)), "this test can fail"
    # the first turn of another conversation, word for word, is on the side of its copy
    copied = load(rows)
    copied.items = [*copied.items]
    firsts = [
        i
        for i in range(100)
        if copied.conversation[i] >= 0 and i and copied.conversation[i - 1] != copied.conversation[i]
    ]
    for i in firsts[::2]:
        copied.items[i] = copied.items[firsts[1]]
    train, held = hold_out(Config(eval_split=0.3), copied, None)
    texts = [{bytes(row.ids.tolist()) for row in side} for side in (train, held)]
    assert not texts[0] & texts[1]


def test_half_of_a_file_is_half_of_its_conversations(rows):
    half = names_of(load(f"{rows}:0.5"))
    assert len(set(half)) == 20
    counts = {name: half.count(name) for name in half}
    assert counts == {name: 3 if int(name[1:]) % 4 else 1 for name in counts}
    twice = load(f"{rows}:2")
    assert len(twice) == 200 and twice.rewritten == (30, 180)


def test_a_cut_or_unlearnable_document_is_counted_as_any(rows):
    documents = load_documents(rows, BYTES, 60, TEMPLATE)
    # the second and the third answer of a conversation begin after 60 tokens
    assert documents.untrained > 0 and documents.rewritten[1] == len(documents) - 10 > 0


def test_the_cache_keeps_which_documents_belong_together(rows, tmp_path, monkeypatch):
    encoder, (source,) = Encoder(BYTES, TEMPLATE), sources(rows)
    plain = tokenise(source, encoder, Report())
    assert plain.records == 40 and len(plain.begins) == 100
    monkeypatch.setattr(token_cache, "SMALL", 0)
    for _ in range(2):
        kept = tokenise(source, encoder, Report(), cache=str(tmp_path / "cache"))
        assert kept.begins.tolist() == plain.begins.tolist() and kept.ids.tolist() == plain.ids.tolist()
    assert kept.documents_of(np.array([0, 1, 1])).tolist() == [0, 1, 2, 3, 1, 2, 3]


def test_plan_and_preview_count_them(rows, capsys, tmp_path):
    line = "30 conversations became 90 documents, because the template rewrites earlier turns"
    assert data_text.rewritten(load(rows)) == [line]
    (tmp_path / "g1.jinja").write_text(FORGETFUL["fake"])
    flags = ["--data_file", rows, "--tokenizer", "bytes", "--template", str(tmp_path / "g1.jinja")]
    preview.main(flags)
    shown = capsys.readouterr().out
    assert f"           {line}" in shown.splitlines() and "finding    none" in shown
    preview.main([*flags, "--json"])
    figures = json.loads(capsys.readouterr().out)
    assert (figures["rows"], figures["documents"], figures["rewritten"]) == (40, 100, 30)
    with open(rows, "a") as file:
        file.write(json.dumps(conversation("n1")) + "\n")
    preview.main([*flags, "--json"])
    [finding] = json.loads(capsys.readouterr().out)["findings"]
    assert (finding["name"], finding["count"]) == ("duplicate", 1)
    (tmp_path / "g1.jinja").write_text(OTHERWISE["no tag"][0])
    preview.main([*flags, "--json"])
    found = {row["name"]: row["count"] for row in json.loads(capsys.readouterr().out)["findings"]}
    assert found == {"duplicate": 1, "asked otherwise": 41}
    assert load_template(OTHERWISE["no tag"][0]).asked_only == "<think"
    assert load_template(FORGETFUL["open"]).asked_only == "" == load_template("think").asked_only


def test_questions_of_an_evaluation_are_those_of_the_training(rows, tmp_path):
    """The tokens before an answer: of documents, of a file of questions, and one of each conversation."""
    documents, encoder = load(rows), Encoder(BYTES, TEMPLATE)
    path = tmp_path / "questions.jsonl"
    lines = [conversation("n0", 1)] + [conversation("n1", turns) for turns in (1, 2, 3)]
    write_rows(path, lines)
    asked = read_questions(path, TEMPLATE)
    each = [questions(documents.take(np.array([i])), 1, encoder)[0].prompt for i in range(4)]
    assert [question.ids(BYTES) for question in asked] == each
    assert asked[3].opening == "<think" and asked[3].answer == "n1 says 2"
    first = [bytes(question.prompt).decode().split()[1] for question in questions(documents, 5, encoder)]
    assert first == ["n0", "n1", "n2", "n3", "n4"]


def test_a_file_without_masks_has_each_conversation_once(rows, tmp_path, capsys):
    """Weights have no place there either."""
    with open(rows, "a") as file:
        messages = conversation("n40")["messages"]
        file.write(json.dumps({"messages": [*messages[:-1], {**messages[-1], "weight": 0.5}]}) + "\n")
    (tmp_path / "g1.jinja").write_text(FORGETFUL["open"])
    flags = ["--tokenizer", "bytes", "--template", str(tmp_path / "g1.jinja")]
    binidx.main([str(tmp_path / "out.jsonl"), rows, "--to_jsonl", *flags])
    assert "41 documents" in capsys.readouterr().out
    *_, last = (tmp_path / "out.jsonl").read_text().splitlines()
    whole = reference(FORGETFUL["open"], messages=messages, add_generation_prompt=False, eos_token="")
    assert json.loads(last)["text"] == whole
