"""Cost of accesses: passes over the banks of shared memory, sectors of global memory, by line of a source.

`wkv_work` counts what the warps of the WKV run, for benchmarks/wkv_budget.py.
"""

from __future__ import annotations

import collections
import json
import re

from benchmarks.wkv_budget import Work

from .cases import BF16, FP16, SMALL, mix7_row, wkv
from .device import Device
from .library import kernels, readable
from .mutants import launched_by


def print_traffic(device: Device) -> None:
    """Run the small rows; prints for each kernel what its accesses take, and the least that they could."""
    for case in SMALL:
        for kernel in launched_by(case._replace(options={"traffic": 1}), device):
            lines = collections.defaultdict(lambda: [0, 0])
            for text, where, _, parts, least in json.loads(device.library.ptx_code(kernel.encode())):
                if parts:
                    space = "global" if ".global." in text and not text.startswith("cp") else "shared"
                    of = lines[space, where]
                    of[0], of[1] = of[0] + parts, of[1] + least
            for space in ("global", "shared"):
                of = {where: counts for (its, where), counts in lines.items() if its == space}
                if not of:
                    continue
                parts, least = (sum(counts[i] for counts in of.values()) for i in (0, 1))
                print(f"{readable(kernel):72} {space:8}{parts:10} {parts / least:6.2f} of the least")
                for where, (n, m) in sorted(of.items()):
                    if n > 1.05 * m:
                        print(f"      {where}: {n / m:.2f}, {n - m} of {parts - least} more")


FORWARD = ("prepare<__nv_bfloat16, false>", "scan<__nv_bfloat16, Factors, false, ", ".cu forward<")


def wkv_work(device: Device, version: int, chunked: bool) -> dict[bool, Work]:
    """Count what the warps of a head run for 16 tokens of many heads, by whether it is a backward's."""
    heads, tokens = 128, (48, 64) if chunked else (16, 32)
    seen = [_executed(device)]
    for T in tokens:
        device.clear(traffic=1)
        if version == 7 and chunked:  # as the model calls it
            mix7_row(device, (1, T, 64 * heads, heads), BF16, False, "cuda")
        else:
            wkv(device, version, chunked, (1, T, heads, 64), BF16 if chunked else FP16, ends="none")
        seen.append(_executed(device))
    device.clear()
    more = heads * (tokens[1] - tokens[0]) / 16
    return {
        backward: Work(*((z - 2 * y + x) / more for x, y, z in zip(*(of[backward] for of in seen))))
        for backward in (False, True)
    }


def _executed(device: Device) -> dict[bool, Work]:
    """Sum up what all kernels of the WKV have run so far, of forwards and of backwards."""
    sums = {False: [0, 0, 0], True: [0, 0, 0]}
    for kernel in kernels(device.library):
        name = readable(kernel)
        if not name.startswith("wkv"):
            continue
        of = sums[not any(part in name for part in FORWARD)]
        for text, _, hits, passes, _ in json.loads(device.library.ptx_code(kernel.encode())):
            opcode = re.sub(r"^@\S+\s+", "", text)
            of[0] += hits
            of[1] += hits if opcode.startswith(("shfl.", "movmatrix.")) else 0
            of[1] += passes if not opcode.startswith(("ld.global", "st.global")) else 0
            of[2] += hits if opcode.startswith("mma.") else 0
    return {backward: Work(*of) for backward, of in sums.items()}
