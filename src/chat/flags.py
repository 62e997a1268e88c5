"""Flags of a chat."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from rwkv_miss.errors import UserError
from rwkv_miss.files.hub_names import is_hub_name
from rwkv_miss.files.model_files import model_metadata

from ..data.templates import choose_template
from ..inference.flags import add_device, add_files, add_sampling, add_text, check_shared, named
from ..inference.load import refuse_folders
from ..inference.sampling import Sampling
from .commands import check_typed


def add_flags(add: Callable) -> None:
    add_files(add)
    add_conversation(add)
    add_text(add)
    add_prompt(add)
    add_sampling(add)
    add_device(add)


def add_conversation(add: Callable) -> None:
    """Add the flags for several answers and for a saved conversation."""
    add(
        "--compare",
        action="store_true",
        help="answer --prompt with the base and with the adapter, side by side; in a chat: /compare TEXT",
    )
    add("--load_state", metavar="FILE", help="go on with a conversation that /save wrote")


def add_prompt(add: Callable) -> None:
    """Add the flags for one prompt and for tools."""
    add("--prompt", help="answer this one prompt on stdout and exit; without it: a chat")
    add("--raw", action="store_true", help="take the prompt as it is, without the chat template")
    add(
        "--tools", metavar="FILE", help="JSON file with the tools that the model may call, as in OpenAI's API"
    )


def check(args: argparse.Namespace) -> None:
    """Name the adapters. Raise UserError for values and pairs of flags that make no sense."""
    args.adapter = named(args.adapter)
    check_shared(args)
    sampling_of(args).check()
    if args.prompt == "":
        raise UserError("--prompt is empty")
    if args.raw and not args.prompt:
        raise UserError("--raw needs --prompt")
    for flag, given in (("--scale", args.scale != 1), ("--compare", args.compare)):
        if given and not args.adapter:
            raise UserError(
                f"{flag} is about an --adapter that is not merged; give --model and --adapter, as a merged"
                " file has the adapter in its weights"
            )
    if args.compare and (args.raw or not args.prompt):
        raise UserError("--compare needs --prompt, without --raw; in a chat type /compare TEXT")
    if args.load_state and args.raw:
        raise UserError("--load_state goes on with a conversation, --raw has none; drop one of the two")
    if args.tools and (args.raw or args.load_state):
        other = "--raw has no conversation" if args.raw else "a saved chat has its own; /tools begins anew"
        raise UserError(f"--tools are described at the beginning of a conversation: {other}")
    for text in (args.prompt, args.system):
        check_typed(text or "")


def check_local(args: argparse.Namespace) -> None:
    """Raise UserError for files on this machine that can't be read, before anything is downloaded."""
    choose_template(args.template, args.tool_style, None, None)
    refuse_folders(args.adapter)
    for path in filter(None, (args.model, *args.adapter.values(), args.load_state)):
        if not is_hub_name(path):
            model_metadata(path)


def sampling_of(args: argparse.Namespace) -> Sampling:
    return Sampling(args.temperature, args.top_p, args.top_k, args.presence_penalty, args.frequency_penalty)
