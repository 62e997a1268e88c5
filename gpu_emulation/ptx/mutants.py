"""Mutants of the kernels: barriers, waits and some of the stores, left out one at a time.

A mutant is found where its row fails. One that lives is a barrier that these rows do not need, or a hole in
the checks.
"""

from __future__ import annotations

import collections
import json
import re

from .cases import SMALL, Case, errors
from .device import Device
from .library import kernels, readable

WAITS = ("bar.sync", "bar.warp.sync", "cp.async.wait_group", "cp.async.commit_group")
STORES = 12  # one in 12 stores of a kernel is left out


def launched_by(case: Case, device: Device) -> list[str]:
    """Run a row, which has to be right; returns the names of its kernels."""
    before = kernels(device.library)
    _, wrong = errors(case, device)
    assert not wrong, f"{case.name} is wrong as it is: {wrong}"
    return sorted(name for name, counts in kernels(device.library).items() if counts[0] > before[name][0])


def candidates(device: Device, kernel: str):
    """Yield (number, what it is, text, line of the source) of the instructions that are left out."""
    stores = 0
    for number, (text, where, hits, *_) in enumerate(json.loads(device.library.ptx_code(kernel.encode()))):
        op = re.sub(r"^@\S+\s+", "", text).split()[0]
        stores += op.startswith("st.") and hits > 0
        if hits and (op in WAITS or op.startswith("st.") and stores % STORES == 1):
            yield number, op if op in WAITS else "store", text, where


def print_mutants(device: Device) -> None:
    """Run each mutant of the small rows; prints how many are found, and those that live."""
    found, total, alive = collections.Counter(), collections.Counter(), []
    for case in SMALL:
        for kernel in launched_by(case, device):
            for number, kind, text, where in list(candidates(device, kernel)):
                device.library.ptx_skip(kernel.encode(), number, 1)
                _, wrong = errors(case, device)
                device.library.ptx_skip(kernel.encode(), number, 0)
                total[kind] += 1
                if wrong:
                    found[kind] += 1
                else:
                    alive.append(f"{readable(kernel)}, {where}: {text}")
        so_far = ", ".join(f"{found[kind]} of {count} {kind}" for kind, count in total.items())
        print(f"{case.name}: found so far {so_far}", flush=True)
    for line in alive:
        print(f"      not found: {line}")
