"""Server from its flags: a model and its adapters are loaded, and answer until a signal ends them."""

from __future__ import annotations

import os
import sys
from typing import NamedTuple

from starlette.applications import Starlette

from rwkv_miss.files.mapped import ChangedFile
from rwkv_miss.flags import given
from rwkv_miss.progress import Progress

from ..common.available_memory import resident
from ..common.formatting import counted, size_text
from ..data.released import modes_note
from ..data.templates import choose_template
from ..inference.adapters import Adapters
from ..inference.decoders import fastest, prompt_chunk
from ..inference.engine import Engine
from ..inference.flags import PromptSettings, load_named, localised
from ..inference.load import refuse_folders
from .app import assemble
from .dispatcher import Dispatcher
from .flags import Flags
from .guard import OWN_NAMES, Guard, is_own_machine
from .limits import Limits
from .listener import Listener, allow_files, bound
from .renderer import plain_note
from .request_parsing import Defaults
from .served_models import Records, ServedModels
from .uvicorn_server import Server

FAILED = 70  # exit code if the engine can't go on: "internal software error" in sysexits.h


def run(args: Flags) -> None:
    limits = args.limits
    allow_files(limits.connections)
    listener = bound(args.host, args.port)  # before a model is read in vain
    check_local(args)
    args = localised(args)
    serve(args, limits, listener, load(args))


class Serving(NamedTuple):
    """Engine and models that answer."""

    engine: Engine
    served: ServedModels
    how: str  # description of the decoder


def check_local(args: Flags) -> None:
    """Raise UserError for what can't be read, before anything is downloaded."""
    choose_template(args.template, args.tool_style, None, None)
    refuse_folders(args.adapters)
    args.cache_bytes()


def load(args: Flags) -> Serving:
    """Read the model and its adapters. Raises UserError for files that do not fit."""
    adapters, tokenizer = load_named(args)
    name = args.name or os.path.splitext(os.path.basename(os.path.normpath(args.model)))[0]
    name = merged_name(adapters, name, args.scale)
    recorded = PromptSettings(args, tokenizer)
    records = Records(recorded.template, recorded.bos, tokenizer.name)
    served = ServedModels(name, adapters, records, args.scale, args.adapter_dir)
    with Progress("preparing the weights"):
        decoder, how = fastest(adapters.model, adapters, args.rows, **args.decoder)
    chunk = args.chunk or prompt_chunk(decoder)
    engine = Engine(decoder, tokenizer, chunk, reads_first=False, cache_bytes=args.cache_bytes())
    return Serving(engine, served, how)


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


def guard_of(args: Flags) -> Guard:
    is_local = is_own_machine(args.host)
    hosts = (
        frozenset(name.lower() for name in (*OWN_NAMES, args.host, *args.allow_host)) if is_local else None
    )
    origins = frozenset(origin.rstrip("/").lower() for origin in args.cors_origin)
    return Guard(args.keys, hosts, origins, args.admin_keys)


def assembled(args: Flags, limits: Limits, loaded: Serving) -> tuple[Starlette, Dispatcher]:
    """Assemble the server of what was loaded: (the application, its dispatcher)."""
    return assemble(
        loaded.engine,
        loaded.served,
        Defaults(args.max_tokens, args.system, dict(given(args.sampling)), args.seed),
        limits,
        guard_of(args),
        args.log_requests,
        device=loaded.how,
        rows=args.rows,
        chunk=loaded.engine.chunk,
    )


def address(args: Flags, listener: Listener) -> str:
    """Return the URL of the server for a browser on this machine."""
    # a browser can't open the address that stands for all of the machine's
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(args.host, args.host)
    host = f"[{name}]" if ":" in name else name
    return f"{'https' if args.tls_cert else 'http'}://{host}:{listener.getsockname()[1]}"


def serve(args: Flags, limits: Limits, listener: Listener, loaded: Serving) -> None:
    """Answer until a signal ends the server."""
    engine, served, how = loaded
    app, dispatcher = assembled(args, limits, loaded)

    def say_where() -> None:
        url = address(args, listener)
        print(
            f"chat page: {url}\nOpenAI's API: {url}/v1, models"
            f" {', '.join(served.models())}\n{how}; {counted(args.rows, 'row')},"
            f" prompts in chunks of {counted(engine.chunk, 'token')}; {size_text(resident())} of memory."
            " Ctrl-C ends the server.",
            file=sys.stderr,
            flush=True,
        )
        if note := modes_note(args.model, served.template):
            print(f"note: {note}; reasoning_effort and think_mode choose for a request", file=sys.stderr)
        if args.max_tokens > limits.answer_tokens:
            print(
                f"note: an answer has at most --limit_answer {limits.answer_tokens} tokens, not --max_tokens"
                f" {args.max_tokens}",
                file=sys.stderr,
            )
        if note := plain_note():
            print(f"note: {note}", file=sys.stderr)

    dispatcher.worker.start()
    try:
        server = Server(app, dispatcher, listener, say_where, args.tls_cert, args.tls_key)
        server.run()
    finally:
        dispatcher.worker.close()
    if isinstance(dispatcher.worker.fatal, ChangedFile):
        raise dispatcher.worker.fatal
    if dispatcher.worker.fatal:
        sys.exit(FAILED)  # the traceback was printed when it happened
