"""The command line: rwkv-miss merge | convert | extract-base | inspect, also as python -m rwkv_miss."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
from typing import Any

from . import extract
from .adapter_file import ADAPTER_FORMAT
from .convert import FORMATS, NO_HINTS, Source, convert, format_of, open_source
from .convert.peft_names import LAYOUTS
from .errors import Parser, UserError, one_line_errors, printable
from .files.checkpoint import RUN_FORMAT, Arch, run_output
from .files.hf_folder import MODEL_TYPE, is_folder, read_config, read_folder
from .files.hub import local_path
from .files.identity import Identity
from .files.provenance import KEY
from .files.safetensors_io import is_safetensors
from .files.wrapped import is_model
from .merging.cli import add_diff, add_hints, add_merge, add_unmerge, hints
from .merging.members import merged_adapters
from .version import version_line

KINDS = {ADAPTER_FORMAT: "adapter", RUN_FORMAT: "checkpoint of a run"}
SAFETENSORS_MODEL = "model in safetensors"
EMPTY = (None, "", [], {})
FILES = ("file", "input", "base", "adapter", "merged", "a", "b")  # arguments that may name a file of the hub


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


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("rwkv-miss", description="Merge, convert and inspect RWKV checkpoints and adapters.")
    parser.add_argument("--version", action=Version, nargs=0, help="the project's version and commit")
    commands = parser.add_subparsers(dest="command", required=True)
    add_merge(commands)
    add_unmerge(commands)
    add_diff(commands)
    extract.add_command(commands)
    converting = commands.add_parser(
        "convert", help="turn an adapter of any project into another project's file or folder"
    )
    converting.add_argument("input", metavar="IN", help="file or folder")
    converting.add_argument("out", metavar="OUT")
    converting.add_argument(
        "--to", required=True, choices=[name for name, form in FORMATS.items() if form.writes]
    )
    add_hints(converting)
    converting.add_argument(
        "--base",
        default="",
        help=(
            "the base model, a file or a folder: for --to rwkv-lightning, for --to lora if the adapter does"
            " not record its model's widths, and for what peft's folders leave to the base"
        ),
    )
    converting.add_argument(
        "--layout",
        default="",
        choices=LAYOUTS,
        help=(
            "for --to peft and lora: the names of the tensors. official: Hugging Face's Rwkv7ForCausalLM."
            " fla: flash-linear-attention. pth: the .pth's. Default: the adapter's own, else official for"
            " RWKV-7"
        ),
    )
    inspect = commands.add_parser("inspect", help="say what a file is")
    inspect.add_argument("file")
    inspect.add_argument("--json", action="store_true", help="print one JSON object, for machines")
    return parser.parse_args(argv)


def name_local_files(args: argparse.Namespace) -> None:
    """Replace names of files on the Hugging Face hub in the arguments by local paths."""
    for name in FILES:
        given = getattr(args, name, None)
        if isinstance(given, list):
            setattr(args, name, [local_path(path) for path in given])
        elif given:
            setattr(args, name, local_path(given))


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        args = arguments(argv)
        name_local_files(args)
        if hasattr(args, "run"):
            args.run(args)
        elif args.command == "convert":
            with_base = dataclasses.replace(hints(args), base=args.base)
            for line in convert(args.input, args.out, args.to, with_base, args.layout).lines():
                print(line)
        elif args.json:
            print(json.dumps(describe(args.file)))
        else:
            show(describe(args.file))


if __name__ == "__main__":
    main()
