"""What a device has of memory, and how much of it is free for this process, cgroups included."""

from __future__ import annotations

import os

import torch

from rwkv_miss.errors import UserError

GIB, MIB = 1 << 30, 1 << 20


def free_memory(accelerator: str) -> int:
    """Bytes that this process may use on one device, what it holds already included."""
    if accelerator == "gpu":
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved()
    return min(_available(), _cgroup_limit()) + _resident()


def all_memory(accelerator: str) -> int:
    """Bytes of one device, whatever is in use: a number that the processes of a run find alike."""
    if accelerator == "gpu":
        return torch.cuda.get_device_properties(0).total_memory
    return min(_total(), _cgroup_limit(left=False))


def _status(path: str, name: str) -> int:
    with open(path) as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(name))


def _total() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 * GIB


def _available() -> int:
    """MemAvailable of Linux; elsewhere all of the machine's memory."""
    try:
        return _status("/proc/meminfo", "MemAvailable")
    except OSError:
        return _total()


def _resident() -> int:
    try:
        return _status("/proc/self/status", "RssAnon")
    except OSError:
        return 0


def _cgroup_limit(root: str = "/sys/fs/cgroup", left: bool = True) -> int:
    """A container's limit, version 2 or 1, or what of it is left; files that the kernel would drop from its
    cache count as free.
    """
    for limit, usage, stat, key in (
        (f"{root}/memory.max", f"{root}/memory.current", f"{root}/memory.stat", "inactive_file"),
        (
            f"{root}/memory/memory.limit_in_bytes",
            f"{root}/memory/memory.usage_in_bytes",
            f"{root}/memory/memory.stat",
            "total_inactive_file",
        ),
    ):
        try:
            with open(limit) as file:
                most = file.read().strip()
            if most == "max":
                continue
            if not left:
                return int(most)
            with open(usage) as used, open(stat) as file:
                dropped = next((int(line.split()[1]) for line in file if line.split()[0] == key), 0)
                return int(most) - int(used.read()) + dropped
        except (OSError, ValueError):
            continue
    return 1 << 62


def parse_size(text: str) -> int:
    """Bytes of "24GB", "24GiB", "800MB" or a number. GPUs are sold in GiB that are called GB, so both mean
    2^30.
    """
    units = {"": 1, "K": 1 << 10, "M": MIB, "G": GIB, "T": 1 << 40}
    number = text.strip().upper().removesuffix("B").removesuffix("I")
    unit = number[-1:] if number[-1:] in units else ""
    try:
        size = float(number.removesuffix(unit)) * units[unit]
        if not MIB <= size < 1 << 60:  # no device has less: the unit was forgotten
            raise ValueError
    except ValueError:
        raise UserError(f"--memory {text}: expected a size such as 24GB or 800MB") from None
    return int(size)
