"""Chat with a model file, or with a base and an unmerged adapter: python -m demo.chat --model merged.pth"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys

from src.doorway import importing, naming_missing_packages

with importing():
    from rwkv_miss.errors import Parser, UserError, one_line_errors
    from src.decode import fastest
    from src.device import DTYPES
    from src.generate import Conversation, Sampling, stream
    from src.load import load
    from src.template import MODES, recorded_template


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m demo.chat", description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="base or merged .pth")
    add("--adapter", help="adapter .pth trained on that base")
    add("--tokenizer", default="auto", help="auto (as recorded in the file, else world), world, bytes, utf16, or a tokenizer file")
    add("--eod", default="", help="text of the end-of-document token, where a tokenizer file does not tell")
    add("--template", default="auto", help=f"auto (as recorded in the file, else rwkv), {', '.join(MODES)}, or a Jinja file")
    add("--prompt", help="answer this one prompt on stdout and exit; without it: a chat")
    add("--raw", action="store_true", help="take the prompt as it is, without the chat template")
    add("--system", default="", help="text of a System: turn before the chat")
    add("--max_tokens", type=int, default=512)
    add("--temperature", type=float, default=Sampling.temperature, help="0: greedy")
    add("--top_p", type=float, default=Sampling.top_p)
    add("--top_k", type=int, default=Sampling.top_k, help="0: off")
    add("--presence_penalty", type=float, default=Sampling.presence_penalty)
    add("--frequency_penalty", type=float, default=Sampling.frequency_penalty)
    add("--seed", type=int, default=0)
    add("--accelerator", default="auto", choices=("auto", "cpu", "gpu"))
    add("--precision", default="auto", choices=("auto", *DTYPES),
        help="of the weights. auto: bf16 on a GPU that has it; on a CPU bf16 if the file has it, but fp32 with --wkv torch or reference. On a CPU "
             "answers are computed in fp32 from bf16 weights, too, but their prompts are read in bf16 where the CPU has instructions for it: faster, "
             "with logits about 1e-3 off; fp32 avoids that. auto merges an --adapter in fp32")
    add("--quant", default="none", choices=("none", "int8"),
        help="int8: answer from weights of one byte with a scale for each row, on a CPU; prompts are read with those of --precision. It is not the "
             "int8 of train.py's --quant, which has a scale for each 64 weights")
    add("--wkv", default="auto", help="WKV kernel: auto, cuda, cuda-exact, cpu, torch or reference")
    args = parser.parse_args(argv)
    if args.max_tokens < 1 or args.top_k < 0 or not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1:
        raise UserError("expected --max_tokens >= 1, --top_k >= 0, --temperature >= 0 and 0 < --top_p <= 1")
    if not math.isfinite(args.presence_penalty) or not math.isfinite(args.frequency_penalty):
        raise UserError("expected finite numbers for --presence_penalty and --frequency_penalty")
    if not -(2**63) <= args.seed < 2**63:
        raise UserError(f"--seed {args.seed}: expected a number from -2^63 to below 2^63")
    if args.prompt == "":
        raise UserError("--prompt is empty")
    if args.raw and not args.prompt:
        raise UserError("--raw needs --prompt")
    for text in (args.prompt, args.system):
        check_typed(text or "")
    return args


def check_typed(text: str) -> None:
    """UserError for what a shell or a terminal gave in another encoding than Python expects."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"what was typed is no {sys.stdin.encoding} text; if it is UTF-8, set PYTHONUTF8=1") from None


def show(pieces) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def main(argv: list[str] | None = None) -> None:
    with one_line_errors(), naming_missing_packages():
        args = parse(argv)
        model, tokenizer = load(args.model, args.adapter, args.tokenizer, args.eod, args.accelerator, args.precision, args.wkv)
        model, how = fastest(model, args.quant == "int8")
        sampling = Sampling(args.temperature, args.top_p, args.top_k, args.presence_penalty, args.frequency_penalty)
        template = recorded_template(args.template, tokenizer, args.adapter, args.model)
        chat = Conversation(model, tokenizer, sampling, args.seed, args.system, template)
        if args.raw:
            show(stream(model, tokenizer, tokenizer.encode(args.prompt), None, sampling, args.max_tokens, "", chat.generator))
        elif args.prompt:
            pieces = itertools.chain([template.opening] if template.opening else [], chat.answer(args.prompt, args.max_tokens))
            show(piece.lstrip(" ") if i == 0 else piece for i, piece in enumerate(pieces))
        else:
            print(f"{os.path.basename(args.model)}: {model.arch.describe()}; {how}. An empty line or Ctrl-D ends the chat.", file=sys.stderr)
            converse(chat, args.max_tokens)


def converse(chat: Conversation, max_tokens: int) -> None:
    """Turns from stdin until an empty line, end of input, or Ctrl-C."""
    while True:
        try:
            text = input("User: " if sys.stdin.isatty() else "").strip()
            if not text:
                return
            check_typed(text)
            print(f"Assistant:{chat.template.opening}", end="")
            show(chat.answer(text, max_tokens))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        except (EOFError, KeyboardInterrupt):
            print()
            return


if __name__ == "__main__":
    main()
