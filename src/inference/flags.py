"""Flags that a chat and a server have in common, and their consequences."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from rwkv_miss.errors import UserError
from rwkv_miss.files.hub import local_path
from rwkv_miss.flags import Options, flag, options

from ..common.device import PRECISIONS
from ..config.validate import check_bos
from ..data.bos import HELP as BOS_HELP
from ..data.bos import bos_ids
from ..data.chat_template import Template
from ..data.templates import TEMPLATE_FLAG, TOOL_STYLE_FLAG, recorded_template
from ..data.tokenizer import Tokenizer
from .adapters import Adapters
from .load import load_with

MODEL_HELP = "base model or merged .pth, or hf://OWNER/NAME[/FILE][@REVISION], or a Hugging Face folder"
MAX_TOKENS_HELP = "the longest answer, in tokens; default %(default)s"
SEEDS = {"low": -(2**63), "below": 2**63}
NO_ADAPTER = "none"  # value of /adapter for the base alone


@options
class FileFlags:
    """Model and its adapters. check() reads the names of the adapters."""

    model: str | None = flag(help=MODEL_HELP)
    adapter: list[str] = flag(
        [],
        "an adapter .pth that was trained on this base model, or its name on the hub as for --model."
        " Its name is the file's, unless NAME is given. Give the flag again for more adapters: a chat"
        " begins with the first one, and a server's requests choose",
        metavar="[NAME=]FILE",
    )
    scale: float = flag(1.0, "factor of the adapter's change; 1: as it was trained")
    adapters: Mapping[str, str] = dataclasses.field(default_factory=dict)


@options
class TextFlags(FileFlags):
    """The way from a prompt to tokens."""

    tokenizer: str = flag(
        "auto", "auto (as recorded in the file, else world), world, bytes, utf16, or a tokenizer file"
    )
    eod: str = flag("", "text of the end-of-document token, for a tokenizer file that does not name it")
    template: str = flag(**TEMPLATE_FLAG)
    tool_style: str = flag(**TOOL_STYLE_FLAG)
    bos: str = flag("recorded", BOS_HELP)
    system: str = flag("", "text of a System: turn before the chat")


@options
class DeviceFlags(TextFlags):
    """Device and number formats."""

    accelerator: str = flag("auto", choices=("auto", "cpu", "gpu"))
    precision: str = flag(
        "auto",
        "dtype of the weights. auto: bf16 on a GPU that has it; on a CPU bf16 if the file has it, but"
        " fp32 with --wkv torch or reference. A CPU computes answers in fp32, from bf16 weights too. It"
        " reads prompts in bf16, if it has instructions for that: faster, with logits about 1e-3 off;"
        " fp32 avoids that. An --adapter is always computed in fp32",
        choices=("auto", *PRECISIONS),
    )
    quant: str = flag(
        "none",
        "int8: answer from weights of one byte, on a CPU. Prompts are read with the weights of"
        " --precision. The bytes are made at the start; train.py's --quant makes other ones",
        choices=("none", "int8"),
    )
    huge_pages: str = flag(
        "auto",
        "answer from a copy of the weights in memory pages of 2 MB, on a CPU under Linux: up to 1.6"
        " times as fast. The copy takes memory in addition to the weights, if these are mapped from the file."
        " auto: copy at most a third of the free memory",
        choices=("auto", "yes", "no"),
    )
    activations: str = flag(
        "exact",
        "bf16: round the activations before products with bf16 weights, on a CPU with avx512_bf16."
        " This was measured to cost a divergence of 5e-6 nats; default %(default)s",
        choices=("exact", "bf16"),
    )
    wkv: str = flag("auto", "WKV kernel: auto, cuda, cuda-exact, cpu, torch or reference")

    @property
    def decoder(self) -> dict[str, Any]:
        """Options of decoders.fastest()."""
        return {
            "int8": self.quant == "int8",
            "huge_pages": self.huge_pages,
            "bf16_activations": self.activations == "bf16",
        }


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


def with_names(args: Options) -> Options:
    """Read the names of the adapters. Raises UserError for them and for a BOS that is none."""
    check_bos(args.bos)
    return dataclasses.replace(args, adapters=named(args.adapter))


def load_named(args: DeviceFlags) -> tuple[Adapters, Tokenizer]:
    """Load what the flags name, as load_with() does. The names are of local files."""
    return load_with(
        args.model, args.adapters, args.tokenizer, args.eod, args.accelerator, args.precision, args.wkv
    )


def localised(args: Options) -> Options:
    """Copy the flags: --model and --adapter name local files."""
    adapters = {name: local_path(path) for name, path in args.adapters.items()}
    return dataclasses.replace(args, model=local_path(args.model), adapters=adapters)


class PromptSettings:
    """Settings of prompts: the flags of add_text(), else the records of the adapters' files and the model's.

    The template is that of the first file with a record. The BOS is the first file's, none without a record.
    """

    def __init__(self, args: TextFlags, tokenizer: Tokenizer):
        self.args, self.tokenizer = args, tokenizer

    def template(self, paths: list[str]) -> Template:
        args = self.args
        return recorded_template(
            args.template, self.tokenizer, *paths, args.model, tool_style=args.tool_style
        )

    def bos(self, paths: list[str]) -> tuple[int, ...]:
        """Return the ids that every text begins with."""
        return bos_ids(self.args.bos, self.tokenizer, *paths, self.args.model)
