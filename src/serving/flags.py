"""Flags of the server."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
import os
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
    "limit_connections": ("connections", "the most connections"),
    "limit_receiving": ("receiving", "seconds until a request has arrived"),
    "limit_finishing": ("finishing", "seconds that running answers have after SIGTERM"),
}
COUNTS = [flag for flag, (field, _) in LIMITS.items() if isinstance(getattr(Limits, field), int)]
TIMES = [flag for flag in LIMITS if flag not in COUNTS]  # in seconds


def add_flags(add: Callable) -> None:
    add_address(add)
    add_files(add)
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
        default="",
        help="key that clients have to send; needed if other machines can reach the --host",
    )
    add(
        "--api_key_file",
        metavar="FILE",
        help="a file with the key, so that the command line does not show it",
    )
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
        help="folder whose adapters clients may load with POST /v1/adapters; default: none",
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
    args.adapter = named(args.adapter)
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
    """Read --api_key_file into --api_key. Raise UserError if a key is needed and none is given."""
    from .guard import is_own_machine

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
    """Return the fields of Sampling that the command line gives."""
    names = (field.name for field in dataclasses.fields(Sampling))
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


def limits_of(args: argparse.Namespace) -> Limits:
    given = {field: getattr(args, flag) for flag, (field, _) in LIMITS.items()}
    return Limits(body_bytes=parse_size(args.limit_body, "--limit_body"), **given)
