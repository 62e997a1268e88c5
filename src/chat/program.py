"""Chat from its flags: a model and its adapters are loaded, and answer."""

from __future__ import annotations

import itertools
import os
import sys

from rwkv_miss.progress import Progress

from ..data.bos import with_bos
from ..data.released import modes_note
from ..data.tool_styles import read_tools
from ..inference.conversation import Conversation
from ..inference.decoders import fastest
from ..inference.engine import Engine, Request
from ..inference.flags import PromptSettings, load_named, localised
from ..inference.generate import stream
from .commands import Chat, note_calls, show
from .flags import Flags, check_local

CHUNK = 1024  # tokens of a prompt that are read at once


def run(args: Flags) -> None:
    """Answer --prompt, or each line until the chat ends."""
    tools = read_tools(args.tools) if args.tools else []
    check_local(args)
    args = localised(args)
    chat, how = load(args)
    if tools:
        chat.conversation.use_tools(tools)
    if not args.raw and (modes := modes_note(args.model, chat.conversation.template)):
        print(f"note: {modes}; /mode chooses in a chat, with the sampling", file=sys.stderr)
    if args.prompt:
        return show_answer(args, chat)
    print(
        f"{os.path.basename(args.model)}: {chat.adapters.model.arch.describe()}; {how}. /help lists the"
        " commands, /exit ends the chat.",
        file=sys.stderr,
    )
    chat.converse()


def load(args: Flags) -> tuple[Chat, str]:
    """Load (the chat, a description of its decoder). Raises UserError for files that do not fit."""
    adapters, tokenizer = load_named(args)
    adapters.use(list(args.adapters)[:1], args.scale)
    with Progress("preparing the weights"):
        decoder, how = fastest(adapters.model, adapters, **args.decoder)
    engine = Engine(decoder, tokenizer, chunk=CHUNK)
    recorded, used = PromptSettings(args, tokenizer), list(args.adapters.values())[:1]
    template, bos = recorded.template(used), recorded.bos(used)
    conversation = Conversation(engine, args.sampling, template, args.system, bos)
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


def show_answer(args: Flags, chat: Chat) -> None:
    """Answer --prompt on stdout."""
    conversation = chat.conversation
    if args.raw:
        ids = with_bos(conversation.tokenizer.encode(args.prompt), conversation.bos)
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
