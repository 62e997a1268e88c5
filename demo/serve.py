"""An OpenAI-compatible server for a model file, or for a base and its adapters, unmerged.

python -m demo.serve --model merged.pth
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
import os
import socket
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

if not __package__:  # started by its path, from which src is not found
    raise SystemExit("error: run this from the repository's folder as python -m demo.serve")

from src.common.startup import importing, naming_missing_packages

with importing():
    from demo.flags import (
        Recorded,
        add_device,
        add_files,
        add_sampling,
        add_text,
        check_shared,
        decoder_options,
        named,
    )
    from rwkv_miss.errors import Parser, UserError, one_line_errors
    from rwkv_miss.files.hub import local_path
    from rwkv_miss.files.mapped import naming_changed_files
    from src.common.available_memory import parse_size, resident
    from src.common.formatting import counted, size_text
    from src.data.released import modes_note
    from src.data.templates import choose_template
    from src.inference.adapters import Adapters
    from src.inference.decoders import fastest, measured_chunk
    from src.inference.engine import Engine
    from src.inference.load import load_with, refuse_folders
    from src.inference.sampling import Sampling
    from src.serving.limits import Limits

PACKAGES = ("starlette", "uvicorn")
SECONDS = 0.06  # that reading a chunk of a prompt may take, while others wait for their next token
COUNTS = {
    "limit_prompt": "prompt_tokens",
    "limit_answer": "answer_tokens",
    "limit_answers": "answers",
    "limit_waiting": "waiting",
    "limit_connections": "connections",
}
TIMES = {"limit_receiving": "receiving", "limit_finishing": "finishing"}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m demo.serve", description=__doc__)
    add_address(parser.add_argument)
    add_files(parser.add_argument)
    add_text(parser.add_argument)
    add_sampling(parser.add_argument, max_tokens=1024, recommended=True)
    add_device(parser.add_argument)
    add_engine(parser.add_argument)
    add_limits(parser.add_argument)
    args = parser.parse_args(argv)
    args.adapter = named(args.adapter)
    check(args)
    return args


def add_address(add: Callable) -> None:
    """Where it listens, and who may ask."""
    add("--host", default="127.0.0.1", help="address to listen at; default %(default)s, this machine only")
    add("--port", type=int, default=8000, help="port to listen at; 0: a free one; default %(default)s")
    add("--api_key", default="", help="what clients have to send; needed where others can reach the --host")
    add("--api_key_file", metavar="FILE", help="a file with the key, which command lines then do not show")
    add(
        "--allow_host",
        action="append",
        default=[],
        metavar="NAME",
        help="a further name that this machine is asked by, such as a proxy's",
    )
    add(
        "--cors_origin",
        action="append",
        default=[],
        metavar="URL",
        help="a site, such as https://chat.example.org, whose pages may ask from a browser; without it: none",
    )
    add("--name", help="what clients call the base; its file's name without suffix unless given")
    add(
        "--adapter_dir",
        metavar="FOLDER",
        help="folder whose adapters clients may load with POST /v1/adapters; without it: none",
    )


def add_engine(add: Callable) -> None:
    """How many answers are written at once, and what is kept."""
    add("--rows", type=int, default=16, help="answers that are written at once; default %(default)s")
    add("--cache", default="1GB", help="memory for states of prompts; 0: none; default %(default)s")
    add(
        "--chunk",
        type=int,
        default=0,
        help="tokens of a prompt that are read at once; 0: as many as take 60 ms, measured at the start",
    )


def add_limits(add: Callable) -> None:
    """How much clients may ask for."""
    default = Limits()
    add(
        "--limit_body",
        default=size_text(default.body_bytes).replace(" ", "").replace(".00", ""),
        help="the largest request; default %(default)s",
    )
    helps = {
        "limit_prompt": "the longest prompt, in tokens",
        "limit_answer": "the longest answer, in tokens",
        "limit_answers": "the most answers to one request",
        "limit_waiting": "the most answers that may wait; others are told to try again",
        "limit_connections": "the most connections",
    }
    for flag, text in helps.items():
        add(
            f"--{flag}", type=int, default=getattr(default, COUNTS[flag]), help=f"{text}; default %(default)s"
        )
    helps = {
        "limit_receiving": "seconds until a request has arrived",
        "limit_finishing": "seconds that running answers have after SIGTERM",
    }
    for flag, text in helps.items():
        add(
            f"--{flag}",
            type=float,
            default=getattr(default, TIMES[flag]),
            help=f"{text}; default %(default)s",
        )


def check(args: argparse.Namespace) -> None:
    """UserError for values and pairs of flags that make no sense."""
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        raise UserError(
            f"the server needs {' and '.join(absent)}, not installed for {sys.executable}: pip install"
            f" {' '.join(PACKAGES)}"
        )
    check_shared(args)
    least = {"rows": 1, "port": 0, "chunk": 0, **dict.fromkeys(COUNTS, 1)}
    least["limit_waiting"] = 0
    for flag, low in least.items():
        if getattr(args, flag) < low:
            raise UserError(f"--{flag} {getattr(args, flag)}: expected {low} or more")
    if args.port > 65535:
        raise UserError(f"--port {args.port}: expected at most 65535")
    for flag in TIMES:
        if not 0 < getattr(args, flag) < math.inf:
            raise UserError(f"--{flag} {getattr(args, flag)}: expected more than 0 seconds")
    dataclasses.replace(Sampling(), **chosen_sampling(args)).check()
    if args.adapter_dir and not os.path.isdir(args.adapter_dir):
        raise UserError(f"--adapter_dir {args.adapter_dir} is no folder")
    if any(set(name) & set(":+") for name in args.adapter):
        raise UserError("the name of an adapter may have no : and no +, which part names in requests")
    check_key(args)


def check_key(args: argparse.Namespace) -> None:
    """The key of --api_key_file becomes --api_key. UserError where there has to be one."""
    from src.serving.guard import is_own_machine

    if args.api_key and args.api_key_file:
        raise UserError("--api_key and --api_key_file both give the key; drop one of them")
    if args.api_key_file:
        try:
            with open(args.api_key_file, encoding="utf-8") as file:
                args.api_key = file.read().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--api_key_file {args.api_key_file} can't be read: {error}") from None
        if not args.api_key:
            raise UserError(f"--api_key_file {args.api_key_file} is empty")
    if args.api_key and not (
        args.api_key.isascii() and args.api_key.isprintable() and " " not in args.api_key
    ):
        raise UserError("the API key may have ASCII characters without spaces only: it is sent in a header")
    if not args.api_key and not is_own_machine(args.host):
        raise UserError(
            f"--host {args.host} can be reached from other machines: give a key with --api_key_file FILE, or"
            " leave --host out"
        )


def chosen_sampling(args: argparse.Namespace) -> dict[str, float]:
    """The fields of Sampling that the command line says."""
    names = (field.name for field in dataclasses.fields(Sampling))
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


def limits_of(args: argparse.Namespace) -> Limits:
    names = {**COUNTS, **TIMES}
    given = {field: getattr(args, flag) for flag, field in names.items()}
    return Limits(body_bytes=parse_size(args.limit_body, "--limit_body"), **given)


class Loaded(NamedTuple):
    """What answers."""

    engine: Engine
    served: Any  # served_models.ServedModels, which needs the packages of the server
    how: str  # which decoder it is, in words


def load(args: argparse.Namespace) -> Loaded:
    """Read the model and its adapters. UserError for files that do not fit."""
    from src.serving.served_models import Records, ServedModels

    choose_template(args.template, args.tool_style, None, None)
    refuse_folders(args.adapter)
    cache = 0 if args.cache.strip() == "0" else parse_size(args.cache, "--cache")
    args.model = local_path(args.model)
    files = {name: local_path(path) for name, path in args.adapter.items()}
    adapters, tokenizer = load_with(
        args.model, files, args.tokenizer, args.eod, args.accelerator, args.precision, args.wkv
    )
    name = args.name or os.path.splitext(os.path.basename(os.path.normpath(args.model)))[0]
    name = merged_name(adapters, name, args.scale)
    recorded = Recorded(args, tokenizer)
    records = Records(recorded.template, recorded.bos, tokenizer.name)
    served = ServedModels(name, adapters, records, args.scale, args.adapter_dir)
    decoder, how = fastest(adapters.model, adapters, args.rows, **decoder_options(args))
    chunk = args.chunk or measured_chunk(decoder, SECONDS)
    engine = Engine(decoder, tokenizer, chunk, reads_first=False, cache_bytes=cache)
    return Loaded(engine, served, how)


def merged_name(adapters: Adapters, name: str, scale: float) -> str:
    """Merge an only adapter by which rows cannot differ into the model; return what the model is called."""
    names = list(adapters.by_name)
    if len(names) != 1 or not (reason := adapters.by_name[names[0]].reason_to_merge()):
        return name
    adapters.use(names, scale)
    print(
        f"note: adapter {names[0]!r} is merged into the model: {reason}. It is the only --adapter, so all"
        f" requests get it, and the model is called {name}:{names[0]}",
        file=sys.stderr,
    )
    return f"{name}:{names[0]}"


def main(argv: list[str] | None = None) -> None:
    with one_line_errors(), naming_missing_packages(), naming_changed_files():
        args = parse(argv)
        limits = limits_of(args)
        from src.serving.uvicorn_server import bound

        listener = bound(args.host, args.port)  # before a model is read in vain
        serve(args, limits, listener, load(args))


def serve(args: argparse.Namespace, limits: Limits, listener: socket.socket, loaded: Loaded) -> None:
    """Answer until a signal ends the server."""
    from src.serving.app import assemble
    from src.serving.guard import OWN_NAMES, Guard, is_own_machine
    from src.serving.request_parsing import Defaults
    from src.serving.uvicorn_server import Server

    engine, served, how = loaded
    own = is_own_machine(args.host)
    hosts = frozenset(name.lower() for name in (*OWN_NAMES, args.host, *args.allow_host)) if own else None
    origins = frozenset(origin.rstrip("/") for origin in args.cors_origin)
    defaults = Defaults(args.max_tokens, args.system, chosen_sampling(args), args.seed)
    app, dispatcher = assemble(
        engine, served, defaults, limits, Guard(args.api_key, hosts, origins), device=how, rows=args.rows
    )

    def say_where() -> None:
        port = listener.getsockname()[1]
        # all addresses of the machine are none that a browser can open
        name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(args.host, args.host)
        host = f"[{name}]" if ":" in name else name
        print(
            f"chat page: http://{host}:{port}\nOpenAI's API: http://{host}:{port}/v1, models"
            f" {', '.join(served.models())}\n{how}; {counted(args.rows, 'row')},"
            f" prompts in chunks of {counted(engine.chunk, 'token')}; {size_text(resident())} of memory."
            " Ctrl-C ends the server.",
            file=sys.stderr,
            flush=True,
        )
        if known := modes_note(args.model, served.template):
            print(f"note: {known}; reasoning_effort and think_mode choose for a request", file=sys.stderr)

    dispatcher.worker.start()
    try:
        server = Server(app, dispatcher, listener, say_where)
        server.run()
    finally:
        dispatcher.worker.close()
    if dispatcher.worker.changed_file:
        raise dispatcher.worker.changed_file


if __name__ == "__main__":
    main()
