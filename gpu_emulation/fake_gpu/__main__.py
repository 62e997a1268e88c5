"""python -m gpu_emulation.fake_gpu: run all cases and compare them with table.json, or write it anew."""

import argparse
import pathlib
import sys

from . import stub
from .cases import ALL, matching
from .table import TABLE, differences, launches, read, write

UNAVAILABLE = 77


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gpu_emulation.fake_gpu",
        description="Run the GPU's paths on a device that computes nothing.",
    )
    parser.add_argument(
        "--cases",
        action="append",
        metavar="PATTERN",
        help='only the cases with this in their name, or that it fits, such as "step miss v?" (repeatable)',
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--write", action="store_true", help="write table.json anew")
    output.add_argument("--launches", action="store_true", help="print docs/gpu.md's table of table.json")
    output.add_argument(
        "--json",
        type=pathlib.Path,
        help="write the records to this file, with the reason where there can be none",
    )
    arguments = parser.parse_args()
    if arguments.launches:
        print(launches(read(TABLE)["cases"]))
        return
    names = matching(arguments.cases) if arguments.cases else ALL
    if not names:
        parser.error(f"--cases {' '.join(arguments.cases)}: fits none of {', '.join(ALL)}")
    if arguments.write and names != ALL:
        parser.error("--write writes all cases; leave out --cases")
    try:
        stub.load()
    except stub.Unavailable as reason:
        print(f"no fake GPU: {reason}")
        sys.exit(UNAVAILABLE)
    import torch

    from .runner import records  # imports torch, which has to come after the stub

    found = {"torch": torch.__version__.split("+")[0], "cases": records(names)}
    if arguments.json:
        write(found, arguments.json)
        return
    failed = {name: record["error"] for name, record in found["cases"].items() if "error" in record}
    for name, error in failed.items():
        print(f"{name}\n{error}")
    if arguments.write and not failed:
        write(found, TABLE)
    changes = []
    for name, record in found["cases"].items():
        if name not in failed:
            changes += differences(name, record, read(TABLE))
    good = len(found["cases"]) - len(failed)
    print("\n".join(changes) or f"{good} cases are as {TABLE.name} has them, {len(failed)} failed")
    sys.exit(bool(failed or changes))


if __name__ == "__main__":
    main()
