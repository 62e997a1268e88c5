"""The server as its clients know it: OpenAI's package, curl, lm-evaluation-harness, many at once, adapters
that come and go.
"""

import asyncio
import importlib.util
import json
import os
import random
import re
import shutil
import ssl
import string
import subprocess
import threading
import time

import pytest

pytest.importorskip("starlette", reason="NO starlette (the extra test has it): the server is not tested")
pytest.importorskip("uvicorn", reason="NO uvicorn (the extra test has it): the server is not tested")
pytest.importorskip("openai", reason="NO openai (the extra test has it): the server is not tested")
pytest.importorskip("httpx", reason="NO httpx (the extra test has it): the server is not tested")

import httpx
import openai

import rwkv_miss
from demo import serve
from rwkv_miss.files.mapped import ChangedFile
from src.data.rwkv_template import RwkvTemplate
from src.inference.decoders import fastest
from src.inference.engine import Engine
from src.inference.load import load_with
from src.ops import self_test
from src.serving import program
from src.serving.errors import Refused
from src.serving.fields import Fields
from src.serving.guard import Guard
from src.serving.limits import Limits
from src.serving.request_parsing import Defaults, RequestReader, read_chat
from src.serving.served_models import ServedModels
from src.serving.states import States
from src.serving.worker import Worker

from .serving import records, running, scripted
from .test_generate import letters, mixing_tensors  # noqa: F401  (a fixture)
from .test_live_adapters import train
from .test_serving_protocol import TOOL

HI = [{"role": "user", "content": "hi"}]


def client_of(server, key="any"):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base and adapters of it in a folder, with one that lies outside."""
    self_test.status("cpu")
    folder = tmp_path_factory.mktemp("serving")
    (folder / "adapters").mkdir()
    rwkv_miss.write_checkpoint(folder / "tiny.pth", mixing_tensors(7).items())
    for place, method, seed in (
        ("a.pth", "miss", 1),
        ("b.pth", "miss", 2),
        ("c.pth", "lora", 3),
        ("adapters/d.pth", "miss", 4),
        ("adapters/dora.pth", "dora", 5),
    ):
        train(folder / "tiny.pth", folder / place, method, seed)
    return folder


def loaded(files, letters, rows, folder=None):  # noqa: F811
    """(engine, served models) with adapters a, b and c."""
    paths = {name: str(files / f"{name}.pth") for name in "abc"}
    adapters, tokenizer = load_with(str(files / "tiny.pth"), paths, letters, accelerator="cpu")
    decoder, _ = fastest(adapters.model, adapters, rows)
    engine = Engine(decoder, tokenizer, chunk=16, reads_first=False, cache_bytes=1 << 20)
    return engine, ServedModels("tiny", adapters, records(tokenizer), 1.0, folder)


def test_openai_lists_the_models_and_gets_an_answer():
    with scripted("Hello there.") as server:
        client = client_of(server)
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").owned_by == "rwkv-miss"
        with pytest.raises(openai.NotFoundError, match="model: there is no 'tiny:tiny'; there are tiny"):
            client.models.retrieve("tiny:tiny")
        answer = client.chat.completions.create(model="tiny", messages=HI, n=2)
        assert [choice.message.content for choice in answer.choices] == ["Hello there."] * 2
        assert [choice.finish_reason for choice in answer.choices] == ["stop", "stop"]
        usage = answer.usage
        assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (20, 26, 46)
        assert server.engine.decoder.prompts == ["User: hi\n\nAssistant:"]
        cut = client.chat.completions.create(model="tiny", messages=HI, max_tokens=3).choices[0]
        assert (cut.message.content, cut.finish_reason) == ("Hel", "length")
        stopped = client.chat.completions.create(model="tiny", messages=HI, stop=[" the"]).choices[0]
        assert (stopped.message.content, stopped.finish_reason) == ("Hello", "stop")


def test_a_stream_is_the_whole_answer_in_pieces():
    with scripted("<think>\nhm\n</think>\nHello there.") as server:
        client = client_of(server)
        options = {"stream": True, "stream_options": {"include_usage": True}, "n": 2}
        chunks = list(client.chat.completions.create(model="tiny", messages=HI, **options))
        assert chunks[-1].usage.completion_tokens == 2 * 33 and chunks[-1].choices == []
        assert all(chunk.usage is None for chunk in chunks[:-1]) and len({chunk.id for chunk in chunks}) == 1
        for index in range(2):
            deltas = [c for chunk in chunks for c in chunk.choices if c.index == index]
            assert deltas[0].delta.role == "assistant"
            assert "".join(c.delta.content or "" for c in deltas) == "Hello there."
            thoughts = (getattr(c.delta, "reasoning_content", None) or "" for c in deltas)
            assert "".join(thoughts) == "hm"
            assert [c.finish_reason for c in deltas if c.finish_reason] == ["stop"]
        whole = client.chat.completions.create(model="tiny", messages=HI).choices[0].message
        assert (whole.content, whole.reasoning_content) == ("Hello there.", "hm")
        raw = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": HI, "stream": True}).text
        assert raw.endswith("data: [DONE]\n\n") and '"usage"' not in raw


def test_log_probabilities_in_the_forms_of_both_apis():
    with scripted("é.") as server:
        client = client_of(server)
        options = {"logprobs": True, "top_logprobs": 2}
        found = (
            client.chat.completions.create(model="tiny", messages=HI, **options).choices[0].logprobs.content
        )
        assert [one.bytes for one in found] == [[0xC3], [0xA9], [0x2E]]
        assert all(one.top_logprobs[0].logprob == one.logprob < 0 for one in found)
        assert all(len(one.top_logprobs) == 2 for one in found)
        streamed = client.chat.completions.create(model="tiny", messages=HI, stream=True, **options)
        streamed = [
            one for chunk in streamed for c in chunk.choices if c.logprobs for one in c.logprobs.content
        ]
        assert [one.logprob for one in streamed] == [one.logprob for one in found]
        completion = client.completions.create(model="tiny", prompt="Q", logprobs=1, echo=False)
        assert completion.choices[0].logprobs.text_offset == [0, 0, 1, 2]
        # halves of characters have names of their own among the likeliest
        assert completion.choices[0].logprobs.tokens == ["", "é", ".", ""]
        assert list(completion.choices[0].logprobs.top_logprobs[0]) == ["bytes:\\xc3"]
        assert completion.choices[0].logprobs.token_logprobs[:3] == [one.logprob for one in found]
        # tokens that a stop cuts off have none
        stopped = client.completions.create(model="tiny", prompt="Q", logprobs=1, stop=".").choices[0]
        assert stopped.text == "é" and len(stopped.logprobs.tokens) == 2


def test_completions():
    with scripted("Yes.") as server:
        client = client_of(server)
        answer = client.completions.create(model="tiny", prompt=["one", "two"], n=2, echo=True)
        texts = [choice.text for choice in answer.choices]
        assert texts == ["oneYes.", "oneYes.", "twoYes.", "twoYes."]
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        chunks = list(client.completions.create(model="tiny", prompt="Q", stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == "Yes."
        assert chunks[-1].choices[0].finish_reason == "stop" and server.engine.decoder.prompts[-1] == "Q"


CALL = '```json\n{"name": "weather", "arguments": {"city": "Rom"}}\n```'


@pytest.mark.parametrize("style", ["json", "hermes"])
def test_tools_are_called_and_answered(style):
    template = RwkvTemplate("rwkv", style)
    script = "I look.\n" + template.tools.calls([{"name": "weather", "arguments": {"city": "Rom"}}])
    with scripted(script, template) as server:
        client = client_of(server)
        options = {"model": "tiny", "tools": [TOOL], "max_tokens": 200}
        answer = client.chat.completions.create(messages=HI, **options).choices[0]
        call = answer.message.tool_calls[0]
        assert (answer.finish_reason, answer.message.content) == ("tool_calls", "I look.")
        assert (call.type, call.function.name) == ("function", "weather")
        assert json.loads(call.function.arguments) == {"city": "Rom"}
        result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
        client.chat.completions.create(messages=[*HI, answer.message, result], **options)
        written = template.segments(
            [*HI, answer.message.model_dump(exclude_none=True), result], [TOOL], ask=True
        )
        assert server.engine.decoder.prompts[-1] == "".join(text for text, _ in written)
        chunks = list(client.chat.completions.create(messages=HI, stream=True, **options))
        deltas = [chunk.choices[0].delta for chunk in chunks]
        assert "".join(delta.content or "" for delta in deltas) == "I look."
        assert len([call for delta in deltas for call in delta.tool_calls or ()]) == 1
        assert chunks[-1].choices[0].finish_reason == "tool_calls"
        plain = client.chat.completions.create(messages=HI, tool_choice="none", **options).choices[0]
        assert plain.finish_reason == "stop" and plain.message.content == script


def test_errors_are_openais():
    limits = Limits(body_bytes=1000, finishing=5)
    with scripted(limits=limits, guard=Guard(("secret",))) as server:
        client = client_of(server, "secret")
        ask = client.chat.completions.create
        with pytest.raises(openai.AuthenticationError) as caught:
            client_of(server, "wrong").chat.completions.create(model="tiny", messages=HI)
        assert caught.value.code == "invalid_api_key"
        for model in ("gpt-4", "tiny:nobody", "tiny:"):
            with pytest.raises(openai.NotFoundError) as caught:
                ask(model=model, messages=HI)
            assert caught.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as caught:
            ask(model="tiny", messages=HI, temperature=-1)
        assert caught.value.param == "temperature"
        with pytest.raises(openai.BadRequestError) as caught:
            schema = {"type": "array", "uniqueItems": True}
            form = {"type": "json_schema", "json_schema": {"name": "list", "schema": schema}}
            ask(model="tiny", messages=HI, response_format=form)
        assert caught.value.param == "response_format" and "uniqueItems" in caught.value.message
        with pytest.raises(openai.APIStatusError) as caught:
            ask(model="tiny", messages=[{"role": "user", "content": "x" * 2000}])
        assert caught.value.status_code == 413 and caught.value.code == "request_too_large"
        key = {"Authorization": "Bearer secret"}
        reply = httpx.get(f"{server.url}/v1/chat/completions", headers=key)
        assert reply.status_code == 405 and reply.json()["error"]["code"] == "method_not_allowed"
        reply = httpx.put(f"{server.url}/v1/adapters", headers=key)
        assert reply.headers["allow"] == "GET, HEAD, POST" in reply.json()["error"]["message"]
        reply = httpx.get(f"{server.url}/chat/completions", headers=key)
        assert reply.status_code == 404 and "begin with /v1" in reply.json()["error"]["message"]
        lists = [httpx.get(f"{server.url}/v1/models{end}", headers=key).json() for end in ("", "/")]
        assert lists[0] == lists[1]
        reply = httpx.delete(f"{server.url}/v1/adapters/", headers=key)
        assert reply.status_code == 405 and "expected GET, HEAD, POST" in reply.json()["error"]["message"]
        reply = httpx.post(
            f"{server.url}/v1/chat/completions", headers=key, json={"messages": HI, "zeal": 1, "a\nb": 2}
        )
        assert reply.status_code == 200 and reply.headers["x-ignored-fields"] == "a?b, zeal"
        assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
        assert httpx.get(f"{server.url}/metrics").status_code == 401
        lines = httpx.get(f"{server.url}/metrics", headers=key).text.splitlines()
        assert 'rwkv_requests_total{route="/v1/chat/completions",status="200"} 1' in lines
        assert 'rwkv_requests_total{route="/v1/chat/completions",status="400"} 2' in lines
        assert 'rwkv_requests_total{route="refused",status="401"} 2' in lines
        assert "rwkv_answer_tokens_total 7" in lines and "rwkv_answers_running 0" in lines


def test_a_page_of_another_site_gets_nothing():
    with scripted() as server:
        for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
            reply = httpx.post(f"{server.url}/v1/chat/completions", headers=headers, json={"messages": HI})
            assert reply.status_code == 403 and "access-control-allow-origin" not in reply.headers
        page = httpx.get(server.url)
        assert "script-src 'self'" in page.headers["content-security-policy"]
        assert httpx.get(f"{server.url}/page/../app.py").status_code == 404
        assert httpx.get(f"{server.url}/page/..%2fapp.py").status_code == 404
    allowed = Guard((), None, frozenset({"http://chat.example"}))
    with scripted(guard=allowed) as server:
        reply = httpx.get(f"{server.url}/v1/models", headers={"Origin": "http://chat.example"})
        assert reply.headers["access-control-allow-origin"] == "http://chat.example"


def test_tls_and_the_log_of_requests(tmp_path, capfd):
    if not shutil.which("openssl"):
        pytest.skip("NO openssl ON PATH: the server is not tested with TLS")
    pair = [str(tmp_path / name) for name in ("cert.pem", "key.pem")]
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=a"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-out", pair[0], "-keyout", pair[1]]
    subprocess.run([*command.split(), *names], check=True, capture_output=True, timeout=60)
    serve.parse(["--model", "x.pth", "--tls_cert", pair[0], "--tls_key", pair[1]])
    with scripted("Hello.", log_requests=True, tls=pair) as server:
        assert server.url.startswith("https://")
        with httpx.Client(verify=ssl.create_default_context(cafile=pair[0])) as client:
            body = {"messages": [{"role": "user", "content": "secret"}]}
            reply = client.post(f"{server.url}/v1/chat/completions?q=secret", json=body)
            assert reply.json()["choices"][0]["message"]["content"] == "Hello."
            assert client.get(f"{server.url}/no%0Asuch").status_code == 404
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{server.url}/health")  # nobody knows this certificate
    lines = [line for line in capfd.readouterr().err.splitlines() if "127.0.0.1" in line]
    expected = [r"POST /v1/chat/completions 200", r"GET /no\\nsuch 404"]
    for line, words in zip(lines, expected, strict=True):
        assert re.fullmatch(rf"\S+ \S+ 127.0.0.1 {words} \d+\.\d\ds", line)


def test_curl_streams(tmp_path):
    if not shutil.which("curl"):
        pytest.skip("NO curl ON PATH: the server is not tested with it")
    with scripted("Hello.") as server:
        command = ["curl", "-sN", f"{server.url}/v1/chat/completions", "-d"]
        body = json.dumps({"messages": HI, "stream": True})
        out = subprocess.run([*command, body], capture_output=True, text=True, timeout=30).stdout
        events = [line.removeprefix("data: ") for line in out.splitlines() if line]
        assert events[-1] == "[DONE]"
        deltas = [json.loads(event)["choices"][0]["delta"] for event in events[:-1]]
        assert "".join(delta.get("content", "") for delta in deltas) == "Hello."


def test_the_harness_asks_it():
    if not all(map(importlib.util.find_spec, ("lm_eval", "tenacity"))):
        pytest.skip("lm_eval[api] IS ABSENT: that lm-evaluation-harness can use the server is not tested")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalChatCompletion

    with scripted("So it is 42.\n\nQ") as server:
        model = LocalChatCompletion(
            base_url=f"{server.url}/v1/chat/completions", model="tiny", num_concurrent=2, max_retries=1
        )
        questions = [
            model.apply_chat_template([{"role": "user", "content": word}]) for word in ("one", "two")
        ]
        wanted = {"until": ["\n\n"], "max_gen_toks": 50, "do_sample": False}
        instances = [
            Instance("generate_until", {}, (question, wanted), i) for i, question in enumerate(questions)
        ]
        assert model.generate_until(instances) == ["So it is 42."] * 2
        assert sorted(server.engine.decoder.prompts) == [
            f"User: {word}\n\nAssistant:" for word in ("one", "two")
        ]


def test_the_harness_gets_the_likelihoods_of_our_own_model(files, letters):  # noqa: F811
    """By lm-evaluation-harness's client of completions, with the server's tokenizer: ids and texts."""
    if not all(map(importlib.util.find_spec, ("lm_eval", "tenacity"))):
        pytest.skip("lm_eval[api] IS ABSENT: that lm-evaluation-harness can use the server is not tested")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from src.evaluation.lm_eval_model import HarnessModel

    def instances(kind, given):
        return [Instance(kind, {}, one, i) for i, one in enumerate(given)]

    draw = random.Random(0)
    words = ["".join(draw.choices(string.ascii_letters, k=draw.randrange(1, 9))) for _ in range(60)]
    pairs = [(" ".join(words[i : 3 * i + 1]), f" {words[-i]}, so") for i in range(9)]
    pairs += [("It is ", "so."), ("It is", "."), *(("One of", f" {word}") for word in words[:4])]
    engine, served = loaded(files, letters, 4)
    served.bos = tuple(engine.tokenizer.eod)  # before texts; ids are taken as they are
    model = engine.decoder.model
    with running(engine, served) as server:

        def client(name="tiny", **options):
            url = f"{server.url}/v1/completions"
            found = LocalCompletionsAPI(url, model=name, max_retries=1, **options)
            assert found.tokenizer_backend == "remote" and found.prefix_token_id == engine.tokenizer.eod[0]
            return found

        def check(client, ours, pairs):
            found = client.loglikelihood(instances("loglikelihood", pairs))
            want = ours.loglikelihood(instances("loglikelihood", pairs))
            assert [one[1] for one in found] == [one[1] for one in want]
            assert [one[0] for one in found] == pytest.approx([one[0] for one in want], abs=1e-5)

        ours = HarnessModel(model, engine.tokenizer)
        greedy = ours.generate_until(instances("generate_until", [("It is", {"max_gen_toks": 3})]))
        alone = [*pairs, ("", "It is."), ("It is", greedy[0])]
        for options in ({"batch_size": 5}, {"num_concurrent": 2}):
            check(client(**options), ours, alone)
        texts = [(f"{context}{continuation}",) for context, continuation in pairs[:5]]
        found = client().loglikelihood_rolling(instances("loglikelihood_rolling", texts))
        want = ours.loglikelihood_rolling(instances("loglikelihood_rolling", texts))
        assert found == pytest.approx(want, abs=1e-5)
        begun = HarnessModel(model, engine.tokenizer, bos=served.bos)
        check(client(tokenized_requests=False), begun, [pair for pair in pairs if pair[0]])
        adapted = client("tiny:a").loglikelihood(instances("loglikelihood", alone))
    served.adapters.use(["a"], 1.0)
    want = ours.loglikelihood(instances("loglikelihood", alone))
    assert [one[0] for one in adapted] == pytest.approx([one[0] for one in want], abs=1e-5)


def test_prompt_logprobs_are_vllms_and_an_echo_has_the_same(files, letters):  # noqa: F811
    engine, served = loaded(files, letters, 2)
    with running(engine, served) as server:

        def ask(path, **body):
            return httpx.post(f"{server.url}{path}", json={"max_tokens": 0, **body}).json()

        for _ in range(2):  # the second time the prompt's states are in the cache
            chat = ask("/v1/chat/completions", messages=HI, prompt_logprobs=2)
        prompt = ask("/tokenize", messages=HI)
        assert (
            chat["choices"][0]["finish_reason"] == "length" and chat["choices"][0]["message"]["content"] == ""
        )
        assert chat["usage"]["completion_tokens"] == 0 and len(chat["prompt_logprobs"]) == prompt["count"]
        body = {"prompt": prompt["tokens"], "echo": True, "logprobs": 1, "n": 2, "max_tokens": 3}
        text = ask("/v1/completions", prompt_logprobs=2, **body)["choices"][1]
        assert text["prompt_logprobs"] == chat["prompt_logprobs"] and text["prompt_logprobs"][0] is None
        logprobs = text["logprobs"]
        assert len(logprobs["tokens"]) == prompt["count"] + 3
        for i, (token, entry) in enumerate(zip(prompt["tokens"][1:], text["prompt_logprobs"][1:]), 1):
            one = entry[str(token)]
            assert (one["logprob"], one["decoded_token"]) == (
                logprobs["token_logprobs"][i],
                logprobs["tokens"][i],
            )
            assert len(logprobs["top_logprobs"][i]) == (1 if one["rank"] == 1 else 2)
            assert len(entry) == (2 if one["rank"] <= 2 else 3) and {1, 2} <= {
                x["rank"] for x in entry.values()
            }
        stream = httpx.post(f"{server.url}/v1/completions", json={**body, "stream": True}).text
        chunks = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
        mine = [one for chunk in chunks for one in chunk["choices"] if one["index"] == 1]
        assert "".join(one["text"] for one in mine) == text["text"]
        for name, column in logprobs.items():
            assert [value for one in mine for value in one["logprobs"][name]] == column


def bodies():
    """32 requests: four models, several answers, streams, greedy and drawn."""
    for i, letter in enumerate(string.ascii_letters[:32]):
        body = {
            "model": ("tiny", "tiny:a", "tiny:b", "tiny:c")[i % 4],
            "messages": [{"role": "user", "content": f"tell me {letter * (1 + i)}, please"}],
            "max_tokens": 4 + i % 12,
            "seed": i,
            "temperature": (0, 1)[i // 4 % 2],
            "stream": bool(i % 3),
            "n": 1 + i % 2,
        }
        yield body, {"adapter_scale": 0.5} if i % 8 == 5 else {}


def test_every_one_of_many_clients_gets_the_answer_that_it_gets_alone(files, letters):  # noqa: F811
    engine, served = loaded(files, letters, 1)
    reader = RequestReader(
        engine.tokenizer, served.find, Limits(), Defaults(sampling={"top_p": 1.0}), States(0)
    )
    expected = []
    for body, extra in bodies():
        asked = read_chat(reader, {**body, **extra})
        expected.append([answer.text.strip() for answer in next(engine.run(asked.requests))])
    assert len({text for texts in expected for text in texts}) > 30

    async def ask(client, body, extra):
        answer = await client.chat.completions.create(**body, extra_body=extra)
        if not body["stream"]:
            return [choice.message.content for choice in answer.choices]
        texts = [""] * body["n"]
        async for chunk in answer:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        return texts

    async def all_at_once(url):
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, *one) for one in bodies()))

    engine, served = loaded(files, letters, 8)
    with running(engine, served, defaults=reader.defaults) as server:
        assert asyncio.run(all_at_once(server.url)) == expected
        assert server.dispatcher.metrics.answer_tokens > 200


def test_adapters_come_and_go_while_others_answer(files, letters):  # noqa: F811
    engine, served = loaded(files, letters, 4, str(files / "adapters"))
    with running(engine, served) as server:
        client = client_of(server)

        def said(model="tiny", **extra):
            answer = client.chat.completions.create(model=model, messages=HI, extra_body=extra)
            return answer.choices[0].message.content

        def post(name, file, **extra):
            return httpx.post(f"{server.url}/v1/adapters", json={"name": name, "file": file, **extra})

        base = said()
        assert post("e", "d.pth").status_code == 200
        stream = client.chat.completions.create(model="tiny:e", messages=HI, max_tokens=400, stream=True)
        next(stream)
        assert post("d", "d.pth").json() == {
            "name": "d", "model": "tiny:d", "method": "miss", "rank": 4,
        }  # fmt: skip
        cards = {model.id: model for model in client.models.list()}
        assert [*cards] == ["tiny", *"abced"] and {*cards} == {
            client.models.retrieve(name if name == "tiny" else f"tiny:{name}").id for name in cards
        }
        assert {(card.root, card.parent, card.max_model_len) for card in cards.values()} == {
            ("tiny.pth", None, 65536), *((f"{name}.pth", "tiny", 65536) for name in "abcd"),
        }  # fmt: skip
        tuned = said("tiny:d")
        assert tuned != base == said(adapter_id="d", adapter_scale=0) == said()
        assert said("d") == said(adapter_id="d") == tuned
        assert said(adapter_id="d", adapter_scale=0.5) != base
        assert said("a+d") == said("tiny:a+d") not in (tuned, said("tiny:a"))
        refusals = {
            ("d", "d.pth"): 409,
            ("tiny", "d.pth"): 409,
            ("d", "absent.pth"): 409,  # the name comes first
            ("f", "../a.pth"): 400,
            ("f", "absent.pth"): 400,
            ("f", "dora.pth"): 400,
            ("a:b", "d.pth"): 400,
            ("", "d.pth"): 400,
        }
        for given, status in refusals.items():
            reply = post(*given)
            assert reply.status_code == status and str(files) not in reply.text, reply.text
            assert (reply.json()["error"]["code"] == "name_taken") == (status == 409)
        assert httpx.delete(f"{server.url}/v1/adapters/d").json() == {"name": "d", "deleted": True}
        assert httpx.delete(f"{server.url}/v1/adapters/d").status_code == 404
        with pytest.raises(openai.NotFoundError):
            said("tiny:d")
        # the operator's own stays
        assert httpx.delete(f"{server.url}/v1/adapters/a").status_code == 403 and said("tiny:a") != base
        # one that is in use goes when the answer is complete
        assert httpx.delete(f"{server.url}/v1/adapters/e").status_code == 200
        reply = post("e", "d.pth", weight=3)
        assert reply.status_code == 200 and reply.headers["X-Ignored-Fields"] == "weight"
        assert said("tiny:e") == tuned
        assert sum(bool(chunk.choices[0].delta.content) for chunk in stream) > 50
        deadline = time.monotonic() + 10
        while set(served.adapters.by_name) != {*"abc", "e@2"} and time.monotonic() < deadline:
            time.sleep(0.01)
        assert set(served.adapters.by_name) == {*"abc", "e@2"} and said() == base


def test_replies_and_model_cards_have_the_version_of_what_answers(files, letters, tmp_path):  # noqa: F811
    for number, source in enumerate(("a.pth", "b.pth", "a.pth")):
        shutil.copy(files / source, tmp_path / f"{number}.pth")
    engine, served = loaded(files, letters, 1, str(tmp_path))
    served.created -= 9
    seen = {}
    with running(engine, served) as server:
        client = client_of(server)
        for number in range(3):  # the first file, another one under the same name, the first one again
            post = {"lora_name": "x", "lora_path": f"{number}.pth"}
            assert httpx.post(f"{server.url}/v1/load_lora_adapter", json=post).status_code == 200
            for model in ("tiny", "x", "a"):
                card = client.models.retrieve(model)
                assert (card.created == served.created) == (model == "tiny")
                answers = [
                    client.chat.completions.create(model=model, messages=HI, max_tokens=1, extra_body=extra)
                    for extra in ({}, *([{"adapter_scale": 0.5}] if model != "tiny" else ()))
                ]
                assert answers[0].system_fingerprint == card.system_fingerprint and answers[0].model == model
                assert model == "tiny" or answers[1].system_fingerprint != card.system_fingerprint
                seen[model, number] = card.version, card.system_fingerprint
            name = {"lora_name": "x"}
            assert httpx.post(f"{server.url}/v1/unload_lora_adapter", json=name).status_code == 200
        chunks = list(client.chat.completions.create(model="tiny", messages=HI, stream=True))
    assert {chunk.system_fingerprint for chunk in chunks} == {seen["tiny", 0][1]}
    assert seen["x", 0] == seen["x", 2] == seen["a", 0] != seen["x", 1] != seen["tiny", 0]
    assert all(seen[model, 0] == seen[model, number] for model in ("tiny", "a") for number in (1, 2))
    assert seen["tiny", 0][0] == rwkv_miss.files.identity.Identity(files / "tiny.pth").fingerprint
    with pytest.raises(Refused, match="adapter_scale: got 0.5, and no adapter; name one in model"):
        served.find(Fields({"model": "tiny", "adapter_scale": 0.5}))
    with pytest.raises(rwkv_miss.UserError, match="a is the base model's name"):
        ServedModels("a", served.adapters, records(engine.tokenizer), 1.0, None)


def test_clients_may_load_as_many_adapters_as_the_limit_allows(files, letters):  # noqa: F811
    """The operator's three do not count; one that was deleted does as long as an answer uses it."""
    engine, served = loaded(files, letters, 2, str(files / "adapters"))
    with running(engine, served, limits=Limits(adapters=2, finishing=5)) as server:

        def post(name):
            return httpx.post(f"{server.url}/v1/adapters", json={"name": name, "file": "d.pth"})

        async def all_at_once():
            async with httpx.AsyncClient() as client:
                bodies = [{"name": f"d{number}", "file": "d.pth"} for number in range(6)]
                posts = [client.post(f"{server.url}/v1/adapters", json=body) for body in bodies]
                return await asyncio.gather(*posts)

        replies = asyncio.run(all_at_once())
        assert sorted(reply.status_code for reply in replies) == [200] * 2 + [400] * 4
        errors = [reply.json()["error"] for reply in replies if reply.status_code == 400]
        assert {error["code"] for error in errors} == {"too_many_adapters"}
        assert "at most 2 adapters (--limit_adapters); DELETE /v1/adapters/NAME" in errors[0]["message"]
        used, other = (name for name in served.entries if name.startswith("d"))
        create, delete = client_of(server).chat.completions.create, f"{server.url}/v1/adapters/"
        with create(model=used, messages=HI, max_tokens=4000, stream=True) as stream:
            next(stream)
            assert httpx.delete(delete + used).status_code == 200
            assert post("e").status_code == 400 and [*served.entries] == [*"abc", other]
        deadline = time.monotonic() + 10
        while post("e").status_code == 400 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert httpx.delete(delete + other).status_code == 200 == post("f").status_code
        assert post("g").status_code == 400 and [*served.entries] == [*"abcef"]


def test_of_many_who_load_a_name_at_once_one_does(files, letters):  # noqa: F811
    engine, served = loaded(files, letters, 1, str(files / "adapters"))
    with running(engine, served) as server:

        async def all_at_once():
            async with httpx.AsyncClient() as client:
                posts = [
                    client.post(f"{server.url}/v1/adapters", json={"name": "d", "file": "d.pth"})
                    for _ in range(6)
                ]
                return [reply.status_code for reply in await asyncio.gather(*posts)]

        assert sorted(asyncio.run(all_at_once())) == [200, *[409] * 5]
        assert set(served.adapters.by_name) == {"a", "b", "c", "d"}


@pytest.mark.parametrize("begun", [False, True])
def test_an_adapter_whose_loading_was_cancelled_gives_its_name_back(files, letters, begun):  # noqa: F811
    engine, served = loaded(files, letters, 1, str(files / "adapters"))
    worker, add = Worker(engine), served.adapters.add
    loads, before, go = (threading.Event() for _ in range(3))

    def slow(*given):
        loads.set()
        go.wait(20)
        add(*given)

    served.adapters.add = slow

    async def cancelled_and_again():
        if not begun:
            worker.post(lambda: before.wait(20))
        loading = asyncio.create_task(served.add("d", "d.pth", worker))
        await asyncio.to_thread(loads.wait, 20 if begun else 0.05)
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading
        await asyncio.sleep(0)
        before.set()
        go.set()
        assert loads.is_set() is begun
        return await asyncio.wait_for(served.add("d", "d.pth", worker), 20)

    worker.start()
    try:
        assert asyncio.run(cancelled_and_again()).internal == "d"
    finally:
        go.set()
        worker.close()
    assert set(served.adapters.by_name) == {*"abcd"} and list(served.entries) == [*"abcd"]


def test_a_base_that_is_overwritten_ends_the_server(files, letters, tmp_path, all_mapped):  # noqa: F811
    for place in ("tiny", "a", "b", "c"):
        shutil.copy(files / f"{place}.pth", tmp_path)
    engine, served = loaded(tmp_path, letters, 1)
    with running(engine, served) as server:
        body = {"messages": HI, "max_tokens": 2}
        os.utime(tmp_path / "a.pth", ns=(1, 1))  # an adapter is a copy
        assert httpx.post(f"{server.url}/v1/chat/completions", json=body).status_code == 200
        os.utime(tmp_path / "tiny.pth", ns=(1, 1))
        reply = httpx.post(f"{server.url}/v1/chat/completions", json=body)
        assert reply.status_code == 500 and "a file of its model was overwritten" in reply.text
        assert str(tmp_path) not in reply.text
        server.thread.join(20)
        assert not server.thread.is_alive()
        server.engine.prompts.clear()
    assert isinstance(server.dispatcher.worker.fatal, ChangedFile)


def test_an_only_adapter_of_whole_tensors_is_merged_on_loading(files, letters, tmp_path, capsys):  # noqa: F811
    base, whole = str(files / "tiny.pth"), str(tmp_path / "w.pth")
    train(base, whole, "miss", 6, train_parts="ln,head")
    given = ["--tokenizer", letters, "--accelerator", "cpu", "--rows", "2", "--chunk", "16", "--scale", "0.5"]

    def load(*adapters):
        flags = [word for adapter in adapters for word in ("--adapter", adapter)]
        return program.load(serve.parse(["--model", base, *flags, *given]))

    reason = "it was trained with --train_parts head,ln, so it changes whole tensors ("
    with pytest.raises(rwkv_miss.UserError) as error:
        load(whole, str(files / "a.pth"))
    assert reason in str(error.value) and "As the only --adapter it is merged on loading" in str(error.value)
    found = load(whole)
    said = capsys.readouterr().err
    assert f"note: adapter 'w' is merged into the model: {reason}" in said and "called tiny:w" in said
    served, reader = (
        found.served,
        RequestReader(found.engine.tokenizer, found.served.find, Limits(), Defaults(), States(0)),
    )
    assert served.models() == ["tiny:w"]
    for fields in ({"model": "tiny"}, {"adapter_id": "w"}, {"adapter_scale": 1}):
        with pytest.raises(Refused):
            served.find(Fields(fields))
    asked = read_chat(reader, {"messages": HI, "model": "tiny:w", "max_tokens": 20, "temperature": 0})
    adapters, tokenizer = load_with(base, {"w": whole}, letters, accelerator="cpu")
    adapters.use(["w"], 0.5)
    alone = Engine(fastest(adapters.model, adapters)[0], tokenizer, chunk=16)
    texts = [next(engine.run(asked.requests))[0].text for engine in (found.engine, alone)]
    assert texts[0] == texts[1] != ""


def test_without_a_folder_no_adapter_is_loaded(files, letters):  # noqa: F811
    engine, served = loaded(files, letters, 1)
    with running(engine, served) as server:
        reply = httpx.post(f"{server.url}/v1/adapters", json={"name": "d", "file": "d.pth"})
        error = reply.json()["error"]
        assert (reply.status_code, error["type"], error["code"]) == (
            403,
            "permission_error",
            "no_adapter_dir",
        )
        info = httpx.get(f"{server.url}/v1/server").json()
        assert info["adapter_dir"] is False and [one["name"] for one in info["adapters"]] == ["a", "b", "c"]
