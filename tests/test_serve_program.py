"""python -m demo.serve: its flags, and its life as a process."""

import os
import re
import resource
import signal

import pytest

pytest.importorskip("starlette", reason="NO starlette (the extra test has it): the server is not tested")
pytest.importorskip("uvicorn", reason="NO uvicorn (the extra test has it): the server is not tested")
pytest.importorskip("httpx", reason="NO httpx (the extra test has it): the server is not tested")

import httpx

import rwkv_miss
from demo import serve
from rwkv_miss import UserError
from src.serving import listener, program
from src.serving.listener import bound

from .program import CONTEXT, logged, run_program
from .test_generate import letters, mixing_tensors  # noqa: F401  (a fixture)
from .test_serving_abuse import HI, until


def test_the_program_says_where_it_is_and_ends_at_sigterm(tmp_path, letters):  # noqa: F811
    rwkv_miss.write_checkpoint(tmp_path / "tiny.pth", mixing_tensors(7).items())
    (tmp_path / "key").write_text("secret\n")
    words = ["-m", "demo.serve", "--model", str(tmp_path / "tiny.pth"), "--tokenizer", letters, "--port", "0"]
    words += ["--api_key_file", str(tmp_path / "key"), "--rows", "2", "--cache", "1MB", "--chunk", "16"]
    words += ["--limit_answer", "9"]
    log = tmp_path / "log"
    process = CONTEXT.Process(target=logged, args=(log, run_program, os.getcwd(), words))
    process.start()
    try:
        # a busy machine may have the kernels to build, too
        until(lambda: not process.is_alive() or log.exists() and "ends the server" in log.read_text(), 400)
        url = re.search(r"API: (http://\S+)/v1, models tiny", log.read_text())[1]
        headers = {"Authorization": "Bearer secret"}
        body = {"messages": HI, "temperature": 0, "max_tokens": 5}
        reply = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60)
        assert reply.status_code == 200 and reply.json()["usage"]["completion_tokens"] == 5
        assert httpx.get(f"{url}/v1/models").status_code == 401
        os.kill(process.pid, signal.SIGTERM)
        process.join(30)
        assert process.exitcode == 0, log.read_text()
    finally:
        process.kill()
    said = log.read_text()
    assert "at most --limit_answer 9 tokens, not --max_tokens 1024" in said
    assert "of memory" in said and "secret" not in said and "hi" not in said.split("Ctrl-C ends")[1]


def test_the_decoder_is_the_one_that_the_flags_ask_for(tmp_path, letters, monkeypatch):  # noqa: F811
    rwkv_miss.write_checkpoint(tmp_path / "tiny.pth", mixing_tensors(7).items())

    def fastest(model, adapters, rows, **options):
        raise UserError(f"asked for {rows} rows, {options}")

    monkeypatch.setattr(program, "fastest", fastest)
    words = ["--model", str(tmp_path / "tiny.pth"), "--tokenizer", letters, "--rows", "3"]
    words += ["--quant", "int8", "--huge_pages", "no", "--activations", "bf16"]
    asked = {"int8": True, "huge_pages": "no", "bf16_activations": True}
    with pytest.raises(UserError, match=re.escape(f"asked for 3 rows, {asked}")):
        program.load(serve.parse(words))


def test_the_packages_that_are_missing_are_named(monkeypatch):
    monkeypatch.setattr("src.serving.flags.PACKAGES", ("starlette", "uvicorn_which_is_absent"))
    with pytest.raises(UserError, match="needs uvicorn_which_is_absent, .*pip install starlette"):
        serve.parse(["--model", "x.pth"])


def test_other_machines_may_ask_with_a_key():
    assert serve.parse(["--model", "x.pth", "--host", "0.0.0.0", "--api_key", "k"]).api_key == "k"


def test_a_key_file_has_a_key_in_each_line(tmp_path):
    (tmp_path / "keys").write_text("one\r\n\ntwo \n")
    (tmp_path / "bad").write_text("one\nt w o\n")
    words = ["--model", "x.pth", "--api_key_file", str(tmp_path / "keys"), "--admin_key_file"]
    args = serve.parse([*words, str(tmp_path / "keys")])
    assert args.keys == args.admin_keys == ("one", "two")
    with pytest.raises(UserError, match="without spaces"):
        serve.parse([*words, str(tmp_path / "bad")])


def test_more_connections_than_the_process_may_have_files_are_refused(monkeypatch):
    calls = []

    def setrlimit(kind, both):
        if both[0] > both[1]:
            raise ValueError("planted")
        calls.append(both)

    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    listener.allow_files(256)
    assert not calls
    listener.allow_files(1000)
    assert calls == [(2128, 4096)]
    with pytest.raises(UserError, match="--limit_connections 4000 needs 8128 open files.* at most 1984"):
        listener.allow_files(4000)


def test_a_port_that_is_taken_is_named():
    with bound("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: can't listen there"):
            bound("127.0.0.1", port)
    with pytest.raises(UserError, match="--host nowhere.invalid"):
        bound("nowhere.invalid", 1)
