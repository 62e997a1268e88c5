"""What a server survives: clients who leave, who send half a request or nonsense, too many of them, and its
own end while they ask.
"""

import concurrent.futures
import http.client
import json
import random
import socket
import time

import pytest

pytest.importorskip("starlette", reason="NO starlette (the extra test has it): the server is not tested")
pytest.importorskip("uvicorn", reason="NO uvicorn (the extra test has it): the server is not tested")
pytest.importorskip("httpx", reason="NO httpx (the extra test has it): the server is not tested")

import httpx

from benchmarks.serve_fuzz import mutated, sent
from src.serving.limits import Limits

from .serving import scripted

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
        assert reply.json()["error"]["code"] == "rate_limit_exceeded"
        for client in clients:
            client.close()
        until(lambda: server.engine.idle and server.dispatcher.open == 0)
        assert httpx.post(f"{server.url}/v1/completions", json={"max_tokens": 1}).status_code == 200
        # an idle server takes a request that is larger than what may wait
        reply = httpx.post(f"{server.url}/v1/completions", json={"prompt": ["x"] * 5, "max_tokens": 1})
        assert len(reply.json()["choices"]) == 5


def test_connections_are_limited_and_silent_ones_are_closed():
    with scripted(limits=Limits(connections=3, receiving=0.5, finishing=5)) as server:
        address = "127.0.0.1", server.port
        silent = [socket.create_connection(address, timeout=20) for _ in range(3)]
        silent[1].sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Le")
        silent[2].sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\n{")
        until(lambda: len(server.server.server_state.connections) == 3)
        client = http.client.HTTPConnection(*address, timeout=20)
        client.request("GET", "/health")
        reply = client.getresponse()
        assert reply.status == 503 and json.loads(reply.read())["error"]["code"] == "too_many_connections"
        assert silent[0].recv(100) == b"" == silent[1].recv(100)
        assert silent[2].recv(100).startswith(b"HTTP/1.1 408 ")
        until(lambda: not server.server.server_state.connections)
        assert httpx.get(f"{server.url}/health").status_code == 200


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
        assert httpx.post(url, content=json.dumps({"prompt": "Q"})).status_code == 200


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
    known = {"", "100", "200", "400", "403", "404", "405", "408", "413"}
    assert set(statuses) <= known and statuses.count("200") > 9 and statuses.count("400") > 100
    assert "Traceback" not in caplog.text and "Traceback" not in capfd.readouterr().err


def test_an_engine_that_breaks_lets_nobody_wait(capfd):
    with scripted(ENDLESS, pause=0.001) as server:
        client = opened(server, {**LONG, "stream": True})
        server.engine.decoder.step = None
        whole = b""
        while part := client.recv(65536):
            whole += part
            if b"[DONE]" in whole:
                break
        client.close()
        assert b'"error":{"message":"the engine stopped' in whole
        assert httpx.get(f"{server.url}/health").status_code == 503
        reply = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": HI})
        assert reply.status_code == 503 and reply.json()["error"]["code"] == "broken"
        server.engine.rows.clear()
    assert "TypeError" in capfd.readouterr().err  # for the operator


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
            until(lambda: server.engine.waiting == 4)
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
