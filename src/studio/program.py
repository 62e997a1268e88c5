"""Program of the training page: folders and flags are checked, and it answers until a signal ends it."""

from __future__ import annotations

import shlex
import sys

from rwkv_miss.errors import UserError

from ..common.available_memory import parse_size
from ..config.parse import flag_parser, read_flags, settle
from ..serving.app import make_app
from ..serving.flags import Flags
from ..serving.listener import allow_files, bound
from ..serving.program import address, guard_of
from ..serving.uvicorn_server import Server
from .app import Studio
from .folders import Folders
from .trial import Mounted, TriedModel


def run(args: Flags) -> None:
    limits = args.limits
    allow_files(limits.connections)
    operators = checked_flags(args.train_flags)
    upload_bytes = parse_size(args.limit_upload or "4GB", "--limit_upload")
    listener = bound(args.host, args.port)
    folders = Folders(args.train, args.models)  # last, as it makes the work folder
    trial = TriedModel(args, limits)
    studio = Studio(folders, operators, trial, upload_bytes)
    app = make_app(studio.all(), guard_of(args), args.log_requests, trial.metrics.refused, studio.close)

    def say_where() -> None:
        print(
            f"training page: {address(args, listener)}\ndata and runs are in {folders.work}. Ctrl-C ends the"
            " server; runs go on",
            file=sys.stderr,
            flush=True,
        )

    Server(Mounted(app, trial), trial, listener, say_where, args.tls_cert, args.tls_key).run()


def checked_flags(text: str) -> dict[str, str]:
    """Read --train_flags into settings by name. Raises UserError for flags that train.py does not have."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"--train_flags {text}: {error}") from None
    settings = read_flags(flag_parser("--train_flags", ""), words)
    settle(settings)
    return settings
