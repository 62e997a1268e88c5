"""Run the experiments of the MiSS paper (arXiv 2409.15371).

Each is one command that writes a table, a plot and its figures.

    python -m benchmarks.paper NAME [--tiny] [--out docs/results] [options of the experiment]

Without NAME the experiments are listed, each with the first line of its docstring. An experiment is a module
of this folder, NAME with underscores: FULL and TINY, two settings of one frozen dataclass (settings.py), and
run(settings) -> PaperResult (results.py). The last line is JSON.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys

from rwkv_miss.errors import Parser, one_line_errors

from ..common import environment
from . import results
from .settings import add_options, chosen, command

EXPERIMENTS = (
    "complexity",
    "no-free-lunch",
    "grad-norm",
    "loss-curves",
    "rank",
    "resources",
    "nlu",
    "forgetting",
)


def experiment(name: str):
    """Import the module of an experiment."""
    return importlib.import_module(f".{name.replace('-', '_')}", __package__)


def main(argv: list[str]) -> None:
    """Run the experiment that argv names, or list all. Raises UserError for a wrong option, before anything
    is measured.
    """
    parser = Parser(prog="python -m benchmarks.paper", description=__doc__.partition("\n\n")[0])
    names = parser.add_subparsers(dest="name", metavar="NAME")
    summaries = {
        name: " ".join(experiment(name).__doc__.partition("\n\n")[0].split()) for name in EXPERIMENTS
    }
    for name, summary in summaries.items():
        module = experiment(name)
        own = names.add_parser(name, help=summary, description=summary)
        own.add_argument(
            "--out",
            default="docs/results",
            help="folder for NAME.md, NAME.png and NAME.json (default %(default)s)",
        )
        add_options(own, module.FULL, module.TINY)
    args = parser.parse_args(argv)
    if args.name is None:
        print("\n".join(f"{name:<16}{summary}" for name, summary in summaries.items()))
        return
    module = experiment(args.name)
    settings = chosen(args, module.FULL, module.TINY)
    folder = results.check_folder(args.out)
    commit = environment()["commit"]  # read now, because the checkout may change during the run
    result = module.run(settings)
    shown = command(args.name, settings, module.FULL, module.TINY)
    short = results.write(result, args.name, folder, shown, dataclasses.asdict(settings), commit)
    for claim in result.claims:
        print(f"paper: {claim.paper}\n here: {claim.ours}")
    print(f"{folder / args.name}.md .png .json")
    print(json.dumps(short))


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
