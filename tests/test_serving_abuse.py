"""Abuse that a server survives: clients who leave, who send half a request or nonsense, too many of them, and
its own end while they ask.
"""

import concurrent.futures
import errno
import json
import os
import random
import signal
import socket
import threading
import time

import pytest

pytest.importorskip("starlette", reason="NO starlette (the extra test has it): the server is not tested")
pytest.importorskip("uvicorn", reason="NO uvicorn (the extra test has it): the server is not tested")
pytest.importorskip("httpx", reason="NO httpx (the extra test has it): the server is not tested")

import httpx

from benchmarks.serve_fuzz import mutated, sent
from demo import serve
from src.data.tokenizer import load_tokenizer
from src.inference.engine import Engine
from src.serving import app, duty, program
from src.serving.limits import Limits
from src.serving.listener import bound
from src.serving.served_models import ServedModels

from .serving import Scripted, no_adapters, records, scripted

HI = [{"role": "user", "content": "hi"}]
ENDLESS = "word " * 3000
LONG = {"messages": HI, "max_tokens": 15000}


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.005)


def opened(server, body, stop_after=b'"content":"w"'):
    """A connection that has asked and, of a stream, has read some of the answer."""
    client = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(data)}\r\n\r\n"
    client.sendall(head.encode() + data)
    seen = b""
    while body.get("stream") and stop_after not in seen:
        seen += client.recv(65536)
    return client


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_who_leaves_frees_its_row(stream):
    with scripted(ENDLESS, rows=1, pause=0.001) as server:
        running = opened(server, {**LONG, "stream": stream})
        until(lambda: server.engine.running == 1)
        waiting = opened(server, LONG)
        until(lambda: server.engine.waiting == 1)
        waiting.close()
        until(lambda: (server.engine.waiting, server.dispatcher.open) == (0, 1))
        running.close()
        until(lambda: server.engine.idle and not server.dispatcher.running and server.dispatcher.open == 0)
        assert server.dispatcher.metrics.gone == 2
        reply = httpx.post(f"{server.url}/v1/completions", json={"prompt": "Q", "max_tokens": 4})
        assert reply.json()["choices"][0]["text"] == "word"


def test_who_comes_when_too_many_wait_is_told_when_to_come_again():
    with scripted(ENDLESS, rows=1, pause=0.001, limits=Limits(waiting=1, finishing=5)) as server:
        clients = [opened(server, LONG) for _ in range(2)]
        until(lambda: server.engine.waiting == 1)
        reply = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": HI})
        assert reply.status_code == 429 and int(reply.headers["retry-after"]) >= 1
        assert reply.json()["error"]["code"] == "rate_limit_exceeded" and "--limit_waiting" in reply.text
        for client in clients:
            client.close()
        until(lambda: server.engine.idle and server.dispatcher.open == 0)
        assert (
            httpx.post(f"{server.url}/v1/completions", json={"prompt": "", "max_tokens": 1}).status_code
            == 200
        )
        # an idle server takes a request that is larger than what may wait
        reply = httpx.post(f"{server.url}/v1/completions", json={"prompt": ["x"] * 5, "max_tokens": 1})
        assert len(reply.json()["choices"]) == 5


def silent(server, *begun):
    """Connections that have sent these beginnings of a request."""
    clients = []
    for data in begun:
        clients.append(socket.create_connection(("127.0.0.1", server.port), timeout=20))
        clients[-1].sendall(data)
    return clients


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n"


def test_silent_connections_are_closed():
    with scripted(limits=Limits(receiving=0.5, finishing=5)) as server:
        nothing, head, body = silent(server, b"", HEAD, HEAD + b"\r\n{")
        assert nothing.recv(100) == b"" == head.recv(100)
        assert body.recv(100).startswith(b"HTTP/1.1 408 ")
        until(lambda: not server.server.server_state.connections and not server.server.listener.open)


def test_connections_beyond_the_limit_are_closed_at_once_and_who_answers_is_heard():
    with scripted(ENDLESS, pause=0.001, limits=Limits(connections=9, finishing=5)) as server:
        listener = server.server.listener
        listener.patience = 1000.0
        asked = opened(server, {**LONG, "stream": True})
        slow = silent(server, *[b"", HEAD, HEAD + b"\r\n{", b""] * 2)
        until(lambda: len(listener.open) == 9)
        for client in silent(server, *[b""] * 200):  # nobody has to wait for the end of a request
            with client, client.makefile("rb") as reply:
                head, _, body = reply.read().partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 503 ") and b"Retry-After" in head
            assert json.loads(body)["error"]["code"] == "too_many_connections"
        listener.patience = 0.0  # now who keeps the server waiting has to go, the first one first
        for _ in range(3):
            assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
        assert slow[0].recv(100) == b"" and asked.recv(100) and server.engine.running == 1
        text = httpx.get(f"{server.url}/metrics").text
        assert 'rwkv_requests_total{route="refused",status="503"} 200' in text
        for client in (asked, *slow):
            client.close()


def test_a_request_that_hides_another_one_ends_its_connection():
    hidden = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with scripted() as server:
        for begun in (
            HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            HEAD.replace(b"\r\n", b"\n") + b"\n{",
        ):
            (client,) = silent(server, begun + hidden)
            with client, client.makefile("rb") as reply:
                said = reply.read()
            assert said.startswith(b"HTTP/1.1 400 ") and said.count(b"HTTP/1.1") == 1 and b"ok" not in said


def test_where_no_file_can_be_opened_the_log_does_not_fill(monkeypatch):
    with bound("127.0.0.1", 0) as listener:

        def accept():
            raise OSError(errno.EMFILE, "planted")

        monkeypatch.setattr(listener, "_accept", accept)
        seen = []
        for _ in range(1000):
            with pytest.raises(OSError) as error:
                listener.accept()
            seen.append(error.type)
        # asyncio logs an OSError, and returns to its loop at a BlockingIOError
        assert seen[0] is OSError and seen.count(OSError) < 20


def test_a_huge_prompt_is_refused_by_its_beginning(monkeypatch):
    with scripted(limits=Limits(prompt_tokens=1000, finishing=5)) as server:
        encoded, encode = [], server.engine.tokenizer.encode
        monkeypatch.setattr(
            server.engine.tokenizer, "encode", lambda text: encoded.append(text) or encode(text)
        )
        huge = "x" * 3_000_000
        for path, body in (
            ("completions", {"prompt": huge}),
            ("completions", {"prompt": ["short"] * 100_000}),
            ("chat/completions", {"messages": [{"role": "user", "content": huge}]}),
        ):
            reply = httpx.post(f"{server.url}/v1/{path}", json=body, timeout=60)
            assert reply.status_code == 400, reply.text
        assert reply.json()["error"]["code"] == "context_length_exceeded"
        assert sum(map(len, encoded)) < 30_000
        # one of few tokens is read on
        assert httpx.post(f"{server.url}/v1/completions", json={"prompt": "x" * 1000}).status_code == 200


def test_a_client_who_takes_nothing_is_left():
    with scripted(ENDLESS, limits=Limits(receiving=0.3, finishing=5)) as server:
        server.server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
            client.connect(("127.0.0.1", server.port))
            data = json.dumps({"messages": HI, "max_tokens": 400, "stream": True, "logprobs": True})
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length:"
            client.sendall(f"{head} {len(data)}\r\n\r\n{data}".encode())
            until(lambda: server.dispatcher.metrics.gone == 1)
            until(lambda: server.dispatcher.open == 0 and not server.server.server_state.connections)


def test_a_body_that_is_too_large_is_not_kept():
    with scripted(limits=Limits(body_bytes=1000, finishing=5)) as server:
        url = f"{server.url}/v1/completions"

        def parts():
            for _ in range(300):
                yield b"x" * 10

        assert httpx.post(url, content=b"x" * 2000).status_code == 413
        assert httpx.post(url, content=parts()).status_code == 413
        assert httpx.post(url, content=b"x", headers={"Content-Encoding": "gzip"}).status_code == 415
        assert httpx.post(url, content=json.dumps({"prompt": "Q"})).status_code == 200


@pytest.mark.parametrize("path", ["chat/completions", "responses", "messages", "messages/count_tokens"])
def test_a_tool_whose_schema_is_nested_deeply_is_refused_in_words(path):
    schema = {"type": "string"}
    for _ in range(600):
        schema = {"items": schema}
    schema = {"type": "object", "properties": {"a": schema}}
    tool = {"name": "buy", "parameters": schema, "type": "function"}
    if path.startswith("chat"):
        tool = {"type": "function", "function": {"name": "buy", "parameters": schema}}
    elif path.startswith("messages"):
        tool = {"name": "buy", "input_schema": schema}
    body = {"input" if path == "responses" else "messages": HI, "tools": [tool]}
    body |= {} if path == "responses" else {"max_tokens": 9}
    with scripted() as server:
        reply = httpx.post(f"{server.url}/v1/{path}", json=body)
        assert reply.status_code == 400 and "nested too deeply" in reply.json()["error"]["message"]


@pytest.mark.parametrize("asked", [32_000, -1])
def test_a_limit_above_the_servers_is_cut_to_it_and_the_answer_says_so(asked):
    with scripted(ENDLESS, limits=Limits(answer_tokens=8, finishing=5)) as server:
        body = {"messages": HI, "max_tokens": asked, "stop": [f"no{i}" for i in range(20)]}
        reply = httpx.post(f"{server.url}/v1/chat/completions", json=body)
        assert reply.status_code == 200 and reply.headers["x-max-tokens"] == "8"
        assert reply.json()["choices"][0]["finish_reason"] == "length"
        assert reply.json()["usage"]["completion_tokens"] == 8


def test_a_tool_of_another_type_is_refused_by_its_name():
    with scripted() as server:
        for path, tool in (
            ("chat/completions", {"type": "custom", "custom": {"name": "apply_patch"}}),
            ("responses", {"type": "custom", "name": "apply_patch"}),
        ):
            body = {"input" if path == "responses" else "messages": HI, "tools": [tool]}
            reply = httpx.post(f"{server.url}/v1/{path}", json=body)
            said = reply.json()["error"]["message"]
            assert reply.status_code == 400 and "custom" in said and "apply_patch" in said


def test_work_past_its_deadline_ends_its_request_and_others_are_answered(monkeypatch):
    go, begun = threading.Event(), []

    def stuck(reader, fields):
        begun.append(threading.current_thread())
        go.wait(60)
        return {}, []

    monkeypatch.setattr(app, "read_tokenize", stuck)
    monkeypatch.setattr(app, "READING", 0.3)
    monkeypatch.setattr(duty, "MOST_LEFT", 2)
    try:
        with scripted() as server, concurrent.futures.ThreadPoolExecutor(2) as pool:

            def asked(path):
                return httpx.post(server.url + path, json={"prompt": "Q"}, timeout=20)

            for number in (1, 2):
                slow = pool.submit(asked, "/tokenize")
                until(lambda: len(begun) == number)  # noqa: B023
                if number == 1:
                    assert asked("/v1/completions").status_code == 200
                assert slow.result().status_code == 503 and slow.result().headers.get("connection") != "close"
                said = slow.result().json()["error"]["message"]
                assert "it took more than 0.3 seconds, and may still go on" in said
            assert "2 others take too long" in asked("/v1/completions").json()["error"]["message"]
            go.set()
            for thread in begun:
                thread.join(20)
            assert asked("/v1/completions").status_code == 200
            assert asked("/tokenize").status_code == 200
    finally:
        go.set()


def test_300_damaged_requests_leave_nothing_behind(caplog, capfd):
    """More of them: python -m benchmarks.serve_fuzz."""
    rng = random.Random(0)
    with scripted("Hello.", limits=Limits(receiving=1, finishing=5)) as server:
        address = "127.0.0.1", server.port
        requests = [mutated(rng, "tiny") for _ in range(300)]
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            statuses = list(pool.map(lambda raw: sent(address, raw), requests))
        until(lambda: server.engine.idle and not server.dispatcher.running)
        assert httpx.get(f"{server.url}/health").status_code == 200
    codes = {"", "100", "200", "400", "403", "404", "405", "408", "413"}
    assert set(statuses) <= codes and statuses.count("200") > 9 and statuses.count("400") > 100
    assert "Traceback" not in caplog.text and "Traceback" not in capfd.readouterr().err


def fail_once(decoder, error):
    """Make the decoder's next step raise; those after it are as before."""
    good = decoder.step

    def step(*given):
        decoder.step = good
        raise error

    decoder.step = step


def test_a_step_that_fails_ends_its_requests_and_the_next_ones_are_answered(capfd):
    with scripted(ENDLESS, rows=2, pause=0.001) as server, concurrent.futures.ThreadPoolExecutor(3) as pool:
        url = f"{server.url}/v1/chat/completions"
        for failure in (MemoryError("planted"), RuntimeError("planted, too")):
            asked = [
                pool.submit(httpx.post, url, json={**LONG, "stream": stream}, timeout=60)
                for stream in (True, False, False)  # the third one waits for a row
            ]
            until(lambda: (server.engine.running, server.engine.waiting) == (2, 1))
            fail_once(server.engine.decoder, failure)
            streamed, whole, waited = (reply.result() for reply in asked)
            assert streamed.text.endswith("data: [DONE]\n\n") and streamed.status_code == 200
            last = json.loads(streamed.text.split("data: ")[-2])["error"]
            assert last == whole.json()["error"] == waited.json()["error"]
            assert whole.status_code == waited.status_code == 500
            assert whole.headers["connection"] == waited.headers["connection"] == "close"
            assert type(failure).__name__ in last["message"] and last["type"] == "server_error"
            assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
            reply = httpx.post(url, json={"messages": HI, "max_tokens": 4})
            assert reply.json()["choices"][0]["message"]["content"] == "word"
        assert "rwkv_engine_failures 2" in httpx.get(f"{server.url}/metrics").text.splitlines()
    assert capfd.readouterr().err.count("planted") == 2  # for the operator


@pytest.mark.parametrize("part", ["step", "refresh"])
def test_an_engine_that_cannot_go_on_ends_the_process_with_a_code(part, capfd):
    """A step that fails twice, or an engine that can't be made ready after the first failure."""
    tokenizer = load_tokenizer("bytes", 256)
    decoder = Scripted(4, ENDLESS)
    decoder.step = None
    if part == "refresh":
        decoder.refresh = None
    served = ServedModels("tiny", no_adapters(), records(tokenizer), 1.0, None)
    loaded = program.Serving(Engine(decoder, tokenizer, chunk=64, reads_first=False), served, "")
    args, listener = serve.parse(["--model", "tiny.pth", "--rows", "4"]), bound("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/completions"
    listener.listen()  # so that the client may ask before the server has begun
    else_end = threading.Timer(60, os.kill, (os.getpid(), signal.SIGTERM))
    else_end.start()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        ask = [{"prompt": "Q", "max_tokens": 3}] * (2 if part == "step" else 1)
        asked = pool.submit(lambda: [httpx.post(url, json=body, timeout=60) for body in ask])
        with pytest.raises(SystemExit) as ended:
            program.serve(args, Limits(finishing=5), listener, loaded)
        else_end.cancel()
        replies = [reply.json()["error"] for reply in asked.result()]
    assert ended.value.code == 70
    assert "the server ends" in replies[-1]["message"] and "TypeError" in capfd.readouterr().err
    assert all("try again" in reply["message"] for reply in replies[:-1])


def test_what_runs_is_finished_at_the_end():
    with scripted("word " * 40, rows=2, pause=0.001, limits=Limits(finishing=30)) as server:
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            asked = [
                pool.submit(
                    httpx.post,
                    f"{server.url}/v1/chat/completions",
                    json={"messages": HI, "max_tokens": 2000, "stream": i % 2 == 0},
                    timeout=60,
                )
                for i in range(6)
            ]
            until(lambda: (server.engine.running, server.engine.waiting) == (2, 4))
            server.stop()
            for i, reply in enumerate(asked):
                text = reply.result().text
                assert text.endswith("data: [DONE]\n\n") if i % 2 == 0 else text.count("word") == 40
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")


def test_what_does_not_finish_in_time_is_ended():
    limits = Limits(finishing=0.3)
    with scripted(ENDLESS, rows=1, pause=0.002, limits=limits) as server:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            asked = [
                pool.submit(
                    httpx.post,
                    f"{server.url}/v1/chat/completions",
                    json={**LONG, "stream": stream},
                    timeout=60,
                )
                for stream in (True, False)
            ]
            until(lambda: server.engine.waiting == 1)
            server.stop()
            streamed, whole = (reply.result() for reply in asked)
        assert '"code":"stopping"' in streamed.text and streamed.text.endswith("[DONE]\n\n")
        assert whole.status_code == 503 and whole.json()["error"]["code"] == "stopping"
