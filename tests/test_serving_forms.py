"""Forms of answers over OpenAI's API: a random model gives JSON of schemas, calls, texts of grammars."""

import functools
import json
import re
import sys
import typing

import pytest

pytest.importorskip("llguidance", reason="NO llguidance (the extra test has it): forms are not tested")
pytest.importorskip("starlette", reason="NO starlette (the extra test has it): forms are not tested")
pytest.importorskip("uvicorn", reason="NO uvicorn (the extra test has it): forms are not tested")
pytest.importorskip("openai", reason="NO openai (the extra test has it): forms are not tested")
pytest.importorskip("httpx", reason="NO httpx (the extra test has it): forms are not tested")

import httpx
import openai
import pydantic

from rwkv_miss import UserError
from src.data.rwkv_template import RwkvTemplate
from src.inference import constraint
from src.inference.constraint import GrammarCompiler
from src.serving.limits import Limits
from src.serving.request_parsing import Defaults
from src.serving.served_models import ServedModels

from .serving import no_adapters, records, running, scripted
from .test_engine import engine_of, tokenizer_of
from .test_serving import HI, client_of
from .test_serving_protocol import ONLY, OTHER, STRICT, TOOL

SIZE = {"type": "object", "properties": {"size": {"enum": ["S", "M"]}}, "required": ["size"]}
BUY = {"type": "function", "function": {"name": "buy", "parameters": SIZE, "strict": True}}


class Dish(pydantic.BaseModel):
    kind: typing.Literal["soup", "cake"]
    name: str = pydantic.Field(max_length=6)
    parts: list[bool] = pydantic.Field(max_length=4)
    price: typing.Annotated[int, pydantic.Field(ge=0, le=99)] | None


def random_model(template=None, **options):
    """A server of a random model, which says anything."""
    engine = engine_of(rows=8, chunk=16)
    served = ServedModels("tiny", no_adapters(), records(tokenizer_of("bytes"), template), 1.0, None)
    defaults = Defaults(300, "", {"temperature": 1.0, "top_p": 1.0}, 0)
    return running(engine, served, Limits(finishing=5), defaults, **options)


def streamed(create, n, **asked):
    """(content, calls as (name, arguments), finish) of each answer of a stream."""
    found = [["", [], ""] for _ in range(n)]
    for chunk in create(stream=True, n=n, **asked):
        for choice in chunk.choices:
            one, delta = found[choice.index], choice.delta
            one[0] += delta.content or ""
            one[1] += [(call.function.name, call.function.arguments) for call in delta.tool_calls or ()]
            one[2] = choice.finish_reason or one[2]
    return [tuple(one) for one in found]


def whole(create, n, **asked):
    choices = create(n=n, **asked).choices
    return [
        (
            choice.message.content or "",
            [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()],
            choice.finish_reason,
        )
        for choice in choices
    ]


def test_pydantic_models_come_back():
    with random_model() as server:
        parse = client_of(server).chat.completions.parse
        for seed in range(3):
            answer = parse(model="tiny", messages=HI, response_format=Dish, seed=seed).choices[0]
            assert answer.finish_reason == "stop" and isinstance(answer.message.parsed, Dish)
        with pytest.raises(openai.LengthFinishReasonError):
            parse(model="tiny", messages=HI, response_format=Dish, max_tokens=3)


def test_an_answer_has_the_form_that_is_asked_for_also_in_a_stream():
    fields = {
        "a regex": ({"guided_regex": "[a-z]{3}-\\d{2}"}, lambda text: re.fullmatch("[a-z]{3}-\\d{2}", text)),
        "a choice": ({"guided_choice": ["yes", "no\u00e9"]}, lambda text: text in ("yes", "no\u00e9")),
        "GBNF": ({"grammar": 'root ::= "<" [ab]+ ">"'}, lambda text: re.fullmatch("<[ab]+>", text)),
        "Lark": ({"grammar": 'start: "(" /[0-9]{4}/ ")"'}, lambda text: re.fullmatch("[(][0-9]{4}[)]", text)),
        "JSON": ({"guided_json": json.dumps(SIZE | ONLY)}, lambda text: json.loads(text)["size"] in "SM"),
    }
    with random_model() as server:
        client = client_of(server)
        for extra, fits in fields.values():
            asked = {"model": "tiny", "extra_body": extra}
            chat = functools.partial(client.chat.completions.create, messages=HI, **asked)
            answers = whole(chat, 2)
            assert streamed(chat, 2) == answers
            assert all(finish == "stop" and fits(text) for text, _, finish in answers)
            texts = client.completions.create(prompt="Q", n=2, **asked).choices
            assert all(one.finish_reason == "stop" and fits(one.text) for one in texts)
        for letter, word in (("n", "no\u00e9"), ("y", "yes")):
            asked = {"extra_body": {"guided_choice": ["yes", "no\u00e9"], "ignore_eos": True, "min_p": 0.9}}
            asked |= {"model": "tiny", "prompt": "Q", "logit_bias": {str(ord(letter)): 100}}
            assert client.completions.create(**asked).choices[0].text == word
        empty = {"extra_body": {"guided_regex": "()", "ignore_eos": True, "min_tokens": 3}}
        ended = client.completions.create(model="tiny", prompt="Q", **empty).choices[0]
        assert (ended.text, ended.finish_reason) == ("", "stop")
        form = {"response_format": {"type": "json_object"}}
        for text, _, finish in whole(client.chat.completions.create, 4, model="tiny", messages=HI, **form):
            assert finish == "length" or isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    "mode, style",
    [("rwkv", "json"), ("fake-think", "markdown"), ("flower-fake-think", "hermes"), ("rwkv", "signatures")],
)
def test_a_forced_call_is_one_of_an_offered_tool(mode, style):
    named = {"type": "function", "function": {"name": "buy"}}
    with random_model(RwkvTemplate(mode, style)) as server:
        create = functools.partial(client_of(server).chat.completions.create, model="tiny", messages=HI)
        asked = {"tools": [BUY, OTHER], "tool_choice": "required", "parallel_tool_calls": False}
        answers = streamed(create, 3, **asked)
        answers += whole(create, 3, **{**asked, "tool_choice": named})
        assert {name for _, [(name, _)], _ in answers[3:]} == {"buy"}
        for content, [(name, arguments)], finish in answers:
            assert (content, finish) == ("", "tool_calls")
            value = json.loads(arguments)
            assert value in ({"size": "S"}, {"size": "M"}) if name == "buy" else (name, value) == ("time", {})


def test_thoughts_come_before_a_form():
    script = '>\nA {"cake"?\n\nUser: </think>\n```json\n{"name": "buy", "arguments": {"size": "M"}}\n```'
    with scripted(script, RwkvTemplate("think", "json")) as server:
        create = functools.partial(client_of(server).chat.completions.create, model="tiny", messages=HI)
        message = create(tools=[BUY], tool_choice="required", max_tokens=200).choices[0].message
        assert message.reasoning_content == 'A {"cake"?\n\nUser:'
        assert message.tool_calls[0].function.arguments == '{"size": "M"}'
    with scripted('>\nhm</think>\n{"size": "S"} and more', RwkvTemplate("think", "json")) as server:
        form = {"type": "json_schema", "json_schema": {"name": "size", "schema": SIZE}}
        answer = client_of(server).chat.completions.create(model="tiny", messages=HI, response_format=form)
        message = answer.choices[0].message
        assert (message.reasoning_content, message.content) == ("hm", '{"size": "S"}')


@pytest.mark.parametrize("style", ["hermes", "markdown"])
def test_a_call_that_has_begun_is_held_to_a_tool(style):
    template = RwkvTemplate("rwkv", style)
    begin = template.tools.before_call
    with scripted(f'I look.\n{begin}{{"name": "buyer", "arguments": 3', template) as server:
        create = functools.partial(client_of(server).chat.completions.create, model="tiny", messages=HI)
        answers = whole(create, 1, tools=[BUY], max_tokens=600)
        assert answers == [("I look.", [("buy", answers[0][1][0][1])], "tool_calls")]
        assert json.loads(answers[0][1][0][1])["size"] in "SM"
    with scripted("A <tool> is\n\nUser: x", template) as server:
        answers = whole(
            functools.partial(client_of(server).chat.completions.create, messages=HI),
            1,
            model="tiny",
            tools=[BUY],
        )
        stop = template.stops[0]
        assert answers == [(("A <tool> is\n\nUser: x").partition(stop)[0], [], "stop")]


def test_a_form_past_its_deadline_is_an_error_of_the_request(monkeypatch):
    monkeypatch.setattr(constraint, "DEADLINE", 0.0)
    with random_model() as server:
        url, asked = f"{server.url}/v1/chat/completions", {"messages": HI, "guided_regex": "a*", "n": 2}
        reply = httpx.post(url, json=asked)
        assert reply.status_code == 400, reply.text
        error = reply.json()["error"]
        assert "ask for a simpler form" in error["message"] and error["type"] == "invalid_request_error"
        *_, last = httpx.post(url, json={**asked, "stream": True}).text.split("data: ")[:-1]
        assert json.loads(last)["error"]["type"] == "invalid_request_error"
        assert "error" not in httpx.post(url, json={"messages": HI, "max_tokens": 2}).json()


def test_without_llguidance_a_form_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match="pip install llguidance"):
        GrammarCompiler(tokenizer_of("bytes"))
    with scripted("Hello.", RwkvTemplate("rwkv", "hermes")) as server:
        asked = {"messages": HI, "guided_regex": "a"}
        reply = httpx.post(f"{server.url}/v1/chat/completions", json=asked)
        assert reply.status_code == 400 and "pip install llguidance" in reply.json()["error"]["message"]
        asked = {"messages": HI, "tools": [TOOL, STRICT]}
        assert httpx.post(f"{server.url}/v1/chat/completions", json=asked).status_code == 200
