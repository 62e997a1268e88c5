"""Flags that a chat and a server have in common, and their consequences."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from typing import Any

from rwkv_miss.errors import UserError
from rwkv_miss.files.hub import local_path

from ..common.device import PRECISIONS
from ..config.validate import check_bos
from ..data.bos import HELP as BOS_HELP
from ..data.bos import bos_ids
from ..data.chat_template import Template
from ..data.templates import add_template_flags, recorded_template
from ..data.tokenizer import Tokenizer
from .adapters import Adapters
from .load import load_with
from .sampling import Sampling

NO_ADAPTER = "none"  # value of /adapter for the base alone


def add_files(add: Callable, required: bool = True) -> None:
    """Add the flags for the model, which may be `required`, and its adapters."""
    add(
        "--model",
        required=required,
        help="base model or merged .pth, or hf://OWNER/NAME[/FILE][@REVISION], or a Hugging Face folder",
    )
    add(
        "--adapter",
        action="append",
        default=[],
        metavar="[NAME=]FILE",
        help="an adapter .pth that was trained on this base model, or its name on the hub as for --model."
        " Its name is the file's, unless NAME is given. Give the flag again for more adapters: a chat"
        " begins with the first one, and a server's requests choose",
    )
    add(
        "--scale",
        type=float,
        default=1.0,
        help="factor of the adapter's change; 1: as it was trained",
    )


def add_text(add: Callable) -> None:
    """Add the flags that lead from a prompt to tokens."""
    add(
        "--tokenizer",
        default="auto",
        help="auto (as recorded in the file, else world), world, bytes, utf16, or a tokenizer file",
    )
    add(
        "--eod",
        default="",
        help="text of the end-of-document token, for a tokenizer file that does not name it",
    )
    add_template_flags(add)
    add("--bos", default="recorded", help=BOS_HELP)
    add("--system", default="", help="text of a System: turn before the chat")


def add_sampling(add: Callable, max_tokens: int = 512, recommended: bool = False) -> None:
    """Add the flags for how an answer's tokens are drawn, and how many.

    `recommended`: a flag that is not given is None, and the program uses the template's recommendation.
    """
    add(
        "--max_tokens",
        type=int,
        default=max_tokens,
        help="the longest answer, in tokens; default %(default)s",
    )
    helps = {
        "temperature": "how freely tokens are drawn; 0: always the likeliest one",
        "top_p": "draw among the likeliest tokens whose probabilities add up to this; 1: among all",
        "top_k": "draw among this many of the likeliest tokens; 0: among all",
        "presence_penalty": "lowers the logit of a token that is in the answer already",
        "frequency_penalty": "lowers a token's logit once for each time that it is in the answer",
    }
    default_text = "as recommended for the template" if recommended else "%(default)s"
    for name, text in helps.items():
        default = getattr(Sampling, name)
        add(
            f"--{name}",
            type=type(default),
            default=None if recommended else default,
            help=f"{text}; default {default_text}",
        )
    seed, default_text = (None, "a new one for every request") if recommended else (0, "%(default)s")
    add("--seed", type=int, default=seed, help=f"seed of the random numbers; default {default_text}")


def add_device(add: Callable) -> None:
    """Add the flags for the device and the number formats."""
    add("--accelerator", default="auto", choices=("auto", "cpu", "gpu"))
    add(
        "--precision",
        default="auto",
        choices=("auto", *PRECISIONS),
        help="dtype of the weights. auto: bf16 on a GPU that has it; on a CPU bf16 if the file has it, but"
        " fp32 with --wkv torch or reference. A CPU computes answers in fp32, from bf16 weights too. It"
        " reads prompts in bf16, if it has instructions for that: faster, with logits about 1e-3 off;"
        " fp32 avoids that. An --adapter is always computed in fp32",
    )
    add(
        "--quant",
        default="none",
        choices=("none", "int8"),
        help="int8: answer from weights of one byte, on a CPU. Prompts are read with the weights of"
        " --precision. The bytes are made at the start; train.py's --quant makes other ones",
    )
    add(
        "--huge_pages",
        default="auto",
        choices=("auto", "yes", "no"),
        help="answer from a copy of the weights in memory pages of 2 MB, on a CPU under Linux: up to 1.6"
        " times as fast. The copy takes memory in addition to the weights, if these are mapped from the file."
        " auto: copy at most a third of the free memory",
    )
    add(
        "--activations",
        default="exact",
        choices=("exact", "bf16"),
        help="bf16: round the activations before products with bf16 weights, on a CPU with avx512_bf16."
        " This was measured to cost a divergence of 5e-6 nats; default %(default)s",
    )
    add("--wkv", default="auto", help="WKV kernel: auto, cuda, cuda-exact, cpu, torch or reference")


def named(given: list[str]) -> dict[str, str]:
    """Return name -> file. A FILE without NAME= is called by its file's name without suffix."""
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


def check_shared(args: argparse.Namespace) -> None:
    """Raise UserError for values of these flags that make no sense, apart from the sampling."""
    if args.max_tokens < 1:
        raise UserError(f"--max_tokens {args.max_tokens}: expected 1 or more")
    check_bos(args.bos)
    if not math.isfinite(args.scale):
        raise UserError(f"--scale {args.scale}: expected a finite number")
    if args.seed is not None and not -(2**63) <= args.seed < 2**63:
        raise UserError(f"--seed {args.seed}: expected a number from -2^63 to below 2^63")


def load_named(args: argparse.Namespace) -> tuple[Adapters, Tokenizer]:
    """Load what the flags name, as load_with() does. --model and --adapter name local files afterwards."""
    args.model = local_path(args.model)
    args.adapter = {name: local_path(path) for name, path in args.adapter.items()}
    return load_with(
        args.model, args.adapter, args.tokenizer, args.eod, args.accelerator, args.precision, args.wkv
    )


def decoder_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of decoders.fastest() by the flags of add_device()."""
    return {
        "int8": args.quant == "int8",
        "huge_pages": args.huge_pages,
        "bf16_activations": args.activations == "bf16",
    }


class PromptSettings:
    """Settings of prompts: the flags of add_text(), else the records of the adapters' files and the model's.

    The template is that of the first file with a record. The BOS is the first file's, none without a record.
    """

    def __init__(self, args: argparse.Namespace, tokenizer: Tokenizer):
        self.args, self.tokenizer = args, tokenizer

    def template(self, paths: list[str]) -> Template:
        args = self.args
        return recorded_template(
            args.template, self.tokenizer, *paths, args.model, tool_style=args.tool_style
        )

    def bos(self, paths: list[str]) -> tuple[int, ...]:
        """Return the ids that every text begins with."""
        return bos_ids(self.args.bos, self.tokenizer, *paths, self.args.model)
