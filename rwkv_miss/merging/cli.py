"""Commands about merged files: merge, unmerge, diff."""

from __future__ import annotations

import argparse
import json
import re
from typing import Any

import torch

from ..convert import Hints
from ..errors import Parser, printable
from ..methods.miss_variants import CHOICES
from .diff import diff_files
from .merge import DTYPE_NAMES, merge_file
from .rounding import TABLE_ROWS
from .unmerge import check_merge


def add_merge(commands: argparse._SubParsersAction) -> None:
    merge = commands.add_parser("merge", help="write base model + adapters, a .pth or a Hugging Face folder")
    # the second names of flags are those of RWKV-PEFT's merge scripts
    merge.add_argument("--base", "--base_model", required=True)
    add_adapters(merge, required=True)
    add_hints(merge)
    merge.add_argument(
        "--out",
        "--output",
        required=True,
        help="a .pth, or the folder to write if the base model is one",
    )
    merge.add_argument(
        "--dtype",
        default="base",
        choices=("base", "auto", *DTYPE_NAMES),
        help=(
            "base: every tensor keeps its dtype; auto: fp16 or fp32 for tensors that would lose over 5 %%"
            " of the update"
        ),
    )
    merge.add_argument(
        "--force",
        action="store_true",
        help="merge into another base model than the adapter's, or a second time",
    )
    add_output(merge)
    merge.set_defaults(run=run_merge)


def add_unmerge(commands: argparse._SubParsersAction) -> None:
    unmerge = commands.add_parser(
        "unmerge",
        help="check bit for bit that a file is the base model + adapters, so that the base model undoes the"
        " merge",
    )
    unmerge.add_argument("merged")
    unmerge.add_argument("--base", "--base_model", required=True)
    add_adapters(unmerge, default="what the merged file records, else 1 each")
    add_hints(unmerge)
    add_output(unmerge)
    unmerge.set_defaults(run=run_unmerge)


def add_diff(commands: argparse._SubParsersAction) -> None:
    diff = commands.add_parser("diff", help="write the MiSS adapter that brings A nearest to B")
    diff.add_argument("a", metavar="A", help="the checkpoint that becomes the base model")
    diff.add_argument("b", metavar="B", help="a checkpoint that was trained from A")
    diff.add_argument("--rank", type=int, required=True)
    diff.add_argument("--out", "--output", required=True)
    diff.add_argument(
        "--targets",
        help="names of linears, separated by commas, such as key,att.value; default: all of the paper's",
    )
    diff.add_argument(
        "--layout", default="stride", choices=CHOICES["layout"], help="layout of the shards, as in training"
    )
    diff.add_argument(
        "--whole", action="store_true", help="also store other tensors that differ, as they are in B"
    )
    add_output(diff)
    diff.set_defaults(run=run_diff)


def add_adapters(parser: Parser, required: bool = False, default: str = "1 each") -> None:
    """Add --adapter, which may be repeated, and --weights."""
    parser.add_argument(
        "--adapter",
        "--lora_checkpoint",
        "--peft_checkpoint",
        required=required,
        action="append",
        default=None if required else [],
        help="an adapter of this base model; give the flag again to merge several",
    )
    parser.add_argument(
        "--weights",
        type=weights,
        help=f"factors of the adapters, in their order, such as 0.7,-0.3; default: {default}",
    )
    # without this pattern argparse takes -0.5,1 for a flag
    parser._negative_number_matcher = re.compile(r"-[\d.][\d.,eE+-]*$")


def add_hints(parser: Parser) -> None:
    """Add the flags for facts that another project's adapter does not state; hints() reads them."""
    parser.add_argument(
        "--origin",
        default="",
        help="the project that wrote the adapter, if its shapes could be two projects'",
    )
    parser.add_argument(
        "--alpha", "--lora_alpha", type=float, help="LoRA's alpha, if the adapter's file does not hold it"
    )
    parser.add_argument(
        "--profile",
        default="",
        help="RWKV-LM-RLHF's layer profile (.csv), if the alphas of LoRA differ by layer",
    )
    parser.add_argument(
        "--init",
        "--lora_init",
        default="",
        help="file with PiSSA's factors at the start, if they have a file of their own",
    )


def add_output(parser: Parser) -> None:
    parser.add_argument(
        "--layers", action="store_true", help=f"show all layers in the table, not only the {TABLE_ROWS} worst"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, for machines")


def weights(text: str) -> list[float]:
    """Read "0.7,-0.3" as [0.7, -0.3]."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected numbers with commas between them, such as 0.7,-0.3"
        ) from None


def hints(args: argparse.Namespace) -> Hints:
    """Return the command line's hints about adapters of other projects."""
    return Hints(args.origin, args.alpha, args.init, profile=args.profile)


def show(report: Any, args: argparse.Namespace) -> None:
    """Print a command's report, for people or for machines."""
    if args.json:
        print(json.dumps(report.to_dict()))
    else:
        for line in report.lines(None if args.layers else TABLE_ROWS):
            print(printable(line))


def run_merge(args: argparse.Namespace) -> None:
    # one core writes a tensor while the others compute the next one
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    show(
        merge_file(
            args.base, args.adapter, args.out, args.dtype, args.force, args.weights, hints(args), shown=True
        ),
        args,
    )


def run_unmerge(args: argparse.Namespace) -> None:
    check = check_merge(args.base, args.merged, args.adapter, args.weights, hints(args))
    show(check, args)
    if not check.ok:
        raise SystemExit(1)


def run_diff(args: argparse.Namespace) -> None:
    targets = args.targets.split(",") if args.targets else None
    show(diff_files(args.a, args.b, args.out, args.rank, targets, args.layout, args.whole), args)
