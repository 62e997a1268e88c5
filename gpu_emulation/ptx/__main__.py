"""python -m gpu_emulation.ptx: run rows of cases.py, or measure what the checks see and accesses cost."""

import argparse
import sys

import torch

from src.ops.toolchain import BuildError

from .cases import GROUPS, NEED_TENSOR_CORES, run_cases
from .device import Device
from .library import kernels, readable
from .mutants import print_mutants
from .traffic import print_traffic


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gpu_emulation.ptx",
        description="Execute the CUDA kernels as PTX, on a CPU, under checks.",
    )
    parser.add_argument("--arch", nargs="+", default=["80"], help="architectures, such as 75 80 90 120")
    parser.add_argument("--quick", action="store_true", help="only the rows that the tests always run")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows with this in kernel and title")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument(
        "--traffic", action="store_true", help="bank conflicts and sectors of accesses, by line"
    )
    parser.add_argument(
        "--mutants", action="store_true", help="leave out barriers, waits and stores, one by one"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    problems = []
    for architecture in arguments.arch:
        try:
            device = Device(architecture)
        except BuildError as error:
            parser.error(f"--arch {architecture}: {error}")
        if arguments.traffic or arguments.mutants:
            (print_traffic if arguments.traffic else print_mutants)(device)
            continue
        for group in arguments.groups:
            if int(architecture) >= 80 or group not in NEED_TENSOR_CORES:
                rows = [case for case in GROUPS[group]() if case.quick or not arguments.quick]
                problems += run_cases(device, [case for case in rows if arguments.only in case.name], print)
        counts = kernels(device.library)
        ran = {name: of for name, of in counts.items() if of[0]}
        executed, instructions = (sum(of[i] for of in ran.values()) for i in (2, 1))
        print(
            f"sm_{architecture}: {len(ran)} of {len(counts)} kernels ran, {executed} of their {instructions}"
            " instructions"
        )
        if not arguments.quick and arguments.groups == list(GROUPS):
            for name in sorted(set(counts) - set(ran)):
                print(f"      did not run: {readable(name)}")
    for problem in problems:
        print(f"WRONG: {problem}")
    print(f"{len(problems)} findings")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
