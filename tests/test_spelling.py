"""Logprobs' tokens spell the content: joined they are the text, in every form of an answer."""

import asyncio
import random
import types

import pytest

pytest.importorskip("starlette", reason="NO starlette (the extra test has it): the server is not tested")
pytest.importorskip("llguidance", reason="NO llguidance: the server's forms are not tested")

from src.data.rwkv_template import MODES, RwkvTemplate
from src.data.tokenizer import load_tokenizer
from src.inference.adapters import Applied
from src.inference.engine import Engine
from src.inference.torch_decoder import TorchDecoder
from src.serving.dispatcher import _collected
from src.serving.limits import Limits
from src.serving.openai_choices import ChatChoices, TextChoices
from src.serving.openai_objects import TokenNames
from src.serving.replies import Usage
from src.serving.request_parsing import Chosen, Defaults, RequestReader, read_chat, read_completion
from src.serving.spelling import Spelling, _Placed
from src.serving.states import States
from src.serving.worker import Worker

from .answering import Scripted
from .test_engine import tiny
from .test_serving_protocol import CALL, HI, TOOL
from .test_tokenizer import bpe

FRAGMENTS = [
    "<think>",
    "</think>",
    ">",
    " ",
    "\n",
    "é",
    "\U0001f600",
    "lo.",
    "STOP",
    "\n\nUser:",
    "```json",
    CALL,
]


@pytest.fixture(scope="module", params=["bytes", "utf16", "world", "bpe"])
def tokenizer(request, tmp_path_factory):
    if request.param == "bpe":
        return load_tokenizer(bpe(tmp_path_factory.mktemp("spelling") / "tokenizer.json"), 420)
    return load_tokenizer(request.param, {"world": 65536}.get(request.param, 256))


def asked_of(tokenizer, read, template, body):
    def find(fields):
        return Chosen("tiny", Applied(), template, (), "fp_0")

    return read(RequestReader(tokenizer, find, Limits(), Defaults(), States(0)), body)


def pieces(engine, requests):
    """The new parts of the answers, as the worker finds them."""
    worker = Worker(engine)
    worker._submit(types.SimpleNamespace(requests=requests, answers=[]))
    while not engine.idle:
        for answer in engine.step():
            yield worker._piece(worker.followed[id(answer)]), answer


def script(tokenizer, draw):
    """Tokens of an answer: some of the vocabulary, and pieces of text that matter."""
    tokens = []
    for _ in range(draw.randrange(12)):
        some = [draw.choice(sorted(tokenizer.ids)) for _ in range(3)]
        tokens += draw.choice([some, *[tokenizer.encode(fragment) for fragment in FRAGMENTS]])
    return tokens + list(tokenizer.eod)


def replies(choices, parts):
    """(the choices of a stream, joined as they come; the whole ones)."""
    streamed = list(choices.first_choices())
    for piece, _ in parts:
        streamed += choices.next_choices(piece)
    return streamed, choices.all_choices()


def check_chat(tokenizer, engine, draw, **more):
    template = RwkvTemplate(draw.choice(["rwkv", draw.choice(sorted(MODES))]), "json")
    tools = {"tools": [TOOL]} if draw.random() < 0.5 else {}
    body = {"messages": HI, "logprobs": True, "top_logprobs": 2, "stop": ["STOP"], "temperature": 0}
    body |= {"max_tokens": draw.choice([3, 60]), **tools, **more}
    asked = asked_of(tokenizer, read_chat, template, body)
    streamed, (whole,) = replies(ChatChoices(asked, TokenNames(tokenizer)), pieces(engine, asked.requests))
    content = whole["message"]["content"] or ""
    assert "".join(choice["delta"].get("content", "") for choice in streamed) == content
    entries = whole["logprobs"]["content"]
    assert [one for choice in streamed for one in (choice["logprobs"] or {}).get("content", ())] == entries
    assert "".join(one["token"] for one in entries) == content
    assert bytes(byte for one in entries for byte in one["bytes"]).decode("utf-8", "replace") == content
    return content


def scripted(tokenizer):
    """(engine that says a text, random numbers) many times."""
    draw = random.Random(0)
    for _ in range(20 if tokenizer.name == "world" else 40):
        yield Engine(Scripted(tokenizer, script(tokenizer, draw)), tokenizer, chunk=10**6), draw


def test_the_tokens_of_a_chat_spell_its_content(tokenizer):
    lengths = [len(check_chat(tokenizer, *given)) for given in scripted(tokenizer)]
    assert max(lengths) > 15 and sum(map(bool, lengths)) > len(lengths) / 5


def check_text(tokenizer, engine, draw, prompt, **more):
    body = {"prompt": prompt, "logprobs": 1, "stop": ["STOP"], "temperature": 0}
    body |= {"max_tokens": draw.choice([0, 3, 40]), **more}
    asked = asked_of(tokenizer, read_completion, None, body)
    parts = list(pieces(engine, asked.requests))
    streamed, (whole,) = replies(TextChoices(asked, TokenNames(tokenizer)), parts)
    text, entries = whole["text"], whole["logprobs"]
    assert "".join(choice["text"] for choice in streamed) == text
    assert "".join(entries["tokens"]) == text
    assert {len(column) for column in entries.values()} == {len(entries["tokens"])}
    for name, column in entries.items():
        assert [one for choice in streamed for one in choice["logprobs"][name]] == column
    return asked.requests[0].tokens, parts[-1][1], entries


def test_the_tokens_of_a_completion_spell_its_text(tokenizer):
    for engine, draw in scripted(tokenizer):
        _, answer, entries = check_text(tokenizer, engine, draw, "Q")
        if "STOP" not in tokenizer.decode(answer.tokens):
            assert len(entries["tokens"]) == len(answer.tokens), "an end of document is one, too"


@pytest.mark.parametrize("kind", ["bytes", "utf16"])
def test_random_models_and_echoed_prompts(kind):
    tokenizer, draw = load_tokenizer(kind, 256), random.Random(1)
    for seed in range(5):
        engine = Engine(TorchDecoder(tiny(7), 2), tokenizer, chunk=16)
        check_chat(tokenizer, engine, draw, seed=seed, temperature=1.5, max_tokens=30)
        prompt = [draw.randrange(256) for _ in range(draw.choice([1, 2, 30]))]
        ids, answer, entries = check_text(
            tokenizer, engine, draw, prompt, echo=True, temperature=1, seed=seed
        )
        values = entries["token_logprobs"]
        assert values[0] is entries["top_logprobs"][0] is None and None not in values[1:]
        assert len(values) == len(ids) + len(answer.tokens)


@pytest.mark.parametrize(
    "read, kind, prompt",
    [
        (read_chat, ChatChoices, {"messages": HI, "logprobs": True}),
        (read_completion, TextChoices, {"prompt": "Q", "logprobs": 0}),
    ],
)
def test_a_whole_reply_names_each_token_once(read, kind, prompt, monkeypatch):
    tokenizer, counts = load_tokenizer("bytes", 256), []
    for name in ("chat", "completion"):
        monkeypatch.setattr(TokenNames, name, lambda names, tokens, *more: counts.append(len(tokens)))
    engine = Engine(Scripted(tokenizer, b"Hello."), tokenizer, chunk=10**6)
    asked = asked_of(
        tokenizer, read, RwkvTemplate("rwkv", "json"), {**prompt, "max_tokens": 6, "temperature": 0}
    )

    async def said():
        for piece, _ in pieces(engine, asked.requests):
            yield piece

    run = types.SimpleNamespace(pieces=said, usage=lambda: Usage(1, 6, 0))
    asyncio.run(_collected(run, kind(asked, TokenNames(tokenizer))))
    assert counts == [6]


def test_a_token_that_waits_is_looked_at_once_for_each_piece(monkeypatch):
    """As while a chat thinks: no token is in its content yet."""
    looked, end = [], _Placed.end.fget
    monkeypatch.setattr(_Placed, "end", property(lambda one: looked.append(one) or end(one)))
    tokenizer = load_tokenizer("bytes", 256)
    spelling = Spelling(tokenizer, with_bytes=True)
    for _ in range(100):
        spelling.push([types.SimpleNamespace(token=97)])
        assert not spelling.take(0, 0, False)
    assert len(looked) == 100
    assert "".join(one.text for one in spelling.take(40, 100, True)) == "a" * 60
