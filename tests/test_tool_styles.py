"""Tools, calls and results as text, and calls read back from answers."""

import json
import random

import jinja2
import pytest

from rwkv_miss import UserError
from src.data import tool_styles
from src.data.encode import Encoder
from src.data.jinja_template import JinjaTemplate
from src.data.questions import read_questions
from src.data.rwkv_template import RwkvTemplate
from src.data.tool_styles import STYLES, in_order_of_calls, read_call
from src.export.tool_jinja import tool_jinja
from src.inference.conversation import Conversation
from src.inference.sampling import GREEDY

from .answering import scripted
from .test_generate import named
from .test_templates import shown

TICKS = "```"


def call(name, arguments):
    return {
        "type": "function",
        "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
    }


def tool(name, properties=None, required=(), description="Does it."):
    parameters = {"type": "object", "properties": properties or {}, "required": [*required]}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


LOCATION = {"type": "string", "description": "A town.\n\nAny."}
PARAMETERS = {"location": LOCATION, "unit": {"enum": ["celsius", "fahrenheit"]}}
WEATHER = tool("get_weather", PARAMETERS, ["location"], 'Says "hot"\n\nor cold.')
TWO_TOOLS = [WEATHER, {"name": "now", "description": "L'heure: é"}]


@pytest.mark.parametrize(
    "style, expected",
    [
        (
            "json",
            "Tools:\n[\n"
            r'{"name":"get_weather","description":"Says \"hot\"\n\nor cold.","arguments":{"location":'
            r'{"type":"string","description":"A town.\n\nAny."},"unit":{"enum":["celsius","fahrenheit"]}}},'
            '\n{"name":"now","description":"L\'heure: é","arguments":{}}\n]\n'
            "Return only a JSON function call.",
        ),
        (
            "signatures",
            'Tools:\n- get_weather(location: string, unit?: "celsius" | "fahrenheit")\n- now()\n'
            "Return only a JSON function call.",
        ),
        (
            "markdown",
            '### `get_weather`\n**Description:** Says "hot"\nor cold.\n**Parameters:**\n```json\n'
            + json.dumps(WEATHER["function"]["parameters"], indent=2)
            + "\n```\n\n### `now`\n**Description:** L'heure: é\n**Parameters:**\n```json\n{\n"
            '  "type": "object",\n  "properties": {}\n}\n```',
        ),
        (
            "hermes",
            f'<tools>\n{json.dumps(WEATHER)}\n{{"name": "now", "description": "L\'heure: é"}}\n</tools>',
        ),
    ],
)
def test_a_description_of_tools(style, expected):
    assert STYLES[style].describe(TWO_TOOLS) == expected


CALLS = [call("f", {"x": "é\n```", "y": [1, 2.5, None, True]}), call("g", {})]


@pytest.mark.parametrize(
    "style, expected",
    [
        (
            "json",
            '```json\n{"name":"f","arguments":{"x":"é\\n```","y":[1,2.5,null,true]}}\n```\n'
            '```json\n{"name":"g","arguments":{}}\n```',
        ),
        (
            "markdown",
            '**Tool Call:**\n```json\n{\n  "name": "f",\n  "arguments": {\n    "x": "é\\n```",\n    "y": [\n'
            "      1,\n      2.5,\n      null,\n      true\n    ]\n  }\n}\n```\n**Tool Call:**\n```json\n{\n"
            '  "name": "g",\n  "arguments": {}\n}\n```',
        ),
        (
            "hermes",
            '<tool_call>\n{"name": "f", "arguments": {"x": "é\\n```", "y": [1, 2.5, null, true]}}\n'
            '</tool_call>\n<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>',
        ),
    ],
)
def test_calls(style, expected):
    assert STYLES[style].calls(CALLS) == expected
    assert style != "json" or STYLES["signatures"].calls(CALLS) == expected
    # OpenAI's text of the arguments, the arguments themselves, and the function alone
    spelt = [{"id": "1", **CALLS[0]}, {"name": "g", "arguments": {}}]
    assert STYLES[style].calls(spelt) == expected


@pytest.mark.parametrize("style", STYLES)
def test_results(style):
    expected = dict.fromkeys(("json", "signatures"), ("user", 'Function output:\n{"a": 1}\nb'))
    expected |= {"markdown": ("tool", '```json\n{"a": 1}\nb\n```'), "hermes": ("tool", '{"a": 1}\nb')}
    assert STYLES[style].result(' {"a": 1}\r\n\r\n\nb\n') == expected[style]


def made_up(rng, depth=0):
    """Any JSON, with what a style might take for its own marks."""
    marks = [TICKS, f"\n{TICKS}\n", "</tool_call>", "<tool_call>\n", "**Tool Call:**"]
    words = ["", "é你🙂", *marks, '"\\', "\u2028", "a b"]
    kind = rng.randrange(7 if depth < 3 else 5)
    if kind == 5:
        return [made_up(rng, depth + 1) for _ in range(rng.randrange(3))]
    if kind == 6:
        return {rng.choice(words): made_up(rng, depth + 1) for _ in range(rng.randrange(3))}
    return [rng.choice(words) + rng.choice(words), rng.randrange(-9, 10**20), rng.random(), None, True][kind]


@pytest.mark.parametrize("style", STYLES)
def test_what_was_written_is_read(style):
    rng = random.Random(style)
    code = [f"Run\n{TICKS}json\n{{}}\n{TICKS}\nand see", f"{TICKS}bash\nls\n{TICKS}"]
    contents = ["", "Let me look.", *code, "a\n\nb"]

    def made_up_call():
        arguments = {f"k{i}": made_up(rng) for i in range(rng.randrange(4))}
        return call(rng.choice(["f", "get_weather", "é.b-c"]), arguments)

    for _ in range(300):
        calls = [made_up_call() for _ in range(rng.randrange(1, 4))]
        content = rng.choice(contents)
        text = "\n".join(filter(None, [content, STYLES[style].calls(calls)]))
        assert STYLES[style].parse(text) == (content, calls)
        assert STYLES[style].parse(content) == (content, [])


@pytest.mark.parametrize("style", STYLES)
def test_answers_with_calls_that_are_none(style, monkeypatch):
    before, after = STYLES[style].before_call, STYLES[style].after_call
    for words in (
        "",
        "{",
        '{"name": "f"}',
        '{"name": "f", "arguments": {}',
        '{"name": "f", "arguments": 3}',
        '{"name": "f", "arguments": "no JSON"}',
        '{"name": "f", "arguments": {"x": NaN}}',
        '{"name": "", "arguments": {}}',
        '{"name": ["f"], "arguments": {}}',
        "{'name': 'f', 'arguments': {}}",
        '["f"]',
        "null",
        "[" * 10**5,
        '{"name": "f", "arguments": {}} more',
    ):
        text = f"So: {before}{words}{after}"
        assert STYLES[style].parse(text) == (text, [])
    good = f'{before}{{"name": "f", "arguments": {{}}}}'
    # words after a call are the answer, and the call is an example in it
    assert STYLES[style].parse(f"{good}{after} is how") == (f"{good}{after} is how", [])
    # the end of document may come in place of the closing words, and space may be anywhere
    for text in (
        good,
        f"{good} \n",
        f"{good.replace('json', 'json ')}{after}\n\n",
        good.replace("\n", "\n\n"),
    ):
        assert STYLES[style].parse(text) == ("", [call("f", {})])
    # each call is read once, though none is at the end
    text = f"{good}{after}\n" * 30 + "more"
    with monkeypatch.context() as patched:
        read = []
        patched.setattr(tool_styles, "read_call", lambda value: read.append(value) or read_call(value))
        assert STYLES[style].parse(text) == (text, []) and len(read) == 30
    assert STYLES[style].parse(f"{text}\n{good}") == (text, [call("f", {})])
    assert STYLES[style].parse(f"{good}\n{good}") == ("", [call("f", {})] * 2)
    # the first of two calls is broken
    assert STYLES[style].parse(f"{before}{{{after}\n{good}{after}") == (f"{before}{{{after}", [call("f", {})])


@pytest.mark.parametrize("style", STYLES)
def test_tools_that_are_none(style):
    functions = [{"type": "function"}, {"type": "function", "function": "f"}]
    for wrong in ("f", *functions, {"name": ""}, {"name": "f", "description": 3}):
        with pytest.raises(UserError, match="a tool must be"):
            STYLES[style].describe([WEATHER, wrong])


@pytest.mark.parametrize("style", ["json", "signatures", "markdown"])
def test_parameters_that_are_no_schema(style):
    properties = [{"properties": []}, {"properties": {"a": "string"}}, {"properties": {}, "required": "a"}]
    for parameters in ([], {"type": "string"}, *properties):
        with pytest.raises(UserError, match='tool f: "parameters" must be the JSON schema of an object'):
            STYLES[style].describe([{"name": "f", "parameters": parameters}])


def test_nulls_of_a_table_are_no_part_of_a_schema():
    """In a column of structs each tool has the parameters of all."""
    x = {"type": "string", "enum": None, "items": None, "default": None}
    nulls = {"type": "object", "properties": {"x": x, "y": None}, "required": None}
    described = STYLES["json"].describe([{"name": "f", "parameters": nulls}])
    assert '"arguments":{"x":{"type":"string","default":null}}}' in described
    assert "- f(x?: string)" in STYLES["signatures"].describe([{"name": "f", "parameters": nulls}])


def test_parameters_under_another_name_are_not_lost():
    with pytest.raises(
        UserError, match="tool f: its arguments are described by \"parameters\", not by 'input_schema'"
    ):
        STYLES["json"].describe([{"name": "f", "input_schema": {"type": "object"}}])


@pytest.mark.parametrize(
    "schema, expected",
    [
        ({"type": "string", "description": "d", "default": "x", "minLength": 1}, "string"),
        ({"type": "integer"}, "integer"),
        ({"type": "number", "minimum": 0}, "number"),
        ({"type": "boolean"}, "boolean"),
        ({"type": ["string", "null"]}, "string | null"),
        ({"anyOf": [{"type": "integer"}, {"enum": ["a", 1]}]}, 'integer | "a" | 1'),
        ({"type": "string", "enum": ["é", '"']}, '"é" | "\\""'),
        ({"const": True}, "true"),
        ({"type": "array"}, "array"),
        ({"type": "array", "items": {"type": "string"}}, "string[]"),
        ({"type": "array", "items": {"enum": ["a", "b"]}}, '("a" | "b")[]'),
        ({"type": "array", "items": {"type": "array", "items": {"type": "number"}}}, "number[][]"),
        ({}, None),
        ({"type": "object"}, None),
        ({"type": "string", "properties": {}}, None),
        ({"type": "object", "properties": {"x": {"type": "string"}}}, None),
        ({"type": "array", "items": {"type": "object"}}, None),
        ({"type": "array", "prefixItems": [{"type": "string"}]}, None),
        ({"$ref": "#/x"}, None),
        ({"oneOf": [{"type": "string"}]}, None),
        ({"enum": []}, None),
        ({"enum": [{"a": 1}]}, None),
        ({"type": "date"}, None),
        ({"type": []}, None),
    ],
)
def test_the_type_of_a_parameter_in_a_signature(schema, expected):
    tools = [tool("f", {"a": {"type": "string"}, "p": schema}, ["p"])]
    if expected is None:
        with pytest.raises(
            UserError, match="tool f, parameter p: a signature can't write .*; --tool_style json can"
        ):
            STYLES["signatures"].describe(tools)
        STYLES["json"].describe(tools)
    else:
        assert f"\n- f(a?: string, p: {expected})\n" in STYLES["signatures"].describe(tools)


def test_names_that_a_signature_has_no_place_for():
    for tools in ([tool("f(x")], [tool("f", {"a: b": {"type": "string"}})]):
        with pytest.raises(UserError, match="--tool_style json can"):
            STYLES["signatures"].describe(tools)


def test_results_come_in_the_order_of_the_calls():
    def result(content, of=None):
        return {"role": "tool", "content": content, **({"tool_call_id": of} if of else {})}

    both = [{"id": "x", **CALLS[0]}, {"id": "y", **CALLS[1]}]
    answer, asked = {"role": "assistant", "content": "", "tool_calls": both}, {"role": "user", "content": "?"}
    turns = [asked, answer, result("2", "y"), result("1", "x"), answer, result("3", "x"), result("4", "y")]
    shown = "".join(turn["content"] for turn in in_order_of_calls([*turns, asked]))
    assert shown == "?1234?"
    for unordered in ([answer, result("2", "y"), result("1")], [asked, result("2", "y"), result("1", "x")]):
        assert in_order_of_calls(unordered) == unordered
    no_ids = [{**answer, "tool_calls": [CALLS[0], both[1]]}, result("2", "y"), result("1", "x")]
    assert in_order_of_calls(no_ids) == no_ids
    with pytest.raises(
        UserError, match="tool_call_id 'z' is of no call in the answer before; it has 'x', 'y'"
    ):
        in_order_of_calls([answer, result("1", "x"), result("2", "z")])


TALK = [
    {"role": "system", "content": "Be\n\nbrief."},
    {"role": "user", "content": "hot?"},
    {"role": "assistant", "content": "", "tool_calls": [{"id": "1", **CALLS[1]}, {"id": "2", **CALLS[1]}]},
    {"role": "tool", "tool_call_id": "2", "content": "b\n\nc"},
    {"role": "tool", "tool_call_id": "1", "content": "a"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "ok"},
    {"role": "assistant", "content": "bye"},
]
NOW = [{"name": "now"}]
WHOLE = {
    ("rwkv", "json"): (
        'System: Tools:\n[\n{"name":"now","arguments":{}}\n]\nReturn only a JSON function call.\n\n'
        "System: Be\nbrief.\n\nUser: hot?\n\nAssistant:|< "
        '```json\n{"name":"g","arguments":{}}\n```\n```json\n{"name":"g","arguments":{}}\n```>|<\n\n>|'
        "User: Function output:\na\n\nUser: Function output:\nb\nc\n\nAssistant:|< yes>|<\n\n>|"
        "User: ok\n\nAssistant:|< bye>"
    ),
    ("think-short", "signatures"): (
        "System: Tools:\n- now()\nReturn only a JSON function call.\n\n"
        "System: Be\nbrief.\n\nUser: hot? (think a bit)\n\nAssistant: <think|<>\n</think>\n"
        '```json\n{"name":"g","arguments":{}}\n```\n```json\n{"name":"g","arguments":{}}\n```>|<\n\n>|'
        "User: Function output:\na\n\nUser: Function output:\nb\nc\n\nAssistant: <think|<>\n</think>\nyes>|"
        "<\n\n>|User: ok (think a bit)\n\nAssistant: <think|<>\n</think>\nbye>"
    ),
    ("fake-think-compact", "hermes"): (
        'System: <tools>\n{"name": "now"}\n</tools>\n\n'
        "System: Be\nbrief.\n\nUser: hot?\n\nAssistant: <think></think|<>\n"
        '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>\n'
        '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>>|<\n\n>|'
        "Tool: a\n\nTool: b\nc\n\nAssistant: <think></think|<>\nyes>|<\n\n>|"
        "User: ok\n\nAssistant: <think></think|<>\nbye>"
    ),
    ("rwkv", "markdown"): (
        '### System\n### `now`\n**Description:** \n**Parameters:**\n```json\n{\n  "type": "object",\n'
        '  "properties": {}\n}\n```\n### System\nBe\nbrief.\n### User\nhot?\n### Assistant|<\n'
        '**Tool Call:**\n```json\n{\n  "name": "g",\n  "arguments": {}\n}\n```\n'
        '**Tool Call:**\n```json\n{\n  "name": "g",\n  "arguments": {}\n}\n```>|<\n>|'
        "### Tool Output\n```json\na\n```\n### Tool Output\n```json\nb\nc\n```\n### Assistant|<\nyes>|<\n>|"
        "### User\nok\n### Assistant|<\nbye>"
    ),
    ("flower", "json"): (
        'System✿Tools:\n[\n{"name":"now","arguments":{}}\n]\nReturn only a JSON function call.✿\n'
        "System✿Be\nbrief.✿\nUser✿hot?✿\nBot✿<think|<>\n</think>\n"
        '```json\n{"name":"g","arguments":{}}\n```\n```json\n{"name":"g","arguments":{}}\n```>|<✿>|'
        "\nUser✿Function output:\na✿\nUser✿Function output:\nb\nc✿\nBot✿<think|<>\n</think>\nyes>|<✿>|"
        "\nUser✿ok✿\nBot✿<think|<>\n</think>\nbye>|<✿>"
    ),
}


@pytest.mark.parametrize("name, style", WHOLE)
def test_a_whole_conversation(name, style):
    assert shown(RwkvTemplate(name, style).segments(TALK, NOW)) == WHOLE[name, style]


def test_markdown_opens_thoughts_below_the_heading():
    template = RwkvTemplate("think", "markdown")
    assert template.segments(TALK[1:2], ask=True)[0].text == "### User\nhot?\n### Assistant\n<think"
    answer = {"role": "assistant", "content": "yes", "reasoning_content": "hm"}
    thoughtful = RwkvTemplate("rwkv", "markdown").segments([TALK[1], answer])
    assert thoughtful[-1].text == "\n<think>\nhm\n</think>\nyes"


def test_what_ends_an_answer():
    ends = {"json": ("\n\nUser:",), "hermes": ("\n\nUser:", "\n\nTool:")}
    ends |= {"signatures": ends["json"], "markdown": ("\n### User", "\n### Tool Output")}
    for style, expected in ends.items():
        assert RwkvTemplate("think", style).stops == expected
        assert RwkvTemplate("flower", style).stops == ("✿",)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", ["rwkv", "think", "flower-fake-think"])
@pytest.mark.parametrize("kind", ["world", "bytes"])
def test_a_chat_with_tools_feeds_the_tokens_of_the_training(kind, name, style):
    tokenizer, template = named(kind), RwkvTemplate(name, style)
    conversation = Conversation(scripted(tokenizer), GREEDY, system=TALK[0]["content"], template=template)
    conversation.use_tools(NOW)
    answers = [text for text, weight in template.segments(TALK, NOW) if weight]
    answers = [text for text in answers if text not in ("\n\n", "\n", "✿")]
    follow = [*template.stops[-1:], *template.stops[:1], ""]
    in_order = in_order_of_calls(TALK)
    for new, answer, after in zip(
        (in_order[1:2], in_order[3:5], in_order[6:7]), answers, follow, strict=True
    ):
        conversation.engine = scripted(tokenizer, [*tokenizer.encode(answer + after), *tokenizer.eod])
        assert "".join(conversation.answer(new)) == answer
    calls = [{"type": "function", "function": call["function"]} for call in TALK[2]["tool_calls"]]
    assert conversation.turns[0].messages[-1]["tool_calls"] == calls
    ((ids, _),) = Encoder(tokenizer, template).encode({"messages": TALK, "tools": NOW})
    end = tokenizer.encode(template.turn_end)
    assert [*conversation.state, *end, *tokenizer.eod] == ids.tolist()


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", ["rwkv", "think", "fake-think"])
def test_a_call_is_the_right_answer_to_a_question(name, style, tmp_path):
    answer = {"role": "assistant", "content": "Both.", "tool_calls": CALLS}
    if name != "fake-think":
        answer["reasoning_content"] = "hm"
    row = {"messages": [{"role": "user", "content": "?"}, answer], "tools": TWO_TOOLS}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    (question,) = read_questions(tmp_path / "rows.jsonl", RwkvTemplate(name, style))
    assert question.answer == f"Both.\n{STYLES[style].calls(CALLS)}"
    assert question.prompt == "".join(
        text for text, _ in RwkvTemplate(name, style).segments(row["messages"][:1], TWO_TOOLS, ask=True)
    )
    (tmp_path / "rows.jsonl").write_text(f"\n{json.dumps({**row, 'tools': [{}]})}")
    with pytest.raises(UserError, match="rows.jsonl, line 2: a tool must be"):
        read_questions(tmp_path / "rows.jsonl", RwkvTemplate(name, style))


# styles in Jinja


def rendered(style, part, **values):
    """Render a part of the style in Jinja."""
    source = JinjaTemplate("x", "{% for m in messages %}{{ m.content }}{% endfor %}", "")
    jinja = tool_jinja(STYLES[style])
    whole = {
        "describe": jinja.describe,
        "calls": "{%- set answer = namespace(text='') -%}" + jinja.calls + "{{- answer.text -}}",
        "result": "{%- set text = message['content'] -%}" + jinja.result + "{{- text -}}",
    }
    return source.template.environment.from_string(jinja.macros + whole[part]).render(**values)


@pytest.mark.parametrize("style", STYLES)
def test_jinja_writes_the_same(style):
    kinds = {
        "a": {"type": "array", "items": {"enum": ["é", 1]}},
        "b": {"type": ["string", "null"]},
        "items": {"anyOf": [{"const": None}, {"type": "array"}]},
    }
    tools = [*TWO_TOOLS, tool("f", kinds, ["b"])]
    assert rendered(style, "describe", tools=tools) == STYLES[style].describe(tools)
    rng = random.Random(style)
    for _ in range(5):
        arguments = {"x": made_up(rng), "é\n": made_up(rng)}
        calls = [{"name": "f", "arguments": arguments}, {"function": {"name": "g", "arguments": {}}}]
        message = {"role": "assistant", "tool_calls": calls}
        assert rendered(style, "calls", message=message) == STYLES[style].calls(calls)
    assert rendered(style, "calls", message={}) == ""
    for content in ("", "3\n{}"):
        message = {"role": "tool", "content": content}
        assert rendered(style, "result", message=message) == STYLES[style].result(content)[1]


def test_jinja_refuses_what_a_signature_can_not_write():
    for schema in ({"type": "object"}, {}, {"$ref": "#"}, {"type": "array", "items": {"type": "object"}}):
        with pytest.raises(jinja2.TemplateError, match="a signature can't write"):
            rendered("signatures", "describe", tools=[tool("f", {"a": schema})])


@pytest.mark.parametrize("style", STYLES)
def test_arguments_as_text_stay_as_they_are_in_jinja(style):
    message = {"tool_calls": [{"function": {"name": "f", "arguments": '{"a":  1}'}}]}
    text = rendered(style, "calls", message=message)
    assert '{"a":  1}' in text and STYLES[style].parse(text) == ("", [call("f", {"a": 1})])
