"""Flags of the server."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import ssl
import sys
from typing import Any

from rwkv_miss.errors import UserError
from rwkv_miss.flags import flag, flags_of, given, options

from ..common.available_memory import parse_size
from ..common.formatting import size_text
from ..inference.flags import (
    MAX_TOKENS_HELP,
    MODEL_HELP,
    SEEDS,
    DeviceFlags,
    FileFlags,
    TextFlags,
    with_names,
)
from ..inference.sampling import Sampling
from .limits import Limits

PACKAGES = ("starlette", "uvicorn")


def without_defaults(kind: type, default: str) -> type:
    """Make a dataclass with the same flags, None where one is not given; the help says `default` then."""
    fields = [field for field in dataclasses.fields(kind) if field.metadata]
    helps = [field.metadata["help"].replace("%(default)s", default) for field in fields]
    made = [(field.name, field.type, flag(None, help)) for field, help in zip(fields, helps)]
    return dataclasses.make_dataclass(f"Given{kind.__name__}", made, frozen=True)


@options
class AddressFlags:
    """Address, and who may ask. check() reads the keys."""

    host: str = flag("127.0.0.1", "address to listen at; default %(default)s, this machine only")
    port: int = flag(8000, "port to listen at; 0: a free one; default %(default)s", low=0, high=65535)
    api_key: str | None = flag(
        None, "key that clients have to send; needed if other machines can reach the --host"
    )
    api_key_file: str | None = flag(
        None,
        "a file with a key in each line, so that the command line does not show them",
        metavar="FILE",
    )
    admin_key_file: str | None = flag(
        None,
        "a file with a key in each line, one of which clients have to send to change something on the"
        " server, such as its adapters; default: whoever may ask may do that",
        metavar="FILE",
    )
    tls_cert: str | None = flag(
        None, "certificate, with its chain, in PEM; needs --tls_key; default: no TLS", metavar="FILE"
    )
    tls_key: str | None = flag(None, "private key of --tls_cert, in PEM", metavar="FILE")
    allow_host: list[str] = flag(
        [], "another name under which clients reach this machine, such as a proxy's", metavar="NAME"
    )
    cors_origin: list[str] = flag(
        [],
        "a site, such as https://chat.example.org, whose pages may send requests from a browser;"
        " default: none",
        metavar="URL",
    )
    name: str | None = flag(
        None, "name of the base model for clients; default: its file's name without suffix"
    )
    adapter_dir: str | None = flag(
        None,
        "folder whose adapters clients may load with POST /v1/adapters, and files of states with POST"
        " /v1/states; default: none",
        metavar="FOLDER",
    )
    log_requests: bool = flag(
        False, "write a line to stderr for each request: time, address, path, status, seconds; no content"
    )
    keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()


@options
class TrainingFlags:
    """Training page, which is served instead of a model."""

    train: str | None = flag(
        None,
        "serve the page that trains models, instead of a --model. Data and runs are kept in this folder",
        metavar="FOLDER",
    )
    models: list[str] = flag(
        [],
        "another folder with models and data that the training page may read; give the flag again for more",
        metavar="FOLDER",
    )
    train_flags: str = flag(
        "",
        "flags of train.py for every run of the training page, such as '--reward_file rewards.py'",
        metavar="FLAGS",
    )
    limit_upload: str = flag("", "the largest data file for the training page; default 4GB", metavar="SIZE")


@options
class DrawingFlags:
    """Choice of an answer's tokens, where a request leaves it open."""

    max_tokens: int = flag(1024, MAX_TOKENS_HELP, low=1)
    sampling: Any = flags_of(without_defaults(Sampling, "as recommended for the template"))
    seed: int | None = flag(None, "seed of the random numbers; default a new one for every request", **SEEDS)


@options
class EngineFlags:
    """Rows of the engine, its cache, and how much clients may ask for."""

    rows: int = flag(16, "answers that are written at once; default %(default)s", low=1)
    cache: str = flag("1GB", "memory for states of prompts; 0: none; default %(default)s")
    chunk: int = flag(
        0,
        "tokens of a prompt that are read at once, while other answers wait; 0: by the model's shape",
        low=0,
    )
    limit_body: str = flag(
        size_text(Limits.body_bytes).replace(" ", "").replace(".00", ""),
        "the largest request; default %(default)s",
    )
    client_limits: Limits = flags_of(Limits)

    @property
    def limits(self) -> Limits:
        """Limits with the bytes of --limit_body. Raises UserError if that is no size."""
        size = parse_size(self.limit_body, "--limit_body")
        return dataclasses.replace(self.client_limits, body_bytes=size)

    def cache_bytes(self) -> int:
        """Read --cache. Raises UserError if that is no size."""
        return 0 if self.cache.strip() == "0" else parse_size(self.cache, "--cache")


@options
class Flags(EngineFlags, DeviceFlags, DrawingFlags, TextFlags, TrainingFlags, FileFlags, AddressFlags):
    """Flags of the server."""

    model: str | None = flag(None, MODEL_HELP)


def check(args: Flags) -> Flags:
    """Read the adapters' names and the keys. Raise UserError for values and pairs of flags that make no
    sense."""
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        raise UserError(
            f"the server needs {' and '.join(absent)}, not installed for {sys.executable}: pip install"
            f" {' '.join(PACKAGES)}"
        )
    if bool(args.model) == bool(args.train):
        both = " or --train FOLDER, not both" if args.model else ", or --train FOLDER for the training page"
        raise UserError(f"give --model FILE{both}")
    stray = ("adapter", "adapter_dir") if args.train else ("models", "train_flags", "limit_upload")
    for name, _ in given(args, stray):
        raise UserError(f"--{name} has no meaning {'with' if args.train else 'without'} --train; drop it")
    if args.train and importlib.util.find_spec("fcntl") is None:
        raise UserError("--train needs locks of files, which Windows lacks; use WSL, or train.py itself")
    args = with_names(args)
    dataclasses.replace(Sampling(), **dict(given(args.sampling))).check()
    if args.adapter_dir and not os.path.isdir(args.adapter_dir):
        raise UserError(f"--adapter_dir {args.adapter_dir} is no folder")
    for origin in args.cors_origin:
        if not re.fullmatch(r"[a-zA-Z][a-zA-Z0-9+.-]*://[^\s/*]+/?", origin):
            raise UserError(
                f"--cors_origin {origin}: expected scheme://host, with a port if it has one, as browsers send"
                " it, such as https://chat.example.org"
            )
    if any(set(name) & set(":+") for name in args.adapters):
        raise UserError("the name of an adapter may have no : and no +, which part names in requests")
    args = with_keys(args)
    check_tls(args)
    return args


def with_keys(args: Flags) -> Flags:
    """Read the keys. Raise UserError if one is needed and none is given."""
    from .guard import is_own_machine

    if args.api_key is not None and args.api_key_file:
        raise UserError("--api_key and --api_key_file both give the key; drop one of them")
    if args.api_key == "":
        raise UserError("--api_key is empty; give a key, or leave it out")
    keys = (args.api_key,) if args.api_key else read_keys(args.api_key_file, "--api_key_file")
    admin_keys = read_keys(args.admin_key_file, "--admin_key_file")
    if not all(key.isascii() and key.isprintable() and " " not in key for key in keys + admin_keys):
        raise UserError(
            "a key has ASCII characters without spaces, since it is sent in a header; give another --api_key"
        )
    if not keys and not is_own_machine(args.host):
        raise UserError(
            f"--host {args.host} can be reached from other machines: give a key with --api_key_file FILE, or"
            " leave --host out"
        )
    return dataclasses.replace(args, keys=keys, admin_keys=admin_keys)


def read_keys(path: str | None, flag: str) -> tuple[str, ...]:
    """Read the keys in the lines of a file; () without a file. Raises UserError if it has none."""
    if path is None:
        return ()
    try:
        with open(path, encoding="utf-8") as file:
            keys = tuple(filter(None, map(str.strip, file)))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {path} can't be read: {getattr(error, 'strerror', error)}") from None
    if not keys:
        raise UserError(f"{flag} {path} is empty")
    return keys


def check_tls(args: Flags) -> None:
    """Raise UserError for a certificate and a key that are no pair."""
    if bool(args.tls_cert) != bool(args.tls_key):
        raise UserError("--tls_cert and --tls_key need each other; give both, or none")
    if not args.tls_cert:
        return
    try:
        # an encrypted key is refused: nobody is there to type its password after a restart
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(args.tls_cert, args.tls_key, lambda: "")
    except (OSError, ValueError) as error:
        raise UserError(
            f"--tls_cert {args.tls_cert} --tls_key {args.tls_key}: {getattr(error, 'strerror', error)};"
            " expected a certificate and its key without a password, both in PEM"
        ) from None
