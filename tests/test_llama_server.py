"""Exported files in llama.cpp's server, from the package xllamacpp.

A chat ends its turn; a JSON schema and required tools give answers that parse; adapters are switched.
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

import rwkv_miss
from rwkv_miss.files.checkpoint import write_checkpoint
from src.export import export
from src.model import RWKV

from .conftest import make_arch, random_tensors
from .test_adapters import filled

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
MARKS = ["\n\n", "✿", "Assistant:", "```json", " Hello"]
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


PIECES = [*map(chr, (9, 10, *range(32, 127))), *MARKS]
IDS = {piece: i for i, piece in enumerate(PIECES, 1)}


def saved(path, tensors, template="rwkv:json"):
    """A checkpoint with the vocabulary of PIECES."""
    vocabulary = path.with_name("v.txt")
    lines = (f"{i} {piece!r} {len(piece.encode())}\n" for piece, i in IDS.items())
    vocabulary.write_text("".join(lines), encoding="utf-8")
    write_checkpoint(path, tensors.items(), {"tokenizer": str(vocabulary), "template": template})


def scripted(folder, template, *answer):
    """A GGUF file of a model whose next token depends on the last one alone.

    After an answer's opening comes `answer`, and any token where a grammar leaves the script.
    """
    tensors = random_tensors(make_arch(7, 1, 64, 64, 128))
    tensors["blocks.0.att.output.weight"] *= 0
    tensors["blocks.0.ffn.value.weight"] *= 0
    emb = normalize(tensors["emb.weight"], dim=-1)
    for before, after in zip(answer, answer[1:]):
        tensors["head.weight"][IDS[after]] += 8 * emb[IDS[before]]
    for norm in ("blocks.0.ln0", "ln_out"):
        tensors |= {f"{norm}.weight": torch.ones(64), f"{norm}.bias": torch.zeros(64)}
    saved(folder / "m.pth", tensors, template)
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
    with serving(scripted(tmp_path, template, opening, "```json", "\n", close, end)) as ask:
        for choice in ("required", "auto"):
            done = chat(ask, tools=[{"type": "function", "function": function}], tool_choice=choice)
            (called,) = done["message"]["tool_calls"]
            found = json.loads(called["function"]["arguments"])
            assert called["function"]["name"] == "add" and found.keys() == {"a", "b"}


def test_adapters_are_switched_while_it_runs(tmp_path):
    base, files = tmp_path / "base.pth", {}
    saved(base, random_tensors(make_arch(7, 2, 64, 64, 128)))
    for name, method in (("base", ""), ("a", "miss"), ("b", "lora")):
        path = merged = tmp_path / f"{name}.pth"
        if method:
            model = RWKV.load(base)
            rwkv_miss.inject(model, method, rank=4)
            rwkv_miss.save_adapter(filled(model, ord(name)), path)
            merged = tmp_path / f"{name}-merged.pth"
            rwkv_miss.merge_file(base, path, merged)
            export(path, tmp_path / f"{name}.gguf", "gguf", "F32")
        files[name] = tmp_path / f"{name}-merged.gguf"
        export(merged, files[name], "gguf", "F32")

    def answer(ask):
        # the server's cache of prompts knows no adapters
        request = {"prompt": "User: Hi", "n_predict": 24, "temperature": 0, "cache_prompt": False}
        return ask("/completion", request | {"ignore_eos": True})["content"]

    want = {}
    for name, file in files.items():
        with serving(file) as ask:
            want[name] = answer(ask)
    assert len(set(want.values())) == 3
    with serving(files["base"], tmp_path / "a.gguf", tmp_path / "b.gguf") as ask:
        for name in ("base", "a", "b", "a", "base"):
            scales = [{"id": i, "scale": float(name == other)} for i, other in enumerate("ab")]
            ask("/lora-adapters", scales)
            assert answer(ask) == want[name], name
