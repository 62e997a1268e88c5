"""Commands about merged files: merge, unmerge, diff."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from ..convert import Hints
from ..errors import printable
from ..flags import flag, flags_of, options
from ..methods.miss_variants import CHOICES
from .diff import diff_files
from .merge import DTYPE_NAMES, merge_file
from .rounding import TABLE_ROWS
from .unmerge import check_merge

RECORDED = "what the merged file records, else 1 each"
# the other names are those of RWKV-PEFT's merge scripts
ADAPTER = {
    "help": "an adapter of this base model; give the flag again to merge several",
    "alias": ("lora_checkpoint", "peft_checkpoint"),
    "file": True,
}


def read_weights(text: str) -> list[float]:
    """Read "0.7,-0.3" as [0.7, -0.3]."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected numbers with commas between them, such as 0.7,-0.3"
        ) from None


def weights_flag(default: str = "1 each") -> Any:
    """Declare --weights; `default` says what holds without it."""
    text = f"factors of the adapters, in their order, such as 0.7,-0.3; default: {default}"
    return flag(None, text, type=read_weights)


@options
class Parts:
    """The files of a merge: a base model and its adapters."""

    base: str = flag(alias=("base_model",), file=True)
    adapter: list[str] = flag(**ADAPTER)
    weights: list[float] | None = weights_flag()
    hints: Hints = flags_of(Hints)


@options
class Output:
    """The form of a command's report."""

    layers: bool = flag(False, f"show all layers in the table, not only the {TABLE_ROWS} worst")
    json: bool = flag(False, "print one JSON object, for machines")

    def show(self, report: Any) -> None:
        """Print a report, for people or for machines."""
        if self.json:
            print(json.dumps(report.to_dict()))
        else:
            for line in report.lines(None if self.layers else TABLE_ROWS):
                print(printable(line))


@options
class Merge(Parts):
    """rwkv-miss merge."""

    out: str = flag(help="a .pth, or the folder to write if the base model is one", alias=("output",))
    dtype: str = flag(
        "base",
        "base: every tensor keeps its dtype; auto: fp16 or fp32 for tensors that would lose over 5 %%"
        " of the update",
        choices=("base", "auto", *DTYPE_NAMES),
    )
    force: bool = flag(False, "merge into another base model than the adapter's, or a second time")
    output: Output = flags_of(Output)

    def run(self) -> None:
        # one core writes while the others make the next tensor
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))
        report = merge_file(
            self.base, self.adapter, self.out, self.dtype, self.force, self.weights, self.hints, shown=True
        )
        self.output.show(report)


@options
class Unmerge(Parts):
    """rwkv-miss unmerge."""

    merged: str = flag(positional=True, file=True)
    adapter: list[str] = flag([], **ADAPTER)
    weights: list[float] | None = weights_flag(RECORDED)
    output: Output = flags_of(Output)

    def run(self) -> None:
        check = check_merge(self.base, self.merged, self.adapter, self.weights, self.hints)
        self.output.show(check)
        if not check.ok:
            raise SystemExit(1)


@options
class Diff:
    """rwkv-miss diff."""

    a: str = flag(help="the checkpoint that becomes the base model", positional=True, metavar="A", file=True)
    b: str = flag(help="a checkpoint that was trained from A", positional=True, metavar="B", file=True)
    rank: int = flag()
    out: str = flag(alias=("output",))
    targets: str | None = flag(
        None,
        "names of linears, separated by commas, such as key,att.value; default: all of the paper's",
    )
    layout: str = flag("stride", "layout of the shards, as in training", choices=CHOICES["layout"])
    whole: bool = flag(False, "also store other tensors that differ, as they are in B")
    output: Output = flags_of(Output)

    def run(self) -> None:
        targets = self.targets.split(",") if self.targets else None
        self.output.show(diff_files(self.a, self.b, self.out, self.rank, targets, self.layout, self.whole))
