"""Requests: what they ask for, what is refused, and how an answer's text becomes thoughts, content and calls,
without a network.
"""

import dataclasses
import json
import random
import re

import pytest

pytest.importorskip("llguidance", reason="NO llguidance: the server's forms are not tested")
pytest.importorskip(
    "starlette", reason="NO starlette (pip install starlette uvicorn): the server is not tested"
)
pytest.importorskip("h11", reason="NO h11 (pip install starlette uvicorn): the server is not tested")

import h11

from src.data.rwkv_template import MODES, RwkvTemplate
from src.data.templates import load_template
from src.data.tokenizer import load_tokenizer
from src.inference.adapters import Applied
from src.inference.logit_changes import NO_CHANGES, LogitChanges
from src.inference.sampling import FAKE_THINK, OPEN_THINK, Sampling
from src.serving.app import Routes
from src.serving.chat_text import ChatText
from src.serving.errors import Refused
from src.serving.guard import Guard, host_name, is_own_machine
from src.serving.http_parser import HttpParser
from src.serving.limits import Limits
from src.serving.request_parsing import Chosen, Defaults, RequestReader, read_chat, read_completion
from src.serving.served_models import OUTSIDE, inside
from src.serving.states import States
from src.serving.think_modes import efforts_of
from src.serving.token_requests import read_detokenize, read_tokenize, tokenizer_info
from src.serving.tools import NO_TOOLS, Tools

from .test_templates import CHATML

TOKENIZER = load_tokenizer("bytes", 256)
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "weather", "description": "Of a city", "parameters": CITY}
TOOL = {"type": "function", "function": WEATHER}
OTHER = {"type": "function", "function": {"name": "time"}}
UNIQUE = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
STRICT = {"type": "function", "function": {"name": "strict", "parameters": UNIQUE, "strict": True}}
ONLY = {"type": "object", "additionalProperties": False}
INDENTED = '{\n  "name": "time",\n  "arguments": {}\n}'
HI = [{"role": "user", "content": "hi"}]


def reader(template=None, bos=(), limits=None, **defaults):
    template = template or RwkvTemplate("rwkv", "json")

    def find(fields):
        return Chosen(fields.text("model") or "tiny", Applied(), template, bos, "fp_0")

    return RequestReader(TOKENIZER, find, limits or Limits(), Defaults(**defaults), States(0))


def chat(template=None, messages=HI, defaults=None, **fields):
    """Read a chat request."""
    return read_chat(reader(template, **(defaults or {})), {"messages": messages, **fields})


def prompt_of(asked):
    return TOKENIZER.decode(asked.requests[0].tokens)


def refused(body, read=read_chat, **options):
    """(status, field) of a refusal."""
    with pytest.raises(Refused) as caught:
        read(reader(**options), body)
    assert caught.value.as_object()["error"]["message"]
    return caught.value.status, caught.value.param


def test_only_an_answer_that_need_not_repeat_goes_on_after_the_one_before():
    (sampled,) = chat(temperature=1).requests
    assert sampled.continues
    for exact in (
        chat(temperature=0),
        chat(temperature=1, seed=0),
        chat(temperature=1, defaults={"seed": 3}),
        read_completion(reader(), {"prompt": "hi", "temperature": 1}),
    ):
        (request,) = exact.requests
        assert not request.continues


def test_a_conversation_is_written_as_the_template_has_it():
    messages = [
        {"role": "developer", "content": "Be\n\nbrief."},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "1, 2", "refusal": None},
        {"role": "user", "content": "more", "name": "me"},
    ]
    asked = chat(messages=messages, defaults={"bos": (0,)})
    assert prompt_of(asked) == (
        "\0System: Be\nbrief.\n\nUser: one\ntwo\n\nAssistant: 1, 2\n\nUser: more\n\nAssistant:"
    )
    assert asked.requests[0].stops == ("\n\nUser:",) and not asked.ignored


def test_the_operators_system_turn_gives_way_to_the_clients():
    assert prompt_of(chat(defaults={"system": "S"})) == "System: S\n\nUser: hi\n\nAssistant:"
    own = [{"role": "system", "content": "T"}, *HI]
    assert prompt_of(chat(messages=own, defaults={"system": "S"})).startswith("System: T\n\nUser: hi")


@pytest.mark.parametrize(
    "fields, end",
    [
        ({"reasoning_effort": "none"}, "User: hi\n\nAssistant:"),
        ({"reasoning_effort": "low"}, "User: hi (think a bit)\n\nAssistant: <think"),
        ({"reasoning_effort": "medium"}, "User: hi (think)\n\nAssistant: <think"),
        ({"reasoning_effort": "high"}, "User: hi (think a lot)\n\nAssistant: <think"),
        ({"think_mode": "think"}, "User: hi\n\nAssistant: <think"),
        ({"think_mode": "flower"}, "User✿hi✿\nBot✿<think"),
        ({"think_type": "fast"}, "User: hi\n\nAssistant: <think></think"),
        ({"think_type": "preferChinese"}, "User: hi\n\nAssistant: <think>嗯"),
    ],
)
def test_a_request_chooses_whether_the_model_thinks(fields, end):
    assert prompt_of(chat(**fields)) == end


def test_efforts_keep_to_the_family_of_the_template():
    def end(name, effort):
        return prompt_of(chat(RwkvTemplate(name), reasoning_effort=effort))

    assert end("think", "none") == "User: hi\n\nAssistant: <think></think"
    assert end("think-normal-2025", "high") == "User: hi think a lot\n\nAssistant: <think"
    assert end("flower", "none").endswith("Bot✿<think></think")
    assert end("flower-fake-think", "medium").endswith("Bot✿<think")
    assert efforts_of(RwkvTemplate("flower")) == ["none", "medium"]
    body = {"messages": HI, "reasoning_effort": "high"}
    assert refused(body, template=RwkvTemplate("flower")) == (400, "reasoning_effort")
    jinja = load_template(CHATML)
    assert refused(body, template=jinja) == (400, "reasoning_effort") and efforts_of(jinja) == []
    assert refused({**body, "think_mode": "think"}) == (400, "think_mode")


def test_thoughts_of_earlier_answers_are_left_out_where_a_mode_has_no_place_for_them():
    messages = [*HI, {"role": "assistant", "content": "yes", "reasoning_content": "hm"}, *HI]
    inline = [*HI, {"role": "assistant", "content": "<think>hm</think>yes"}, *HI]
    for conversation in (messages, inline):
        kept = prompt_of(chat(messages=conversation, think_mode="think"))
        assert "Assistant: <think>\nhm\n</think>\nyes\n\nUser" in kept
        plain = prompt_of(chat(messages=conversation, think_mode="fake-think-compact"))
        assert "Assistant: <think></think>\nyes\n\nUser" in plain and "hm" not in plain


def test_sampling_is_what_is_recommended_then_the_operators_then_the_requests():
    assert chat().requests[0].sampling == Sampling()
    assert chat(think_mode="think").requests[0].sampling == OPEN_THINK
    assert chat(think_type="fast").requests[0].sampling == FAKE_THINK
    operator = {"sampling": {"temperature": 0.5}}
    got = chat(think_mode="think", defaults=operator).requests[0].sampling
    assert (got.temperature, got.top_k) == (0.5, OPEN_THINK.top_k)
    asked = chat(
        temperature=2, top_p=0, top_k=-1, presence_penalty=-1, alpha_frequency=0.25, penalty_decay=0.9
    )
    assert asked.requests[0].sampling == Sampling(2.0, 1e-6, 0, -1.0, 0.25, 0.9)


def test_what_else_a_request_says_reaches_the_engine():
    asked = chat(
        n=3, seed=7, max_tokens=5, max_completion_tokens=5, stop="END", logprobs=True, top_logprobs=2
    )
    request = asked.requests[0]
    assert (request.n, request.seed, request.max_tokens, request.logprobs) == (3, 7, 5, 2)
    assert request.stops == ("\n\nUser:", "END")
    assert chat(stop=["a", "b"]).requests[0].stops[1:] == ("a", "b")
    assert chat().requests[0].max_tokens == Defaults().max_tokens
    assert len({chat().requests[0].seed for _ in range(9)}) == 9
    assert chat(defaults={"seed": 3}).requests[0].seed == 3
    changes = {"min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 3, "ignore_eos": True}
    request = chat(logit_bias={"7": -2.5, "08": 1}, stop="END", **changes).requests[0]
    assert request.changes == LogitChanges({7: -2.5, 8: 1.0}, **changes)
    assert request.stops == ("END",) and chat(logit_bias={}).requests[0].changes == NO_CHANGES
    asked = chat(stream=True, stream_options={"include_usage": True}, user="me", frobnicate=1, logit_bias={})
    assert (asked.stream, asked.usage, asked.ignored) == (True, True, ["frobnicate"])


def test_a_prompt_has_a_limit():
    assert refused({"messages": HI}, limits=Limits(prompt_tokens=19)) == (400, "messages")
    assert refused({"prompt": "x" * 21}, read_completion, limits=Limits(prompt_tokens=20)) == (400, "prompt")


def test_too_many_ids_are_refused_before_they_become_text(monkeypatch):
    """Each may be a long text."""
    monkeypatch.setattr(type(TOKENIZER), "decode", lambda *given: pytest.fail("it was decoded"))
    ids, limits = [97] * 21, Limits(prompt_tokens=20)
    assert refused({"prompt": ids}, read_completion, limits=limits) == (400, "prompt")
    assert refused({"tokens": ids}, read_detokenize, limits=limits) == (400, "tokens")


def complete(body, **options):
    asked = read_completion(reader(**options), body)
    return [list(request.tokens) for request in asked.requests], asked


def test_prompts_of_completions():
    a, b = [97], [98]
    assert complete({"prompt": "a"})[0] == [a]
    assert complete({"prompt": ["a", "b"]})[0] == [a, b] == complete({"prompt": [a, b]})[0]
    assert complete({"prompt": a})[0] == [a]
    assert complete({"prompt": "a"}, bos=(0,))[0] == [[0, 97]] and complete({"prompt": a}, bos=(0,))[0] == [a]
    for empty in ({"prompt": ""}, {"prompt": [""]}, {"prompt": [[]]}):
        assert complete(empty)[0] == [[0]]
    _, asked = complete({"prompt": ["a", "b"], "echo": True, "n": 2, "stop": "."})
    assert [prompt.text for prompt in asked.prompts] == ["a", "b"] and asked.requests[1].stops == (".",)


def test_texts_become_tokens_and_back():
    def told(body, read=read_tokenize, **options):
        return read(reader(bos=(0,), **options), body)

    value, ignored = told({"prompt": "é!", "return_token_strs": True, "zeal": 1})
    assert (value["tokens"], value["count"], ignored) == ([0, 0xC3, 0xA9, 33], 4, ["zeal"])
    assert value["token_strs"] == ["\0", "bytes:\\xc3", "bytes:\\xa9", "!"]
    assert told({"prompt": "a", "add_special_tokens": False}).value["tokens"] == [97]
    # as llama-server has it
    assert told({"content": "a"}).value["tokens"] == [97]
    assert told({"content": "a", "add_special": True}).value["tokens"] == [0, 97]
    value, ignored = told({"messages": HI, "tools": [TOOL], "add_generation_prompt": True, "zeal": 1})
    assert value["tokens"] == [0, *chat(tools=[TOOL]).requests[0].tokens] and ignored == ["zeal"]
    text = {"prompt": "é!", "content": "é!"}
    assert told({"tokens": [0xC3, 0xA9, 33]}, read_detokenize).value == text
    assert refused({"prompt": "x" * 99}, read_tokenize, limits=Limits(prompt_tokens=20)) == (400, "prompt")


def test_the_tokenizer_names_its_tokens(tmp_path):
    info = tokenizer_info(reader())
    assert (info["eos_token"], info["bos_token"], info["vocab_size"]) == ("\0", None, 256)
    (tmp_path / "vocabulary.txt").write_text("1 'a' 1\n2 'b' 1\n")  # the end of document, 0, has no text
    small = load_tokenizer(str(tmp_path / "vocabulary.txt"), 3)
    world = dataclasses.replace(reader(load_template(CHATML), bos=(0,)), tokenizer=small)
    info = tokenizer_info(world)
    assert info["name"] == "vocabulary.txt"
    assert info["bos_token"] == info["eos_token"] and info["chat_template"].startswith("{%")
    for name in ("eos_token", "bos_token"):
        plain = {"prompt": info[name], "add_special_tokens": False}
        assert read_tokenize(world, plain).value["tokens"] == [0]


def test_tools_are_described():
    described = prompt_of(chat(tools=[TOOL, OTHER]))
    assert described.startswith('System: Tools:\n[\n{"name":"weather"') and described.endswith("Assistant:")
    assert prompt_of(chat(tools=[TOOL], tool_choice="none")) == "User: hi\n\nAssistant:"
    assert prompt_of(chat(tools=[TOOL, OTHER], tool_choice="required")) == described


def test_forced_calls_end():
    for parallel, most in ((True, 8), (False, 1)):
        asked = chat(tools=[OTHER], tool_choice="required", parallel_tool_calls=parallel)
        calls = asked.template.tools.calls([{"name": "time", "arguments": {}}] * most)
        constraint = asked.requests[0].form.start(())
        for token in calls.encode():
            assert constraint.mask()[token] and not constraint.ended
            constraint.accept(token)
        assert constraint.ended


@pytest.mark.parametrize(
    "fields, fits, others",
    [
        ({"guided_regex": r"\d\w"}, ["3a", "3_"], ["\u0663a", "3\u00e9"]),
        (
            {"guided_json": {"required": ["a"], "properties": {"a": {"const": 5}}, **ONLY}},
            ['{"a":5}', '{"a": 5}', '{\n  "a": 5\n}', '{\n\t"a": 5\n}'],
            ['{"a":  5}', '{\n\n"a": 5}', '{"a": 5\n \n}', "{\n" + " " * 17 + '"a": 5}'],
        ),
        (
            {"tools": [OTHER], "tool_choice": {"type": "function", "function": {"name": "time"}}},
            [f"```json\n{call}\n```" for call in ('{"name": "time", "arguments": {}}', INDENTED)],
            ['```json\n{"name":  "time", "arguments": {}}\n```'],
        ),
    ],
)
def test_a_form_has_these_texts_and_not_the_others(fields, fits, others):
    matcher = chat(**fields).requests[0].form.matcher
    for text in (*fits, *others):
        one, tokens = matcher.deep_copy(), list(text.encode())
        whole = one.try_consume_tokens(tokens) == len(tokens) and one.is_accepting()
        assert whole == (text in fits), text


def test_the_results_of_tools_follow_their_calls():
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    messages = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]
    text = prompt_of(chat(messages=messages, tools=[TOOL]))
    assert text.endswith(
        'Assistant: ```json\n{"name":"weather","arguments":{"city":"Paris"}}\n```\n\n'
        "User: Function output:\nrain\n\nAssistant:"
    )
    messages[-1]["tool_call_id"] = "c2"
    assert refused({"messages": messages, "tools": [TOOL]}) == (400, "messages")


def pieces_of(text, template, tools, cuts):
    """(thoughts, content, calls) of an answer that comes cut at these places."""
    said = ChatText(template, tools)
    bounds = [0, *sorted(cuts), len(text)]
    deltas = [said.push(text[begin:end]) for begin, end in zip(bounds, bounds[1:])] + [said.finish()]
    return (
        "".join(delta.thoughts for delta in deltas),
        "".join(delta.content for delta in deltas),
        [json.loads(call["function"]["arguments"]) for delta in deltas for call in delta.calls],
    )


CALL = '```json\n{"name": "weather", "arguments": {"city": "Rom"}}\n```'


@pytest.mark.parametrize(
    "mode, generated, expected",
    [
        ("rwkv", "  Hi  there. \n", ("", "Hi  there.", [])),
        ("rwkv", " <think>\nhm\n</think>\n\nYes", ("hm", "Yes", [])),
        ("rwkv", " <thin ice", ("", "<thin ice", [])),
        ("rwkv", "", ("", "", [])),
        ("think", ">\nhm <b> </thin\n</think>\nYes", ("hm <b> </thin", "Yes", [])),
        ("think", ">\nnever ends </th", ("never ends </th", "", [])),
        ("think", "ing", ("ing", "", [])),
        ("think-chinese", "，好\n</think>\n是", ("嗯，好", "是", [])),
        ("fake-think", ">\nYes", ("", "Yes", [])),
        ("fake-think-compact", "\nYes > no", ("", "Yes > no", [])),
        ("flower", ">\nhm</think>Yes", ("hm", "Yes", [])),
        ("rwkv", f"Let me see.\n{CALL}", ("", "Let me see.", [{"city": "Rom"}])),
        ("rwkv", f" {CALL}\n{CALL}\n", ("", "", [{"city": "Rom"}] * 2)),
        ("rwkv", f"{CALL}\nand so on", ("", f"{CALL}\nand so on", [])),
        ("rwkv", "``` and ```js", ("", "``` and ```js", [])),
        ("rwkv", "```json\n{}\n``` no, ", ("", "```json\n{}\n``` no,", [])),
        ("think", f">\nA call?\n{CALL}\n</think>\n{CALL}", (f"A call?\n{CALL}", "", [{"city": "Rom"}])),
    ],
)
def test_thoughts_content_and_calls_are_the_same_however_the_text_is_cut(mode, generated, expected):
    template, tools = RwkvTemplate(mode, "json"), Tools([TOOL], [], True)
    assert pieces_of(generated, template, tools, range(1, len(generated))) == expected
    random.seed(1)
    for _ in range(20):
        cuts = random.sample(range(len(generated) + 1), min(3, len(generated)))
        assert pieces_of(generated, template, tools, cuts) == expected
    if not expected[2]:
        assert pieces_of(generated, template, NO_TOOLS, []) == expected


def test_without_parallel_calls_one_is_taken():
    template, tools = RwkvTemplate("rwkv", "json"), Tools([TOOL], [], False)
    assert pieces_of(f"{CALL}\n{CALL}", template, tools, []) == ("", "", [{"city": "Rom"}])


@pytest.mark.parametrize("style", ["json", "signatures", "markdown", "hermes"])
def test_calls_of_every_style_are_found(style):
    template = RwkvTemplate("rwkv", style)
    call = {"function": {"name": "weather", "arguments": {"city": "Rom"}}}
    text = f"So:\n{template.tools.calls([call, call])}"
    expected = "", "So:", [{"city": "Rom"}] * 2
    assert pieces_of(text, template, Tools([TOOL], [], True), range(1, len(text))) == expected
    jinja = load_template(CHATML)
    assert pieces_of(text, jinja, Tools([TOOL], [], True), range(1, len(text))) == expected


def test_every_mode_has_a_form():
    for mode in MODES:
        assert chat(think_mode=mode).template.name == mode


@pytest.mark.parametrize(
    "headers, guard, status",
    [
        ({"host": "127.0.0.1:8000"}, Guard((), frozenset({"127.0.0.1"})), None),
        ({"host": "evil.example"}, Guard((), frozenset({"127.0.0.1"})), 403),
        ({}, Guard((), frozenset({"127.0.0.1"})), 403),
        ({"host": "evil.example"}, Guard(("k" * 9,)), 401),
        ({"host": "a", "authorization": "Bearer kk"}, Guard(("kk",)), None),
        ({"host": "a", "authorization": "bearer  kk "}, Guard(("kk",)), None),
        ({"host": "a", "authorization": "Basic kk"}, Guard(("kk",)), 401),
        ({"host": "a", "authorization": "Bearer k"}, Guard(("kk",)), 401),
        ({"host": "a", "authorization": "Bearer \xff"}, Guard(("kk",)), 401),
        ({"host": "a:1", "origin": "http://a:1"}, Guard(), None),
        ({"host": "a:1", "origin": "http://b:1"}, Guard(), 403),
        ({"host": "a:1", "origin": "null"}, Guard(), 403),
        ({"host": "a:1", "origin": "http://["}, Guard(), 403),
        ({"host": "a:1", "origin": "http://b:1"}, Guard((), None, frozenset({"http://b:1"})), None),
    ],
)
def test_who_may_ask(headers, guard, status):
    raw = {name.encode(): value.encode("latin-1") for name, value in headers.items()}
    if status is None:
        guard.check("POST", "/v1/models", raw)
        return
    with pytest.raises(Refused) as caught:
        guard.check("POST", "/v1/models", raw)
    assert caught.value.status == status


def test_the_page_and_the_health_need_no_key():
    for path in ("/", "/page/app.js", "/health"):
        Guard(("kk",)).check("GET", path, {b"host": b"a"})
        with pytest.raises(Refused):
            Guard(("kk",)).check("POST", path, {b"host": b"a"})


CHANGES = [
    (method, route.path.format(name="x", id="x"))
    for route in Routes(None, None, {}).all()
    for method in sorted(route.methods & {"POST", "DELETE"})
    if re.search("adapter|state", route.path)
]


@pytest.mark.parametrize("method, path", CHANGES)
def test_adapters_and_states_are_changed_with_an_admins_key_only(method, path):
    def status(guard, method, path, key):
        headers = {b"host": b"a", b"authorization": f"Bearer {key}".encode()}
        try:
            guard.check(method, path, headers)
        except Refused as refused:
            return refused.status
        return 200

    asked = [
        (method, path),
        ("GET", path),
        ("POST", "/v1/x"),
    ]
    for keys, admin_keys, key, statuses in (
        (("k", "l"), ("adm", "other"), "adm", [200, 200, 200]),
        (("k", "l"), ("adm", "other"), "other", [200, 200, 200]),
        (("k", "l"), ("adm", "other"), "l", [403, 200, 200]),
        (("k", "l"), ("adm", "other"), "x", [401, 401, 401]),
        (("k", "l"), (), "l", [200, 200, 200]),
        ((), ("adm",), "adm", [200, 200, 200]),
        ((), ("adm",), "", [401, 200, 200]),
    ):
        guard = Guard(keys, None, admin_keys=admin_keys)
        assert [status(guard, *one, key) for one in asked] == statuses, (keys, admin_keys, key)


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n"


@pytest.mark.parametrize(
    "raw, fits",
    [
        (HEAD + b"Content-Length: 3\r\n\r\na\nb", True),
        (CHUNKED + b"\r\n", True),
        (CHUNKED + b"Trailer: x\r\n\r\n", True),
        (HEAD + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", False),
        (HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 30\r\n\r\n0\r\n\r\n", False),
        (HEAD + b"Transfer-Encoding: x, chunked\r\n\r\n0\r\n\r\n", False),
        (HEAD + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabc", False),
        (HEAD + b"Content-Length: 3\r\ncontent-length: 3\r\n\r\nabc", False),
        (HEAD + b"Content-Length: 3, 3\r\n\r\nabc", False),
        (HEAD + b"X: y\r\n Content-Length: 4\r\nContent-Length: 3\r\n\r\nabc", False),
        (HEAD + b"Content-Length: +3\r\n\r\nabc", False),
        (HEAD.replace(b"\r\n", b"\n") + b"Content-Length: 3\n\nabc", False),
        (HEAD + b"X: y\nContent-Length: 3\r\n\r\nabc", False),
        (HEAD + b"Content-Length: 3\r\n\nabc", False),
        (CHUNKED + b"\n", False),
        (CHUNKED + b"X: y\n\n", False),
    ],
)
def test_a_request_that_can_be_read_in_two_ways_is_refused(raw, fits):
    def events(parts):
        parser, seen = HttpParser(), b""
        for part in parts:
            parser.receive_data(part)
            while (event := parser.next_event()) is not h11.NEED_DATA:
                seen += getattr(event, "data", b"")
                if isinstance(event, h11.EndOfMessage):
                    return seen
        return None

    for parts in ([raw], [bytes([byte]) for byte in raw]):
        if fits:
            assert len(events(parts)) == 3
            continue
        with pytest.raises(h11.RemoteProtocolError):
            events(parts)


def test_hosts():
    assert [host_name(host) for host in ("A:80", "[::1]:8000", "::1", "b")] == ["a", "::1", "", "b"]
    own = {
        host: is_own_machine(host) for host in ("127.0.0.1", "localhost", "::1", "127.9.9.9", "0.0.0.0", "::")
    }
    assert list(own.values()) == [True] * 4 + [False] * 2


def test_only_files_below_the_folder_can_be_named(tmp_path):
    folder, outside = tmp_path / "adapters", tmp_path / "secret.pth"
    (folder / "sub").mkdir(parents=True)
    for path in (folder / "a.pth", folder / "sub" / "b.pth", outside):
        path.write_bytes(b"x")
    (folder / "out.pth").symlink_to(outside)
    (folder / "up").symlink_to(tmp_path)
    (folder / "in.pth").symlink_to(folder / "a.pth")
    root = str(folder.resolve())
    assert inside(root, "a.pth") == f"{root}/a.pth" == inside(root, "in.pth")
    assert inside(root, "sub/b.pth") == f"{root}/sub/b.pth"
    messages = set()
    names = "../secret.pth ../absent.pth out.pth up/secret.pth sub . absent.pth hf://a/b sub/../a.pth"
    # ".." after a link leads to another place than after a folder, so it would tell which of them is there
    over = "../adapters/a.pth ../absent/../adapters/a.pth up/../a.pth sub/.."
    for name in (*names.split(), *over.split(), str(outside), f"{root}/a.pth", "a.pth\0", "x" * 9999):
        with pytest.raises(Refused) as caught:
            inside(root, name)
        assert (caught.value.status, caught.value.param) == (400, "file")
        messages.add(caught.value.message.partition(", and ")[2])
    assert messages == {OUTSIDE.removeprefix("and ")}  # no word tells whether a file outside exists
