"""OpenAI's Responses API and Anthropic's Messages API: both ask what a chat asks, and say the same answer."""

import json
import random
import re
import typing

import pytest

pytest.importorskip("llguidance", reason="NO llguidance (the extra test has it): forms are not tested")
pytest.importorskip("starlette", reason="NO starlette (the extra test has it): the APIs are not tested")
pytest.importorskip("uvicorn", reason="NO uvicorn (the extra test has it): the APIs are not tested")
pytest.importorskip("openai", reason="NO openai (the extra test has it): the APIs are not tested")
pytest.importorskip("httpx", reason="NO httpx (the extra test has it): the APIs are not tested")

import httpx
import openai
import pydantic

from src.data.rwkv_template import RwkvTemplate
from src.inference.constraint import GrammarCompiler
from src.serving.anthropic_api import AnthropicReply, read_anthropic
from src.serving.guard import Guard
from src.serving.openai_choices import ChatChoices
from src.serving.openai_objects import TokenNames
from src.serving.replies import Usage
from src.serving.request_parsing import read_chat
from src.serving.responses_api import ResponsesReply, read_response
from src.serving.worker import Piece

from .serving import LOCAL, scripted
from .test_serving import client_of
from .test_serving_abuse import fail_once
from .test_serving_forms import BUY, SIZE, random_model
from .test_serving_protocol import CALL, CITY, HI, TOKENIZER, TOOL, WEATHER, prompt_of, reader

FLAT = {"type": "function", **WEATHER}
ANTHROPIC = {"name": "weather", "description": "Of a city", "input_schema": CITY}
ROME, ULM = '{"city": "Rom"}', '{"city": "Ulm"}'


class Size(pydantic.BaseModel):
    size: typing.Literal["S", "M"]


def asked_by_each(template, chat, response, anthropic):
    """The requests that three APIs make of the same conversation."""
    made = reader(template)
    return read_chat(made, chat), read_response(made, response), read_anthropic(made, anthropic)


def test_a_conversation_is_the_same_request_in_each_form():
    template = RwkvTemplate("think", "json")
    calls = [
        {"id": f"c{i}", "type": "function", "function": {"name": "weather", "arguments": text}}
        for i, text in enumerate((ROME, ULM))
    ]
    chat = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Rome\nand Ulm?"},
            {"role": "assistant", "reasoning_content": "hm", "content": "I look.", "tool_calls": calls},
            {"role": "tool", "tool_call_id": "c0", "content": "sun"},
            {"role": "tool", "tool_call_id": "c1", "content": "rain"},
            {"role": "user", "content": "And now?"},
        ],
        "tools": [TOOL],
        "max_tokens": 9,
    }
    response = {
        "instructions": "Be brief.",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": t} for t in ("Rome", "and Ulm?")]},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
            {"type": "function_call", "call_id": "c0", "name": "weather", "arguments": ROME},
            {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": ULM},
            {"type": "function_call_output", "call_id": "c1", "output": "rain"},
            {"type": "function_call_output", "call_id": "c0", "output": "sun"},
            {"role": "user", "content": "And now?"},
        ],
        "tools": [FLAT],
        "max_output_tokens": 9,
    }
    blocks = [
        {"type": "thinking", "thinking": "hm", "signature": ""},
        {"type": "text", "text": "I look."},
        *(
            {"type": "tool_use", "id": f"c{i}", "name": "weather", "input": json.loads(text)}
            for i, text in enumerate((ROME, ULM))
        ),
    ]
    results = [
        {"type": "tool_result", "tool_use_id": "c0", "content": [{"type": "text", "text": "sun"}]},
        {"type": "tool_result", "tool_use_id": "c1", "content": "rain"},
        {"type": "text", "text": "And now?"},
    ]
    anthropic = {
        "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": "Rome\nand Ulm?"},
            {"role": "assistant", "content": blocks},
            {"role": "user", "content": results},
        ],
        "tools": [ANTHROPIC],
        "max_tokens": 9,
    }
    first, *others = asked_by_each(template, chat, response, anthropic)
    assert prompt_of(first).endswith("And now?\n\nAssistant: <think")
    for other in others:
        assert prompt_of(other) == prompt_of(first)
        assert (other.tools, other.requests[0].max_tokens) == (first.tools, 9)
    # an answer that was thoughts or calls alone
    response["input"] = [response["input"][0], *(response["input"][i] for i in (1, 3, 4, 5, 6))]
    chat["messages"] = [*chat["messages"][:2], {**chat["messages"][2], "content": ""}, *chat["messages"][3:5]]
    assert prompt_of(read_response(reader(template), response)) == prompt_of(
        read_chat(reader(template), chat)
    )


CHAT_FORM = {"type": "json_schema", "json_schema": {"name": "size", "schema": SIZE}}
FLAT_FORM = {"type": "json_schema", "name": "size", "schema": SIZE}
NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize(
    "chat, response, anthropic",
    [
        ({"reasoning_effort": "low"}, {"reasoning": {"effort": "low"}}, {"output_config": {"effort": "low"}}),
        (
            {"reasoning_effort": "none"},
            {"reasoning": {"effort": "none"}},
            {"thinking": {"type": "disabled"}, "output_config": {"effort": "low"}},
        ),
        (
            {"reasoning_effort": "medium"},
            {"reasoning": {"effort": "medium", "summary": "auto"}},
            {"thinking": {"type": "enabled", "budget_tokens": 2000}},
        ),
        (
            {"response_format": CHAT_FORM},
            {"text": {"format": FLAT_FORM}},
            {"output_config": {"format": FLAT_FORM}},
        ),
        ({"tool_choice": "none"}, {"tool_choice": "none"}, {"tool_choice": {"type": "none"}}),
        ({"tool_choice": "required"}, {"tool_choice": "required"}, {"tool_choice": {"type": "any"}}),
        (
            {"tool_choice": NAMED},
            {"tool_choice": {"type": "function", "name": "weather"}},
            {"tool_choice": {"type": "tool", "name": "weather"}},
        ),
        (
            {"parallel_tool_calls": False},
            {"parallel_tool_calls": False},
            {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
        ),
        (*({"stop": ["b"], "temperature": 0},) * 2, {"stop_sequences": ["b"], "temperature": 0}),
        *((fields,) * 3 for fields in ({"top_k": 3, "top_p": 0.5}, {"seed": 7, "stream": True}, {"odd": 1})),
    ],
)
def test_a_field_has_the_same_meaning_in_each_form(chat, response, anthropic, monkeypatch):
    monkeypatch.setattr(GrammarCompiler, "compile", lambda compiler, *grammar: grammar)
    first, *others = asked_by_each(
        RwkvTemplate("think", "json"),
        {"messages": HI, "tools": [TOOL], "seed": 1, **chat},
        {"input": "hi", "tools": [FLAT], "seed": 1, "store": True, **response},
        {"messages": HI, "tools": [ANTHROPIC], "seed": 1, **anthropic},
    )
    for other in others:
        assert prompt_of(other) == prompt_of(first)
        assert (other.tools, other.stream, other.ignored) == (first.tools, first.stream, first.ignored)
        ours, its = other.requests[0], first.requests[0]
        assert (ours.sampling, ours.stops, ours.seed) == (its.sampling, its.stops, its.seed)
        assert ours.form == its.form


IMAGE = [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]
OUTPUT = {"type": "function_call_output", "call_id": "other", "output": "sun"}


def pieces_of(text, finish):
    """Pieces of an answer, cut at random places, with the end in a piece of its own or in the last one."""
    cuts = sorted(random.choices(range(len(text) + 1), k=3))
    texts = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)])]
    pieces = [Piece(0, text, 1, (), "", "", 0) for text in texts]
    if random.random() < 0.5:
        return [*pieces, Piece(0, "", 0, (), finish, "", 0)]
    return [*pieces[:-1], pieces[-1]._replace(finish=finish)]


def response_of(events):
    """Put the parts of a stream together, as a client does: (items, status)."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    items, texts = [], []
    for event in events[2:-1]:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(items)
            items.append(event["item"])
            texts.append("")
        elif kind == "output_item.done":
            items[event["output_index"]] = event["item"]
        elif kind.endswith(".delta"):
            assert event["item_id"] == items[event["output_index"]]["id"]
            texts[event["output_index"]] += event["delta"]
        elif kind.endswith(("_text.done", "arguments.done")):
            assert event.get("text", event.get("arguments")) == texts[event["output_index"]]
    assert [item.get("arguments") or item["content"][0]["text"] for item in items if item] == texts
    return items, events[-1]["type"].removeprefix("response.")


def message_of(events):
    """Put the parts of a stream together, as a client does: (content, its end)."""
    content = []
    for event in events:
        if event["type"] == "content_block_start":
            assert event["index"] == len(content)
            content.append(
                {**event["content_block"], **({"input": ""} if "input" in event["content_block"] else {})}
            )
        elif event["type"] == "content_block_delta":
            field = event["delta"]["type"].removesuffix("_delta").replace("input_json", "input")
            content[event["index"]][field] += list(event["delta"].values())[1]
    for block in content:
        if "input" in block:
            block["input"] = json.loads(block["input"])
    return content, events[-2]["delta"]


@pytest.mark.parametrize(
    "mode, text, finish",
    [
        ("rwkv", " Good day.", "stop"),
        ("rwkv", "", "stop"),
        ("rwkv", "Good d", "length"),
        ("think", f">\nhm\n</think>\nI look.\n{CALL}\n{CALL}", "stop"),
        ("think", ">\nhm, hm", "length"),
        ("rwkv", CALL, "length"),
    ],
)
def test_a_stream_is_the_whole_answer_and_both_are_the_chats(mode, text, finish):
    random.seed(1)
    alike = {"tools": [TOOL], "messages": HI}
    asked = asked_by_each(
        RwkvTemplate(mode, "json"),
        alike,
        {"input": "hi", "tools": [FLAT]},
        {"messages": HI, "tools": [ANTHROPIC]},
    )
    names, usage = TokenNames(TOKENIZER), Usage(10, 7, 4)
    for _ in range(20):
        pieces = pieces_of(text, finish)
        replies = ChatChoices(asked[0], names), ResponsesReply(asked[1], names), AnthropicReply(asked[2])
        streams = [
            [
                *reply.first(),
                *(event for piece in pieces for event in reply.events(piece)),
                *reply.last(usage),
            ]
            for reply in replies
        ]
        chat, response, message = (reply.whole(usage) for reply in replies)
        said = chat["choices"][0]["message"]
        calls = [call["function"]["arguments"] for call in said.get("tool_calls", ())]
        expected = [
            *([("thoughts", said["reasoning_content"])] if "reasoning_content" in said else []),
            *(
                [("text", said["content"])]
                if said["content"] or not (calls or "reasoning_content" in said)
                else []
            ),
            *(("call", arguments) for arguments in calls),
        ]

        items, status = response_of(streams[1])
        assert items == response["output"] and status == response["status"]
        kinds = {"reasoning": "thoughts", "message": "text", "function_call": "call"}
        assert expected == [
            (kinds[item["type"]], item.get("arguments") or item["content"][0]["text"]) for item in items
        ]
        assert status == ("completed" if finish == "stop" or calls else "incomplete")
        assert response["usage"]["total_tokens"] == 17

        content, end = message_of(streams[2])
        assert content == message["content"]
        kinds = {"thinking": "thoughts", "text": "text", "tool_use": "call"}
        assert expected == [
            (kinds[block["type"]], json.dumps(block["input"]) if "input" in block else block[block["type"]])
            for block in content
        ]
        reason = "tool_use" if calls else {"stop": "end_turn", "length": "max_tokens"}[finish]
        assert end == {"stop_reason": reason, "stop_sequence": None}
        assert message["usage"]["input_tokens"] + message["usage"]["cache_read_input_tokens"] == 10


def test_openai_parses_and_calls_tools():
    with random_model() as server:
        responses = client_of(server).responses
        asked = {"model": "tiny", "input": "Hi"}
        answer = responses.parse(text_format=Size, **asked)
        assert isinstance(answer.output_parsed, Size) and answer.status == "completed"
        with responses.stream(text_format=Size, **asked) as stream:
            deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
            assert stream.get_final_response().output_parsed == answer.output_parsed
        assert "".join(deltas) == answer.output_text
        forced = {"tools": [{"type": "function", **BUY["function"]}], "tool_choice": "required"}
        first = responses.create(parallel_tool_calls=False, **forced, **asked)
        [call] = first.output
        assert call.type == "function_call" and json.loads(call.arguments)["size"] in "SM"
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "bought"}
        conversation = [*HI, *first.output, result]
        second = responses.create(
            model="tiny", input=conversation, max_output_tokens=3, **{**forced, "tool_choice": "auto"}
        )
        assert (second.status, second.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        with pytest.raises(openai.BadRequestError) as caught:
            responses.create(input=IMAGE, model="tiny")
        assert caught.value.param == "input[0].content[0].type"


def test_anthropics_client_parses_and_calls_tools():
    anthropic = pytest.importorskip("anthropic", reason="NO anthropic: its client is not tested")

    with random_model(guard=Guard(("secret",), LOCAL.hosts)) as server:
        client = anthropic.Anthropic(base_url=server.url, api_key="secret", max_retries=0)
        asked = {"model": "tiny", "messages": HI, "max_tokens": 200}
        answer = client.messages.parse(output_format=Size, **asked)
        assert isinstance(answer.parsed_output, Size) and answer.stop_reason == "end_turn"
        tools = [{"name": "buy", "input_schema": SIZE}]
        with client.messages.stream(
            tools=tools, tool_choice={"type": "tool", "name": "buy"}, **asked
        ) as stream:
            message = stream.get_final_message()
        [call] = message.content
        assert message.stop_reason == "tool_use" and call.input["size"] in "SM"
        assert (
            message.usage.input_tokens
            == client.messages.count_tokens(model="tiny", messages=HI, tools=tools).input_tokens
        )
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "bought"}
        turns = [
            *HI,
            {"role": "assistant", "content": message.content},
            {"role": "user", "content": [result]},
        ]
        assert (
            client.messages.create(**{**asked, "messages": turns, "max_tokens": 3}).stop_reason
            == "max_tokens"
        )
        stranger = anthropic.Anthropic(base_url=server.url, api_key="other", max_retries=0)
        with pytest.raises(anthropic.AuthenticationError):
            stranger.messages.create(**asked)


def test_events_stops_and_errors_over_the_network():
    with scripted(
        "Good day. Bye.", RwkvTemplate("rwkv", "json"), guard=Guard(("secret",), LOCAL.hosts)
    ) as server:
        key = {"x-api-key": "secret"}
        url, asked = f"{server.url}/v1/messages", {"messages": HI, "stop_sequences": ["x", ". "]}
        answer = httpx.post(url, json=asked, headers=key).json()
        assert answer["content"] == [{"type": "text", "text": "Good day"}]
        assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", ". ")
        alone = {"messages": HI, "stop_sequences": [". "], "ignore_eos": True}  # no stop of the template
        ended = httpx.post(url, json=alone, headers=key).json()
        assert (ended["stop_reason"], ended["stop_sequence"]) == ("stop_sequence", ". ")
        stream = httpx.post(url, json={**asked, "stream": True}, headers=key)
        cards = httpx.get(f"{server.url}/v1/models", headers=key).json()["data"]
        assert stream.headers["x-system-fingerprint"] == cards[0]["system_fingerprint"]
        events = stream.text.split("\n\n")
        assert events.pop() == "" and re.match(r"event: message_start\ndata: \{", events[0])
        names = [event.split("\n")[0] for event in events]
        assert names[-1] == "event: message_stop" and "[DONE]" not in events[-1]
        assert httpx.post(url, json=asked).json()["error"]["type"] == "authentication_error"
        reply = httpx.post(url, json={**asked, "model": "odd"}, headers=key)
        assert reply.status_code == 404 and reply.json()["error"]["type"] == "not_found_error"
        counted = httpx.post(f"{url}/count_tokens", json={"messages": HI}, headers=key).json()
        assert counted == {"input_tokens": answer["usage"]["input_tokens"]}


def test_a_stream_that_fails_says_so_in_its_form(capfd):
    with scripted("word " * 50) as server:
        for path, body, kind in (
            ("messages", {"messages": HI}, "error"),
            ("responses", {"input": "hi"}, "response.failed"),
        ):
            fail_once(server.engine.decoder, MemoryError("planted"))
            text = httpx.post(f"{server.url}/v1/{path}", json={**body, "stream": True, "max_tokens": 40}).text
            *_, name, data = text.strip().split("\n")
            assert name == f"event: {kind}"
            event = json.loads(data.removeprefix("data: "))
            error = event.get("error") or event["response"]["error"]
            assert "MemoryError" in error["message"]
            whole = httpx.post(f"{server.url}/v1/{path}", json={**body, "max_tokens": 4})
            assert whole.status_code == 200 and whole.json().get("max_output_tokens", 4) == 4
    capfd.readouterr()
