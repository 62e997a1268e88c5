"""The command line: rwkv-miss merge | convert | extract-base | inspect, also as python -m rwkv_miss."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
from typing import Any

from .adapter_file import ADAPTER_FORMAT
from .convert import FORMATS, NO_HINTS, Hints, Source, convert, format_of, open_source
from .convert.peft_names import LAYOUTS
from .errors import Parser, UserError, one_line_errors, printable
from .extract import ExtractBase
from .files.checkpoint import RUN_FORMAT, Arch, run_output
from .files.hf_folder import MODEL_TYPE, is_folder, read_config, read_folder
from .files.hub import with_local_files
from .files.identity import Identity
from .files.provenance import KEY
from .files.safetensors_io import is_safetensors
from .files.wrapped import is_model
from .flags import add_flags, flag, flags_of, options, options_of
from .merging.cli import Diff, Merge, Unmerge
from .merging.members import merged_adapters
from .version import version_line

KINDS = {ADAPTER_FORMAT: "adapter", RUN_FORMAT: "checkpoint of a run"}
SAFETENSORS_MODEL = "model in safetensors"
EMPTY = (None, "", [], {})


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe a file in plain values: a base, a merged file, an adapter or a checkpoint of a run.

    An adapter may be another project's.
    """
    source = open_source(path)
    tensors, metadata = source.tensors, source.config
    written_as = metadata.get("format", "checkpoint")
    if (read_as := format_of(source)) not in (None, "native") and written_as != ADAPTER_FORMAT:
        written_as, metadata = ADAPTER_FORMAT, foreign(source, read_as)
    elif is_folder(path):
        written_as = f"Hugging Face folder, {folder_form(path)}"
    elif not os.path.isdir(path) and is_safetensors(path):
        # in the header of a safetensors file "format" names the framework that wrote it, "pt"
        written_as = SAFETENSORS_MODEL
    dtypes = collections.Counter(str(t.dtype).removeprefix("torch.") for t in tensors.values())
    other = is_folder(path) and not is_model(tensors)
    arch = None if written_as in KINDS or other else Arch.detect(tensors)
    # src/training/training_state.py names what the optimizer keeps NAME:exp_avg and so on
    trained = [t for name, t in tensors.items() if ":" not in name] if written_as == RUN_FORMAT else None
    files = [os.path.join(path, name) for name in os.listdir(path)] if os.path.isdir(path) else [path]
    return {
        "file": os.fspath(path),
        "kind": KINDS.get(written_as, written_as),
        "trained": trained and {"tensors": len(trained), "parameters": sum(t.numel() for t in trained)},
        "output": run_output(path, metadata) if trained else None,
        "bytes": sum(map(os.path.getsize, files)),
        "tensors": len(tensors),
        "parameters": sum(t.numel() for t in tensors.values()),
        "dtypes": dict(dtypes),
        "arch": arch.to_dict() if arch else None,
        "description": arch.describe() if arch else None,
        "fingerprint": Identity(path, tensors).fingerprint,
        "metadata": metadata or None,
    }


def folder_form(path: str | os.PathLike[str]) -> str:
    """Describe a model's folder: its layout if it is an RWKV, else the configuration's `model_type`."""
    config = read_config(os.fspath(path))
    if config.get("model_type") == MODEL_TYPE:
        return f"layout {read_folder(path).layout}"
    return f"{printable(str(config.get('model_type')))[:60]}"


def foreign(source: Source, read_as: str) -> dict[str, Any]:
    """Describe another project's adapter: its metadata here, or the hint that its reader still needs."""
    try:
        adapter = FORMATS[read_as].read(source, NO_HINTS)
    except UserError as error:
        return {"format": read_as, "open": str(error)}
    return {**adapter.metadata, "format": read_as}


def show(facts: dict[str, Any]) -> None:
    """Print the facts for people."""
    print(f"{facts['file']}: {facts['kind']}, {facts['bytes']:,} bytes")
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in facts["dtypes"].items())
    print(f"  tensors      {facts['tensors']}, {facts['parameters']:,} parameters, {dtypes}")
    if facts["trained"]:
        trained = facts["trained"]
        print(
            f"  trained      {trained['tensors']}, {trained['parameters']:,} parameters; the others are the"
            " optimizer's"
        )
        print(f"  purpose      --resume auto goes on from it; for merge and chat there is {facts['output']}")
    if facts["description"]:
        print(f"  model        {facts['description']}")
    print(f"  fingerprint  {facts['fingerprint']}")
    for name, value in (facts["metadata"] or {}).items():
        if name == "linears" and value:
            value = f"{len(value)}, {value[0]} to {value[-1]}"
        if name == "views" and isinstance(value, dict) and value:
            value = f"{len(value)} of the linears are other matrices, such as {next(iter(value))}"
        if name == "adapters" and isinstance(value, list):
            value = ", ".join(
                f"{entry.get('adapter')} times {entry.get('weight', 1)}"
                for entry in merged_adapters(facts["metadata"])
            )
        if name == "recent_losses" and value:
            value = f"{len(value)}, the last is {value[-1]:.4f}"
        if name == KEY:
            value = "python -m scripts.export --to pth gives the .pth back, with its metadata"
        if value not in EMPTY:
            print(f"  {printable(str(name)):<12} {printable(str(value))}")


class Version(argparse.Action):
    """Flag that prints the version. argparse's own action would ask git in every command."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"rwkv-miss {version_line()}")
        parser.exit()


@options
class Convert:
    """rwkv-miss convert."""

    input: str = flag(help="file or folder", positional=True, metavar="IN", file=True)
    out: str = flag(positional=True, metavar="OUT")
    to: str = flag(choices=[name for name, form in FORMATS.items() if form.writes])
    hints: Hints = flags_of(Hints)
    base: str = flag(
        "",
        "the base model, a file or a folder: for --to rwkv-lightning, for --to lora if the adapter does"
        " not record its model's widths, and for what peft's folders leave to the base",
        file=True,
    )
    layout: str = flag(
        "",
        "for --to peft and lora: the names of the tensors. official: Hugging Face's Rwkv7ForCausalLM."
        " fla: flash-linear-attention. pth: the .pth's. Default: the adapter's own, else official for"
        " RWKV-7",
        choices=LAYOUTS,
    )

    def run(self) -> None:
        with_base = dataclasses.replace(self.hints, base=self.base)
        for line in convert(self.input, self.out, self.to, with_base, self.layout).lines():
            print(line)


@options
class Inspect:
    """rwkv-miss inspect."""

    file: str = flag(positional=True, file=True)
    json: bool = flag(False, "print one JSON object, for machines")

    def run(self) -> None:
        if self.json:
            print(json.dumps(describe(self.file)))
        else:
            show(describe(self.file))


# name -> (flags, help)
COMMANDS = {
    "merge": (Merge, "write base model + adapters, a .pth or a Hugging Face folder"),
    "unmerge": (
        Unmerge,
        "check bit for bit that a file is the base model + adapters, so that the base model undoes the merge",
    ),
    "diff": (Diff, "write the MiSS adapter that brings A nearest to B"),
    "extract-base": (
        ExtractBase,
        "write the RWKV inside a larger checkpoint as a .pth that can be a base model",
    ),
    "convert": (Convert, "turn an adapter of any project into another project's file or folder"),
    "inspect": (Inspect, "say what a file is"),
}


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        parser = Parser("rwkv-miss", description="Merge, convert and inspect RWKV checkpoints and adapters.")
        parser.add_argument("--version", action=Version, nargs=0, help="the project's version and commit")
        commands = parser.add_subparsers(dest="command", required=True)
        for name, (kind, about) in COMMANDS.items():
            add_flags(commands.add_parser(name, help=about), kind)
        given = vars(parser.parse_args(argv))
        with_local_files(options_of(COMMANDS[given.pop("command")][0], given)).run()


if __name__ == "__main__":
    main()
