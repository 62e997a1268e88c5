"""Chat with a model file, or with a base and its adapters, unmerged.

python -m demo.chat --model merged.pth
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
from collections.abc import Callable

if not __package__:  # started by its path, from which src is not found
    raise SystemExit("error: run this from the repository's folder as python -m demo.chat")

from src.common.startup import importing, naming_missing_packages

with importing():
    from demo.commands import NO_ADAPTER, Chat, check_typed, note_calls, show
    from rwkv_miss.errors import Parser, UserError, one_line_errors
    from rwkv_miss.files.hub import local_path
    from rwkv_miss.files.hub_names import is_hub_name
    from rwkv_miss.files.model_files import model_metadata
    from src.common.device import PRECISIONS
    from src.config.validate import check_bos
    from src.data.leading_token import HELP as BOS_HELP
    from src.data.leading_token import leading_token, with_leading
    from src.data.released import modes_note
    from src.data.templates import add_template_flags, choose_template, recorded_template
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


def add_files(add: Callable) -> None:
    """What answers."""
    add(
        "--model",
        required=True,
        help="base or merged .pth, or hf://OWNER/NAME[/FILE][@REVISION], or a Hugging Face folder",
    )
    add(
        "--adapter",
        action="append",
        default=[],
        metavar="[NAME=]FILE",
        help="adapter .pth trained on that base, or a name of the hub as above, by its file's name"
        " unless NAME is given; a chat begins with the first of several, a server's requests choose",
    )
    add(
        "--scale",
        type=float,
        default=1.0,
        help="what the adapter changes is multiplied by this; 1: as it was trained",
    )


def add_conversation(add: Callable) -> None:
    """What a chat does with several answers, and where it goes on."""
    add(
        "--compare",
        action="store_true",
        help="answer --prompt with the base and with the adapter, side by side; in a chat: /compare TEXT",
    )
    add("--load_state", metavar="FILE", help="go on with a conversation that /save wrote")


def add_text(add: Callable) -> None:
    """From a prompt to tokens."""
    add(
        "--tokenizer",
        default="auto",
        help="auto (as recorded in the file, else world), world, bytes, utf16, or a tokenizer file",
    )
    add("--eod", default="", help="text of the end-of-document token, where a tokenizer file does not tell")
    add_template_flags(add)
    add("--bos", default="recorded", help=BOS_HELP)
    add("--system", default="", help="text of a System: turn before the chat")


def add_prompt(add: Callable) -> None:
    """What is asked, where it is not typed."""
    add("--prompt", help="answer this one prompt on stdout and exit; without it: a chat")
    add("--raw", action="store_true", help="take the prompt as it is, without the chat template")
    add(
        "--tools", metavar="FILE", help="JSON file with the tools that the model may call, as in OpenAI's API"
    )


def add_sampling(add: Callable) -> None:
    """How the answer's tokens are drawn, and how many."""
    add("--max_tokens", type=int, default=512, help="the longest answer, in tokens; default %(default)s")
    helps = {
        "temperature": "how freely tokens are drawn; 0: always the likeliest one",
        "top_p": "draw among the likeliest tokens that have this share together; 1: among all",
        "top_k": "draw among so many of the likeliest tokens; 0: among all",
        "presence_penalty": "lowers the logit of a token that the answer holds already",
        "frequency_penalty": "lowers it once for each time that the answer holds the token",
    }
    for name, text in helps.items():
        default = getattr(Sampling, name)
        add(f"--{name}", type=type(default), default=default, help=f"{text}; default %(default)s")
    add("--seed", type=int, default=0, help="of the random numbers; default %(default)s")


def add_device(add: Callable) -> None:
    """Where it is computed, in which numbers."""
    add("--accelerator", default="auto", choices=("auto", "cpu", "gpu"))
    add(
        "--precision",
        default="auto",
        choices=("auto", *PRECISIONS),
        help="of the weights. auto: bf16 on a GPU that has it; on a CPU bf16 if the file has it, but fp32"
        " with --wkv torch or reference. On a CPU answers are computed in fp32 from bf16 weights, too, but"
        " their prompts are read in bf16 where the CPU has instructions for it: faster, with logits about"
        " 1e-3 off; fp32 avoids that. What an --adapter adds is computed beside them, in fp32",
    )
    add(
        "--quant",
        default="none",
        choices=("none", "int8"),
        help="int8: answer from weights of one byte with a scale for each row, on a CPU; prompts are read"
        " with those of --precision. It is not the int8 of train.py's --quant, which has a scale for each 64"
        " weights",
    )
    add(
        "--huge_pages",
        default="auto",
        choices=("auto", "yes", "no"),
        help="answer from a copy of the weights in memory pages of 2 MB, on a CPU, where Linux has them: up"
        " to 1.6 times as fast. It takes memory of its own where the weights are mapped from the file; auto:"
        " at most a third of what is free",
    )
    add(
        "--activations",
        default="exact",
        choices=("exact", "bf16"),
        help="bf16: those of an answer's products with bf16 weights are rounded, on a CPU with avx512_bf16:"
        " a divergence of 5e-6 nats where it was measured; default %(default)s",
    )
    add("--wkv", default="auto", help="WKV kernel: auto, cuda, cuda-exact, cpu, torch or reference")


def check(args: argparse.Namespace) -> None:
    """UserError for values and pairs of flags that make no sense."""
    if args.max_tokens < 1:
        raise UserError(f"--max_tokens {args.max_tokens}: expected 1 or more")
    sampling_of(args).check()
    check_bos(args.bos)
    if not math.isfinite(args.scale):
        raise UserError(f"--scale {args.scale}: expected a finite number")
    if not -(2**63) <= args.seed < 2**63:
        raise UserError(f"--seed {args.seed}: expected a number from -2^63 to below 2^63")
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


def named(given: list[str]) -> dict[str, str]:
    """name -> file of NAME=FILE and bare files, which have their file's name without suffix."""
    files: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or os.sep in name or os.path.exists(text):
            name, path = os.path.splitext(os.path.basename(text))[0], text
        if not name or name == NO_ADAPTER or "+" in name or name.split() != [name]:
            raise UserError(
                f"--adapter {text}: an adapter can't be called {name!r}; give it another name: --adapter"
                f" NAME={path}"
            )
        if name in files:
            raise UserError(
                f"--adapter {text}: {files[name]} is called {name}, too; give one of them another name:"
                f" --adapter NAME={path}"
            )
        files[name] = path
    return files


def main(argv: list[str] | None = None) -> None:
    with one_line_errors(), naming_missing_packages():
        args = parse(argv)
        tools = read_tools(args.tools) if args.tools else []
        check_local(args)
        args.model = local_path(args.model)
        args.adapter = {name: local_path(path) for name, path in args.adapter.items()}
        adapters, tokenizer = load_with(
            args.model, args.adapter, args.tokenizer, args.eod, args.accelerator, args.precision, args.wkv
        )
        adapters.use(list(args.adapter)[:1], args.scale)
        int8 = args.quant == "int8"
        decoder, how = fastest(
            adapters.model,
            adapters,
            int8=int8,
            huge_pages=args.huge_pages,
            bf16_activations=args.activations == "bf16",
        )
        engine = Engine(decoder, tokenizer, chunk=CHUNK)

        def template_of(paths: list):
            return recorded_template(args.template, tokenizer, *paths, args.model, tool_style=args.tool_style)

        def bos_of(paths: list):
            return leading_token(args.bos, tokenizer, *paths, args.model)

        used = list(args.adapter.values())[:1]
        template, bos = template_of(used), bos_of(used)
        conversation = Conversation(engine, sampling_of(args), template, args.system, bos)
        conversation.generator.manual_seed(args.seed)
        chat = Chat(conversation, adapters, template_of, args.max_tokens, args.seed, bos_of)
        if tools:
            conversation.use_tools(tools)
        if args.load_state:
            chat.load_from(args.load_state)
            if (args.template, args.tool_style) != ("auto", "auto"):
                conversation.template = chat.chosen = template
            if args.bos != "recorded":
                chat.bos_of = bos_of
                if bos != conversation.bos:
                    conversation.bos = bos
                    conversation.read_again()
        if not args.raw and (known := modes_note(args.model, conversation.template)):
            print(f"note: {known}; /mode chooses in a chat, with the sampling", file=sys.stderr)
        if args.raw:
            ids = with_leading(tokenizer.encode(args.prompt), bos)
            show(stream(engine, Request(ids, args.max_tokens, conversation.sampling, args.seed)))
        elif args.compare:
            print(chat.compared(args.prompt))
        elif args.prompt:
            opening = conversation.template.opening
            pieces = itertools.chain(
                [opening] if opening else [], conversation.answer(args.prompt, args.max_tokens)
            )
            show(piece.lstrip(" \n") if i == 0 else piece for i, piece in enumerate(pieces))
            note_calls(conversation.calls)
        else:
            print(
                f"{os.path.basename(args.model)}: {adapters.model.arch.describe()}; {how}. /help lists the"
                " commands, /exit ends the chat.",
                file=sys.stderr,
            )
            chat.converse()


if __name__ == "__main__":
    main()
