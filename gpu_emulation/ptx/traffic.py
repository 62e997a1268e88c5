"""Cost of accesses: passes over the banks of shared memory, sectors of global memory, by line of a source."""

from __future__ import annotations

import collections
import json

from .cases import SMALL
from .device import Device
from .library import readable
from .mutants import launched_by


def print_traffic(device: Device) -> None:
    """Run the small rows; prints for each kernel what its accesses take, beside the least that they could."""
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
