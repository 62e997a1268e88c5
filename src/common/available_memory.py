"""Memory of a device, and the part of it that is free for this process, cgroups included."""

from __future__ import annotations

import contextlib
import os

import torch

from rwkv_miss.errors import UserError

GIB, MIB = 1 << 30, 1 << 20


def free_memory(accelerator: str) -> int:
    """Count the bytes that this process may use on one device, with those it holds already."""
    if accelerator == "gpu":
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved()
    return min(_available(), _cgroup_limit()) + _resident()


def all_memory(accelerator: str) -> int:
    """Count the bytes of one device, in use or not: all processes of a run find the same number."""
    if accelerator == "gpu":
        return torch.cuda.get_device_properties(0).total_memory
    return min(_total(), _cgroup_limit(left=False))


def status_bytes(path: str, name: str) -> int:
    """Read a size from a file of Linux with lines such as "VmRSS: 12 kB"; 0 if it is not there."""
    with contextlib.suppress(OSError, StopIteration), open(path) as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(name))
    return 0


def _total() -> int:
    if not hasattr(os, "sysconf"):
        return 8 * GIB
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _available() -> int:
    """Read MemAvailable of Linux; elsewhere all of the machine's memory."""
    return status_bytes("/proc/meminfo", "MemAvailable") or _total()


def resident() -> int:
    """Count the bytes that this process holds, with the files that it has mapped; 0 if unknown."""
    return status_bytes("/proc/self/status", "VmRSS")


def _resident() -> int:
    return status_bytes("/proc/self/status", "RssAnon")


def _cgroup_limit(root: str = "/sys/fs/cgroup", left: bool = True) -> int:
    """Return a container's limit, by cgroups of version 2 or 1, or with `left` the rest of it.

    Files that the kernel would drop from its cache count as free.
    """
    versions = [
        (root, "memory.max", "memory.current", "inactive_file"),
        (f"{root}/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ]
    for folder, limit, usage, key in versions:
        try:
            with open(f"{folder}/{limit}") as file:
                most = file.read().strip()
            if most == "max":
                continue
            if not left:
                return int(most)
            with open(f"{folder}/{usage}") as used, open(f"{folder}/memory.stat") as file:
                dropped = next((int(line.split()[1]) for line in file if line.split()[0] == key), 0)
                return int(most) - int(used.read()) + dropped
        except (OSError, ValueError):
            continue
    return 1 << 62


def parse_size(text: str, flag: str = "--memory") -> int:
    """Parse "24GB", "24GiB", "800MB" or a number, the value of a flag, to bytes.

    GPUs are sold in GiB that are called GB, so both mean 2^30.
    """
    units = {"": 1, "K": 1 << 10, "M": MIB, "G": GIB, "T": 1 << 40}
    number = text.strip().upper().removesuffix("B").removesuffix("I")
    unit = number[-1:] if number[-1:] in units else ""
    try:
        size = float(number.removesuffix(unit)) * units[unit]
        # no device has less than 1 MiB: the unit is missing
        if not MIB <= size < 1 << 60:
            raise ValueError
    except ValueError:
        raise UserError(f"{flag} {text}: expected a size such as 24GB or 800MB, at least 1MB") from None
    return int(size)
