"""States by id: a request that goes on from one is answered as if it had sent the whole conversation."""

import asyncio
import json
import pathlib
import string

import pytest

pytest.importorskip("starlette", reason="NO starlette (the extra test has it): the server is not tested")
pytest.importorskip("uvicorn", reason="NO uvicorn (the extra test has it): the server is not tested")
pytest.importorskip("httpx", reason="NO httpx (the extra test has it): the server is not tested")

import httpx
import torch

import rwkv_miss
from rwkv_miss.files.checkpoint import read_metadata
from src.inference.decoders import fastest
from src.inference.engine import Engine
from src.inference.load import load_with
from src.ops import self_test
from src.serving.limits import Limits
from src.serving.served_models import ServedModels

from .conftest import close
from .serving import records, running
from .test_cpu_decoder import TOLERANCE
from .test_generate import mixing_tensors, write_vocabulary
from .test_live_adapters import train

CHUNK = 16
BEFORE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "ab"},
    {"role": "assistant", "content": "cd"},
]
NEXT = [{"role": "user", "content": '"x" and y, how many is that'}]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server that keeps two states, with the adapters a (MiSS) and s (a tuned state). Some of its tokens go
    across the end of a turn."""
    self_test.status("cpu")
    folder = tmp_path_factory.mktemp("states")
    rwkv_miss.write_checkpoint(folder / "tiny.pth", mixing_tensors(7).items())
    paths = {name: str(folder / f"{name}.pth") for name in "as"}
    for path, method in zip(paths.values(), ("miss", "state"), strict=True):
        train(folder / "tiny.pth", path, method)
    letters = [letter.encode() for letter in string.ascii_letters + ' :\n.,"</>']
    pieces = [*letters, b"\n\n", b".\n\n", b"\n\nUs", b"er:"]
    vocabulary = write_vocabulary(folder / "vocabulary.txt", pieces)
    adapters, tokenizer = load_with(str(folder / "tiny.pth"), paths, vocabulary, accelerator="cpu")
    engine = Engine(fastest(adapters.model, adapters, 4)[0], tokenizer, CHUNK, False, 1 << 20)
    served = ServedModels("tiny", adapters, records(tokenizer), 1.0, str(folder))
    with running(engine, served, Limits(finishing=5, states=2)) as started:
        yield started


def post(server, path, **body):
    return httpx.post(f"{server.url}/v1/{path}", json=body, timeout=60)


def drop_all(server):
    for state in httpx.get(f"{server.url}/v1/states").json()["data"]:
        gone = {"id": state["id"], "deleted": True}
        assert httpx.delete(f"{server.url}/v1/states/{state['id']}").json() == gone


@pytest.fixture(autouse=True)
def no_states(server):
    yield
    drop_all(server)


def said(server, path="chat/completions", **asked):
    """(text, ln p of its tokens, usage) of a greedy answer."""
    options = {"logprobs": True} if path == "chat/completions" else {"logprobs": 0}
    reply = post(server, path, max_tokens=12, temperature=0, **options, **asked)
    assert reply.status_code == 200, reply.text
    (choice,), usage = reply.json()["choices"], reply.json()["usage"]
    if "message" in choice:
        drawn = [one["logprob"] for one in choice["logprobs"]["content"]]
        return choice["message"]["content"], drawn, usage
    return choice["text"], choice["logprobs"]["token_logprobs"], usage


def kept(server, **asked):
    reply = post(server, "states", **asked)
    assert reply.status_code == 200, reply.text
    return reply.json()


@pytest.mark.parametrize("model", [{}, {"model": "a", "adapter_scale": 0.5}], ids=["base", "adapter"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_conversation_goes_on_from_its_beginning(server, count, model):
    begun, rest = BEFORE[:count], [*BEFORE[count:], *NEXT]
    short = kept(server, messages=begun, **model)["tokens"]
    drop_all(server)
    for over in (0, 1):  # the beginning ends where a chunk does, and one token later
        begun[0] = {"role": "system", "content": "Be brief." + "." * (over - short % -CHUNK)}
        state = kept(server, messages=begun, **model)
        assert state["tokens"] % CHUNK == over
        whole = said(server, messages=[*begun, *rest], **model)
        by_state = said(server, messages=rest, state_id=state["id"], **model)
        assert by_state[0] == whole[0]
        assert by_state[2]["prompt_tokens"] == whole[2]["prompt_tokens"] > state["tokens"]
        assert by_state[2]["prompt_tokens_details"]["cached_tokens"] >= state["tokens"]
        if over:
            close("ln p", torch.tensor(by_state[1]), torch.tensor(whole[1]), TOLERANCE)
        else:
            assert by_state[1] == whole[1]


def test_other_apis_go_on_from_a_state(server):
    state, text = kept(server, messages=BEFORE), NEXT[0]["content"]
    asked = {"model": "tiny", "max_tokens": 12, "temperature": 0}
    for path, new, whole in (
        ("responses", {"input": text}, {"input": [*BEFORE, *NEXT]}),
        ("messages", {"messages": NEXT}, {"system": "Be brief.", "messages": [*BEFORE[1:], *NEXT]}),
    ):
        replies = [
            post(server, path, **asked, **fields).json()
            for fields in (new | {"state_id": state["id"]}, whole)
        ]
        said_by_state, said_by_whole = (
            [part["text"] for part in (reply.get("output") or [reply])[-1]["content"]] for reply in replies
        )
        assert said_by_state == said_by_whole and said_by_whole[0]
        usages = [reply["usage"] for reply in replies]
        # Anthropic counts cached tokens apart
        counts = [one["input_tokens"] + one.get("cache_read_input_tokens", 0) for one in usages]
        assert counts[0] == counts[1] > state["tokens"]
    stream = post(server, "messages", **asked, messages=NEXT, state_id=state["id"], stream=True).text
    events = [json.loads(line[6:]) for line in stream.split("\n") if line.startswith("data: ")]
    begun, ended = events[0]["message"]["usage"], events[-2]["usage"]
    assert begun["cache_read_input_tokens"] > 0 and begun | {"output_tokens": 12} == ended


def test_a_text_goes_on_from_a_conversation(server):
    state = kept(server, messages=BEFORE)
    prompt = "System: Be brief.\n\nUser: ab\n\nAssistant: cd\n\n"
    rest = "And so it goes"
    whole, by_state = (
        said(server, "completions", **asked)
        for asked in ({"prompt": prompt + rest}, {"prompt": rest, "state_id": state["id"]})
    )
    assert by_state[0] == whole[0]
    close("ln p", torch.tensor(by_state[1]), torch.tensor(whole[1]), TOLERANCE)


def test_a_state_of_a_file_is_what_the_adapter_of_that_file_begins_with(server):
    state = kept(server, file="s.pth")
    assert (state["tokens"], state["model"]) == (0, "tiny") and state["bytes"] > 0
    tuned = said(server, messages=NEXT, model="s")
    assert said(server, messages=NEXT, state_id=state["id"]) == tuned != said(server, messages=NEXT)
    refused = post(server, "states", file="a.pth")
    assert refused.status_code == 400 and "a.pth changes weights" in refused.text
    assert "/" not in refused.json()["error"]["message"]
    folder = pathlib.Path(server.dispatcher.served.folder)
    tensors = rwkv_miss.read_checkpoint(folder / "s.pth").items()
    metadata = {**read_metadata(folder / "s.pth"), "tokenizer": "others.txt"}
    rwkv_miss.write_checkpoint(folder / "other.pth", tensors, metadata)
    refused = post(server, "states", file="other.pth")
    assert refused.status_code == 400 and "other.pth was trained with the tokenizer" in refused.text
    for file in ("../s.pth", "absent.pth"):
        assert post(server, "states", file=file).status_code == 400


def test_what_a_state_does_not_fit_is_refused(server):
    state = kept(server, messages=BEFORE, model="a")
    asked = {"messages": NEXT, "model": "a", "state_id": state["id"], "max_tokens": 1}
    for changed, words in (
        ({}, ""),
        ({"model": "tiny"}, "a state needs the same adapters"),
        ({"adapter_scale": 0.5}, "a state needs the same adapters"),
        ({"think_mode": "think-normal-2025"}, "send the think mode and the tools"),
        ({"state_id": "other"}, "there is no state 'other'"),
        ({"state_id": 3}, "expected a text"),
    ):
        reply = post(server, "chat/completions", **asked | changed)
        assert reply.status_code == (404 if "no state" in words else 400 if words else 200), reply.text
        assert words in reply.text
    for body in ({"messages": BEFORE, "file": "s.pth"}, {}, {"messages": []}):
        assert post(server, "states", **body).status_code == 400


def test_states_are_listed_deleted_and_limited(server):
    first = kept(server, messages=BEFORE)
    # a state that goes on from another one
    second = kept(server, messages=NEXT, state_id=first["id"])
    assert second["tokens"] > first["tokens"] and second["bytes"] == first["bytes"]
    assert httpx.get(f"{server.url}/v1/states").json() == {"object": "list", "data": [first, second]}
    card = httpx.get(f"{server.url}/v1/models/tiny").json()
    assert first["system_fingerprint"] == card["system_fingerprint"]
    full = post(server, "states", messages=BEFORE)
    assert full.status_code == 400 and full.json()["error"]["code"] == "too_many_states"
    assert post(server, "states", file="s.pth").status_code == 400
    said(server, messages=NEXT, state_id=first["id"])
    assert any(entry.start is not None for entry in server.engine.cache.entries.values())
    drop_all(server)
    post(server, "chat/completions", messages=NEXT, max_tokens=1)  # after what the engine was told
    assert all(entry.start is None for entry in server.engine.cache.entries.values())
    assert httpx.delete(f"{server.url}/v1/states/{first['id']}").status_code == 404
    assert post(server, "chat/completions", messages=NEXT, state_id=first["id"]).status_code == 404
    kept(server, messages=BEFORE)


def test_a_deleted_state_stays_out_of_the_cache_when_its_answer_ends(server, monkeypatch):
    state, dispatcher = kept(server, messages=BEFORE), server.dispatcher
    begin = dispatcher.begin

    async def begin_after_the_deletion(asked):
        monkeypatch.undo()
        await asyncio.get_running_loop().run_in_executor(None, drop_all, server)
        return await begin(asked)

    monkeypatch.setattr(dispatcher, "begin", begin_after_the_deletion)
    assert said(server, messages=NEXT, state_id=state["id"])[0]
    post(server, "chat/completions", messages=NEXT, max_tokens=1)  # after what the engine was told
    assert all(entry.start is None for entry in server.engine.cache.entries.values())
