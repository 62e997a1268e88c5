"""Exported files in llama.cpp's server, from the package xllamacpp.

A chat ends its turn; a JSON schema and required tools give answers that parse.
"""

import contextlib
import importlib.util
import json
import subprocess
import sys
import urllib.request

import pytest
import torch
from torch.nn.functional import normalize

from rwkv_miss.files.checkpoint import write_checkpoint
from src.export import export

from .conftest import make_arch, random_tensors

pytest.importorskip("gguf", reason="the extra convert is absent: pip install gguf")
if not importlib.util.find_spec("xllamacpp"):
    pytest.skip("LLAMA.CPP ABSENT, its server is not tried: pip install xllamacpp", allow_module_level=True)
# a process of its own, which a fault in a grammar ends
PROGRAM = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, *adapters = sys.argv[1:]
params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 0.0) for path in adapters]
params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 1024, 1, False, -1
params.cpuparams.n_threads = params.n_threads_http = 1
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""
MARKS = ["\n\n", "✿", "Assistant:", "```json\n", " Hello"]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1, 2]}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@contextlib.contextmanager
def serving(model, *adapters):
    """Start a server; yield the function (path, request or None) -> its answer."""
    command = [sys.executable, "-c", PROGRAM, str(model), *map(str, adapters)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    with process:
        address = process.stdout.readline().strip()

        def ask(path, request=None):
            body = None if request is None else json.dumps(request).encode()
            asked = urllib.request.Request(address + path, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(asked, timeout=60) as answer:
                return json.load(answer)

        try:
            yield ask
        finally:
            process.stdin.close()


def scripted(folder, template, *answer):
    """A GGUF file of a model whose next token depends on the last one alone: `answer` after an answer's
    opening, and any token where a grammar leaves the script.
    """
    pieces = [*map(chr, (9, 10, *range(32, 127))), *MARKS]
    ids = {piece: i for i, piece in enumerate(pieces, 1)}
    lines = (f"{i} {piece!r} {len(piece.encode())}\n" for piece, i in ids.items())
    (folder / "v.txt").write_text("".join(lines), encoding="utf-8")
    tensors = random_tensors(make_arch(7, 1, 64, 64, 128))
    tensors["blocks.0.att.output.weight"] *= 0
    tensors["blocks.0.ffn.value.weight"] *= 0
    emb = normalize(tensors["emb.weight"], dim=-1)
    for before, after in zip(answer, answer[1:]):
        tensors["head.weight"][ids[after]] += 8 * emb[ids[before]]
    for norm in ("blocks.0.ln0", "ln_out"):
        tensors |= {f"{norm}.weight": torch.ones(64), f"{norm}.bias": torch.zeros(64)}
    metadata = {"tokenizer": str(folder / "v.txt"), "template": template}
    write_checkpoint(folder / "m.pth", tensors.items(), metadata)
    export(folder / "m.pth", folder / "m.gguf", "gguf", "F32")
    return folder / "m.gguf"


def chat(ask, **request):
    request |= {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 300, "temperature": 0}
    answer = ask("/v1/chat/completions", request)
    return answer["choices"][0]


@pytest.mark.parametrize(
    "template,opening,close,end", [("rwkv:json", "Assistant:", "`", "\n\n"), ("flower:json", "k", "`", "✿")]
)
def test_a_turn_ends_and_grammars_hold(tmp_path, template, opening, close, end):
    with serving(scripted(tmp_path, template, opening, " Hello", end)) as ask:
        done = chat(ask)
        assert (done["finish_reason"], done["message"]["content"].strip()) == ("stop", "Hello")
        form = {"type": "json_schema", "json_schema": {"name": "form", "schema": SCHEMA}}
        done = chat(ask, response_format=form)
        found = json.loads(done["message"]["content"])
        assert done["finish_reason"] == "stop" and found["a"] in (1, 2) and found["b"] in ("x", "y")
    function = {"name": "add", "description": "Add.", "parameters": SCHEMA}
    with serving(scripted(tmp_path, template, opening, "```json\n", close, end)) as ask:
        done = chat(ask, tools=[{"type": "function", "function": function}], tool_choice="required")
        (called,) = done["message"]["tool_calls"]
        found = json.loads(called["function"]["arguments"])
        assert called["function"]["name"] == "add" and found.keys() == {"a", "b"}
