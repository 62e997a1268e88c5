"""Chat with a model file, or with a base and its adapters, unmerged.

python -m demo.chat --model merged.pth
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Callable

if not __package__:  # started by its path, from which src is not found
    raise SystemExit("error: run this from the repository's folder as python -m demo.chat")

from src.common.startup import importing, naming_missing_packages

with importing():
    from demo.commands import Chat, check_typed, note_calls, show
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
    from rwkv_miss.files.hub_names import is_hub_name
    from rwkv_miss.files.mapped import naming_changed_files
    from rwkv_miss.files.model_files import model_metadata
    from src.data.leading_token import with_leading
    from src.data.released import modes_note
    from src.data.templates import choose_template
    from src.data.tool_styles import read_tools
    from src.inference.conversation import Conversation
    from src.inference.decoders import fastest
    from src.inference.engine import Engine, Request
    from src.inference.generate import stream
    from src.inference.load import load_with, refuse_folders
    from src.inference.sampling import Sampling

CHUNK = 1024  # tokens of a prompt that are read at once


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m demo.chat", description=__doc__)
    add_files(parser.add_argument)
    add_conversation(parser.add_argument)
    add_text(parser.add_argument)
    add_prompt(parser.add_argument)
    add_sampling(parser.add_argument)
    add_device(parser.add_argument)
    args = parser.parse_args(argv)
    args.adapter = named(args.adapter)
    check(args)
    return args


def add_conversation(add: Callable) -> None:
    """What a chat does with several answers, and where it goes on."""
    add(
        "--compare",
        action="store_true",
        help="answer --prompt with the base and with the adapter, side by side; in a chat: /compare TEXT",
    )
    add("--load_state", metavar="FILE", help="go on with a conversation that /save wrote")


def add_prompt(add: Callable) -> None:
    """What is asked, where it is not typed."""
    add("--prompt", help="answer this one prompt on stdout and exit; without it: a chat")
    add("--raw", action="store_true", help="take the prompt as it is, without the chat template")
    add(
        "--tools", metavar="FILE", help="JSON file with the tools that the model may call, as in OpenAI's API"
    )


def check(args: argparse.Namespace) -> None:
    """UserError for values and pairs of flags that make no sense."""
    check_shared(args)
    sampling_of(args).check()
    if args.prompt == "":
        raise UserError("--prompt is empty")
    if args.raw and not args.prompt:
        raise UserError("--raw needs --prompt")
    for flag, given in (("--scale", args.scale != 1), ("--compare", args.compare)):
        if given and not args.adapter:
            raise UserError(f"{flag} is about an --adapter; give one")
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
    """UserError for files on this machine that can't be read: then nothing is downloaded first."""
    choose_template(args.template, args.tool_style, None, None)
    refuse_folders(args.adapter)
    for path in filter(None, (args.model, *args.adapter.values(), args.load_state)):
        if not is_hub_name(path):
            model_metadata(path)


def sampling_of(args: argparse.Namespace) -> Sampling:
    return Sampling(args.temperature, args.top_p, args.top_k, args.presence_penalty, args.frequency_penalty)


def load(args: argparse.Namespace) -> tuple[Chat, str]:
    """(the chat, which decoder answers, in words). UserError for files that do not fit."""
    args.model = local_path(args.model)
    args.adapter = {name: local_path(path) for name, path in args.adapter.items()}
    adapters, tokenizer = load_with(
        args.model, args.adapter, args.tokenizer, args.eod, args.accelerator, args.precision, args.wkv
    )
    adapters.use(list(args.adapter)[:1], args.scale)
    decoder, how = fastest(adapters.model, adapters, **decoder_options(args))
    engine = Engine(decoder, tokenizer, chunk=CHUNK)
    recorded, used = Recorded(args, tokenizer), list(args.adapter.values())[:1]
    template, bos = recorded.template(used), recorded.bos(used)
    conversation = Conversation(engine, sampling_of(args), template, args.system, bos)
    conversation.generator.manual_seed(args.seed)
    chat = Chat(conversation, adapters, recorded.template, args.max_tokens, args.seed, recorded.bos)
    if args.load_state:
        chat.load_from(args.load_state)
        if (args.template, args.tool_style) != ("auto", "auto"):
            conversation.template = chat.chosen = template
        if args.bos != "recorded":
            chat.bos_of = recorded.bos
            if bos != conversation.bos:
                conversation.bos = bos
                conversation.read_again()
    return chat, how


def show_answer(args: argparse.Namespace, chat: Chat) -> None:
    """Answer --prompt on stdout."""
    conversation = chat.conversation
    if args.raw:
        ids = with_leading(conversation.tokenizer.encode(args.prompt), conversation.bos)
        request = Request(ids, args.max_tokens, conversation.sampling, args.seed)
        show(stream(conversation.engine, request))
    elif args.compare:
        print(chat.compared(args.prompt))
    else:
        opening = conversation.template.opening
        pieces = itertools.chain(
            [opening] if opening else [], conversation.answer(args.prompt, args.max_tokens)
        )
        show(piece.lstrip(" \n") if i == 0 else piece for i, piece in enumerate(pieces))
        note_calls(conversation.calls)


def main(argv: list[str] | None = None) -> None:
    with one_line_errors(), naming_missing_packages(), naming_changed_files():
        args = parse(argv)
        tools = read_tools(args.tools) if args.tools else []
        check_local(args)
        chat, how = load(args)
        if tools:
            chat.conversation.use_tools(tools)
        if not args.raw and (known := modes_note(args.model, chat.conversation.template)):
            print(f"note: {known}; /mode chooses in a chat, with the sampling", file=sys.stderr)
        if args.prompt:
            return show_answer(args, chat)
        print(
            f"{os.path.basename(args.model)}: {chat.adapters.model.arch.describe()}; {how}. /help lists the"
            " commands, /exit ends the chat.",
            file=sys.stderr,
        )
        chat.converse()


if __name__ == "__main__":
    main()
