"""Flags of the server."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
import os
import re
import ssl
import sys
from collections.abc import Callable

from rwkv_miss.errors import UserError

from ..common.available_memory import parse_size
from ..common.formatting import size_text
from ..inference.flags import add_device, add_files, add_sampling, add_text, check_shared, named
from ..inference.sampling import Sampling
from .limits import Limits

PACKAGES = ("starlette", "uvicorn")
# flag -> (the field of Limits, its meaning)
LIMITS = {
    "limit_prompt": ("prompt_tokens", "the longest prompt, in tokens"),
    "limit_answer": ("answer_tokens", "the longest answer, in tokens"),
    "limit_answers": ("answers", "the most answers to one request"),
    "limit_waiting": ("waiting", "the most answers that may wait; others are told to try again"),
    "limit_states": ("states", "the most states that clients may keep"),
    "limit_adapters": ("adapters", "the most adapters that clients may load"),
    "limit_connections": ("connections", "the most connections"),
    "limit_receiving": ("receiving", "seconds until a request has arrived"),
    "limit_finishing": ("finishing", "seconds that running answers have after SIGTERM"),
}
COUNTS = [flag for flag, (field, _) in LIMITS.items() if isinstance(getattr(Limits, field), int)]
TIMES = [flag for flag in LIMITS if flag not in COUNTS]  # in seconds


def add_flags(add: Callable) -> None:
    add_address(add)
    add_files(add, required=False)
    add_training(add)
    add_text(add)
    add_sampling(add, max_tokens=1024, recommended=True)
    add_device(add)
    add_engine(add)
    add_limits(add)


def add_address(add: Callable) -> None:
    """Add the flags for the address, and for who may ask."""
    add("--host", default="127.0.0.1", help="address to listen at; default %(default)s, this machine only")
    add("--port", type=int, default=8000, help="port to listen at; 0: a free one; default %(default)s")
    add(
        "--api_key",
        help="key that clients have to send; needed if other machines can reach the --host",
    )
    add(
        "--api_key_file",
        metavar="FILE",
        help="a file with a key in each line, so that the command line does not show them",
    )
    add(
        "--admin_key_file",
        metavar="FILE",
        help="a file with a key in each line, one of which clients have to send to change something on the"
        " server, such as its adapters; default: whoever may ask may do that",
    )
    add(
        "--tls_cert",
        metavar="FILE",
        help="certificate, with its chain, in PEM; needs --tls_key; default: no TLS",
    )
    add("--tls_key", metavar="FILE", help="private key of --tls_cert, in PEM")
    add(
        "--allow_host",
        action="append",
        default=[],
        metavar="NAME",
        help="another name under which clients reach this machine, such as a proxy's",
    )
    add(
        "--cors_origin",
        action="append",
        default=[],
        metavar="URL",
        help="a site, such as https://chat.example.org, whose pages may send requests from a browser;"
        " default: none",
    )
    add("--name", help="name of the base model for clients; default: its file's name without suffix")
    add(
        "--adapter_dir",
        metavar="FOLDER",
        help="folder whose adapters clients may load with POST /v1/adapters, and files of states with POST"
        " /v1/states; default: none",
    )
    add(
        "--log_requests",
        action="store_true",
        help="write a line to stderr for each request: time, address, path, status, seconds; no content",
    )


def add_training(add: Callable) -> None:
    """Add the flags of the training page, which is served instead of a model."""
    add(
        "--train",
        metavar="FOLDER",
        help="serve the page that trains models, instead of a --model. Data and runs are kept in this folder",
    )
    add(
        "--models",
        action="append",
        default=[],
        metavar="FOLDER",
        help="another folder with models and data that the training page may read; give the flag again for"
        " more",
    )
    add(
        "--train_flags",
        default="",
        metavar="FLAGS",
        help="flags of train.py for every run of the training page, such as '--reward_file rewards.py'",
    )
    add(
        "--limit_upload",
        default="",
        metavar="SIZE",
        help="the largest data file for the training page; default 4GB",
    )


def add_engine(add: Callable) -> None:
    """Add the flags for the engine's rows and its cache."""
    add("--rows", type=int, default=16, help="answers that are written at once; default %(default)s")
    add("--cache", default="1GB", help="memory for states of prompts; 0: none; default %(default)s")
    add(
        "--chunk",
        type=int,
        default=0,
        help="tokens of a prompt that are read at once, while other answers wait; 0: by the model's shape",
    )


def add_limits(add: Callable) -> None:
    """Add the flags for how much clients may ask for."""
    default = Limits()
    add(
        "--limit_body",
        default=size_text(default.body_bytes).replace(" ", "").replace(".00", ""),
        help="the largest request; default %(default)s",
    )
    for flag, (field, text) in LIMITS.items():
        value = getattr(default, field)
        add(f"--{flag}", type=type(value), default=value, help=f"{text}; default %(default)s")


def check(args: argparse.Namespace) -> None:
    """Name the adapters, read the key. Raise UserError for values and pairs of flags that make no sense."""
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
    if misplaced := next((flag for flag in stray if getattr(args, flag)), None):
        raise UserError(
            f"--{misplaced} has no meaning {'with' if args.train else 'without'} --train; drop it"
        )
    if args.train and importlib.util.find_spec("fcntl") is None:
        raise UserError("--train needs locks of files, which Windows lacks; use WSL, or train.py itself")
    args.adapter = named(args.adapter)
    check_shared(args)
    least = {"rows": 1, "port": 0, "chunk": 0, **dict.fromkeys(COUNTS, 1)}
    least["limit_waiting"] = least["limit_states"] = least["limit_adapters"] = 0
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
    for origin in args.cors_origin:
        if not re.fullmatch(r"[a-zA-Z][a-zA-Z0-9+.-]*://[^\s/*]+/?", origin):
            raise UserError(
                f"--cors_origin {origin}: expected scheme://host, with a port if it has one, as browsers send"
                " it, such as https://chat.example.org"
            )
    if any(set(name) & set(":+") for name in args.adapter):
        raise UserError("the name of an adapter may have no : and no +, which part names in requests")
    check_keys(args)
    check_tls(args)


def check_keys(args: argparse.Namespace) -> None:
    """Read keys into args.keys and args.admin_keys. Raise UserError if one is needed and none is given."""
    from .guard import is_own_machine

    if args.api_key is not None and args.api_key_file:
        raise UserError("--api_key and --api_key_file both give the key; drop one of them")
    if args.api_key == "":
        raise UserError("--api_key is empty, and then everybody might ask; give a key, or leave it out")
    args.keys = (args.api_key,) if args.api_key else read_keys(args.api_key_file, "--api_key_file")
    args.admin_keys = read_keys(args.admin_key_file, "--admin_key_file")
    if not all(key.isascii() and key.isprintable() and " " not in key for key in args.keys + args.admin_keys):
        raise UserError("a key may have ASCII characters without spaces only: it is sent in a header")
    if not args.keys and not is_own_machine(args.host):
        raise UserError(
            f"--host {args.host} can be reached from other machines: give a key with --api_key_file FILE, or"
            " leave --host out"
        )


def read_keys(path: str | None, flag: str) -> tuple[str, ...]:
    """Read the keys in the lines of a file; () without a file. Raises UserError if it has none."""
    if path is None:
        return ()
    try:
        with open(path, encoding="utf-8") as file:
            keys = tuple(filter(None, map(str.strip, file)))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {path} can't be read: {error}") from None
    if not keys:
        raise UserError(f"{flag} {path} is empty")
    return keys


def check_tls(args: argparse.Namespace) -> None:
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
            f"--tls_cert {args.tls_cert} --tls_key {args.tls_key}: {error}; expected a certificate and its"
            " key without a password, both in PEM"
        ) from None


def chosen_sampling(args: argparse.Namespace) -> dict[str, float]:
    """Return the fields of Sampling that the command line gives."""
    names = (field.name for field in dataclasses.fields(Sampling))
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


def limits_of(args: argparse.Namespace) -> Limits:
    limits = {field: getattr(args, flag) for flag, (field, _) in LIMITS.items()}
    return Limits(body_bytes=parse_size(args.limit_body, "--limit_body"), **limits)
