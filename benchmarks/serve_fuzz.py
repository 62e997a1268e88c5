"""Damaged requests to a server: python -m benchmarks.serve_fuzz --requests 10000

Each is a request to one of the server's addresses with one change: a field's value, a byte, a header, the
length, or a missing end. To any of them the server must reply with an answer or a client error, print no
traceback, and have no row taken at the end. The exit code is 1 if it fails.
"""

from __future__ import annotations

import collections
import concurrent.futures
import copy
import json
import random
import socket
import sys
import time

from .common import add_integers, argument_parser, report, settings_without

JUNK = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, 1e308, -0.5, "", "x", "\0", "\ud800", "é✿",
    "x" * 5000, [], [[]], [None], {}, {"a": {}}, [1, "a", {}], "<think>", "```json", "base:nobody",
]  # fmt: skip
PART = 1000  # requests made at once; the counts are printed after each part
BODIES = [
    (
        "/v1/chat/completions",
        {
            "model": "MODEL",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "What is the weather?"}]},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
                    ],
                },
                {"role": "tool", "tool_call_id": "c", "content": "rain"},
            ],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
            "tool_choice": "auto",
            "reasoning_effort": "none",
            "temperature": 1,
            "top_p": 0.5,
            "n": 2,
            "seed": 1,
            "stop": ["a", "b"],
            "max_tokens": 4,
            "logprobs": True,
            "top_logprobs": 2,
            "prompt_logprobs": 1,
            "logit_bias": {"65": 2, "9": -100},
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "min_tokens": 2,
            "ignore_eos": True,
            "response_format": {"type": "text"},
        },
    ),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "hi"}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": 4,
            "adapter_id": "",
            "adapter_scale": 1.0,
            "think_mode": "think",
        },
    ),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 9,
            "response_format": {
                "type": "json_schema",
                "json_schema": {
                    "name": "fruit",
                    "strict": True,
                    "schema": {
                        "type": "object",
                        "properties": {
                            "kind": {"enum": ["apple", "pear"]},
                            "weight": {"type": ["number", "null"], "minimum": 0},
                            "notes": {"type": "array", "items": {"type": "string", "maxLength": 9}},
                        },
                        "required": ["kind"],
                        "additionalProperties": False,
                    },
                },
            },
        },
    ),
    (
        "/v1/completions",
        {"prompt": "a", "max_tokens": 9, "guided_regex": "[a-z]+(-[0-9]{2,3})?", "temperature": 1},
    ),
    (
        "/v1/completions",
        {"model": "MODEL", "prompt": ["a", "b"], "max_tokens": 3, "echo": True, "logprobs": 1, "stop": None},
    ),
    (
        "/v1/responses",
        {
            "model": "MODEL",
            "instructions": "Be brief.",
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "What is the weather?"}]},
                {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "rain"},
            ],
            "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
            "tool_choice": {"type": "function", "name": "f"},
            "text": {"format": {"type": "text"}},
            "reasoning": {"effort": "none"},
            "include": ["reasoning.encrypted_content"],
            "max_output_tokens": 4,
            "stream": True,
        },
    ),
    (
        "/v1/messages",
        {
            "model": "MODEL",
            "system": [{"type": "text", "text": "Be brief."}],
            "messages": [
                {"role": "user", "content": "What is the weather?"},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "hm", "signature": ""},
                        {"type": "tool_use", "id": "c", "name": "f", "input": {}},
                    ],
                },
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": "c", "content": "rain"}],
                },
            ],
            "tools": [{"name": "f", "input_schema": {"type": "object"}}],
            "tool_choice": {"type": "auto"},
            "thinking": {"type": "disabled"},
            "output_config": {"effort": "low", "format": None},
            "stop_sequences": ["a"],
            "max_tokens": 4,
        },
    ),
    ("/tokenize", {"model": "MODEL", "prompt": "a", "add_special_tokens": True, "return_token_strs": True}),
    ("/tokenize", {"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": True}),
    ("/detokenize", {"tokens": [1, 2, 200]}),
    ("/v1/adapters", {"name": "new", "file": "new.pth"}),
]


def mutated(rng: random.Random, model: str) -> bytes:
    """Damage the bytes of a request somewhere."""
    path, body = rng.choice(BODIES)
    body = json.loads(json.dumps(body).replace("MODEL", model))
    for _ in range(rng.choice((0, 0, 0, 1, 1, 2, 5))):
        _change(rng, body)
    data = bytearray(json.dumps(body).encode())
    for _ in range(rng.choice((0, 0, 0, 0, 0, 1, 3))):
        _damage(rng, data)
    length = len(data) + rng.choice((0,) * 12 + (-5, 7))
    method = rng.choice(("POST",) * 12 + ("GET", "DELETE", "PUT", "\xff"))
    path = rng.choice(
        (path,) * 12 + ("/v1/adapters/x", "/v1/nothing", "/page/../app.py", "/v1/models/%2e%2e")
    )
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
    lines += [f"Content-Length: {length}", *rng.choice(([],) * 12 + HEADERS)]
    head = bytearray("\r\n".join([*lines, "", ""]).encode("latin-1"))
    if rng.random() < 0.1:
        _damage(rng, head)
    raw = bytes(head + data)
    return raw[: rng.randrange(len(raw))] if rng.random() < 0.1 else raw


HEADERS = (
    ["Transfer-Encoding: chunked"],
    ["Content-Length: 3"],
    ["Host: evil.example"],
    ["Origin: http://evil.example"],
    ["Expect: 100-continue"],
    ["Upgrade: websocket", "Connection: Upgrade"],
    ["X: " + "y" * 100_000],
)


def _change(rng: random.Random, value) -> None:
    """Put junk into an object or a list, at some depth."""
    places = list(value) if isinstance(value, dict) else list(range(len(value)))
    if not places:
        return
    place = rng.choice(places)
    if isinstance(value[place], (dict, list)) and rng.random() < 0.6:
        return _change(rng, value[place])
    if isinstance(value, dict) and rng.random() < 0.2:
        value[rng.choice(("extra", "functions", "suffix", "best_of", "logit_bias"))] = copy.deepcopy(
            rng.choice(JUNK)
        )
    elif isinstance(value, dict) and rng.random() < 0.2:
        del value[place]
    else:
        value[place] = copy.deepcopy(rng.choice(JUNK))


def _damage(rng: random.Random, data: bytearray) -> None:
    place = rng.randrange(len(data) + 1)
    kind = rng.randrange(3)
    if kind == 0:
        data[place:place] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
    elif kind == 1:
        del data[place : place + rng.randrange(1, 30)]
    elif place < len(data):
        data[place] = rng.randrange(256)


def sent(address: tuple[str, int], raw: bytes, patience: float = 0.3) -> str:
    """Return the status of the reply; "" if the server waits for more, or closes without a reply.

    This client hangs up after `patience` seconds without anything new, or as soon as it has the reply's head.
    """
    with socket.create_connection(address, timeout=20) as client:
        client.settimeout(patience)
        reply = b""
        try:
            client.sendall(raw)
            while b"\r\n\r\n" not in reply and (part := client.recv(65536)):
                reply += part
        except OSError:  # nothing comes, or the connection was reset
            pass
    words = reply.partition(b"\r\n")[0].split()
    return words[1].decode("latin-1") if len(words) > 1 else ""


def main() -> None:
    from .serve_load import served_model

    parser = argument_parser(__doc__)
    add_integers(parser, requests=10_000, seed=0)
    args = parser.parse_args()
    statuses: collections.Counter[str] = collections.Counter()
    rng, began = random.Random(args.seed), time.monotonic()
    with served_model(layers=2, width=64, adapters=1, max_tokens=8) as server:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for number in range(0, args.requests, PART):
                part = [mutated(rng, server.model) for _ in range(min(PART, args.requests - number))]
                statuses.update(pool.map(lambda raw: sent(server.address, raw), part))
                print(f"{number + len(part)} requests, {dict(statuses)}", flush=True)
        left = server.settled()
        printed = server.printed()
    bad = {status: count for status, count in statuses.items() if status[:1] == "5" and status != "503"}
    tracebacks = printed.count("Traceback")
    report(
        "serve_fuzz",
        **settings_without(args),
        statuses=dict(sorted(statuses.items())),
        rows_taken_at_the_end=left,
        tracebacks=tracebacks,
        seconds=round(time.monotonic() - began, 1),
    )
    if bad or left or tracebacks:
        sys.exit(printed[-4000:] or f"the server answered with an error of its own: {bad}")


if __name__ == "__main__":
    main()
