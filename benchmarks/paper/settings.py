"""An experiment's settings: a frozen dataclass whose fields are its flags, with the full run as defaults."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from typing import Any


def option(default: Any, help: str) -> Any:
    """Make a field that is a flag of its type; a tuple takes several values of the type of its first."""
    return dataclasses.field(default=default, metadata={"help": help})


def add_options(parser: argparse.ArgumentParser, full: Any, tiny: Any) -> None:
    """Add --tiny, and a flag for every field of two settings of one dataclass: the full run's and CI's."""
    parser.add_argument("--tiny", action="store_true", help="the few seconds that CI runs")
    for field in dataclasses.fields(full):
        default, small = (
            " ".join(map(str, v)) if isinstance(v, tuple) else v
            for v in (getattr(full, field.name), getattr(tiny, field.name))
        )
        several = isinstance(field.default, tuple)
        parser.add_argument(
            f"--{field.name}",
            type=type(field.default[0] if several else field.default),
            nargs="+" if several else None,
            default=argparse.SUPPRESS,
            help=f"{field.metadata['help']} (default {default}; tiny {small})",
        )


def chosen(args: argparse.Namespace, full: Any, tiny: Any) -> Any:
    """Return the settings that the flags ask for."""
    given = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(full)
        if hasattr(args, field.name)
    }
    return dataclasses.replace(
        tiny if args.tiny else full, **{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    )


def command(name: str, settings: Any, full: Any, tiny: Any) -> str:
    """Write the shortest command for these settings: --tiny and flags only where they differ from the full
    run.
    """
    start = tiny if settings == tiny else full
    words = ["python", "-m", "benchmarks.paper", name, *(["--tiny"] if start is tiny else [])]
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value != getattr(start, field.name):
            words += [f"--{field.name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)
