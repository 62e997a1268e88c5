"""What every benchmark needs: the machine, the last line, and memory above the start."""

import ctypes
import json
import os
import platform
import subprocess
import threading

import torch

from rwkv_miss import write_checkpoint
from src.model import RWKV, default_arch


def environment() -> dict[str, object]:
    """Machine, versions and commit, for a benchmark's JSON line."""
    with open("/proc/cpuinfo") as info:
        name = next((line.partition(": ")[2].strip() for line in info if line.startswith("model name")), platform.machine())
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    return {
        "machine": f"{name}, {os.cpu_count()} cores", "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__}, "commit": commit,
    }


def report(benchmark: str, **figures) -> None:
    """The last line of a benchmark's output."""
    print(json.dumps({"benchmark": benchmark, **figures, **environment()}))


def write_random_base(path, version: int, n_layer: int, n_embd: int) -> int:
    """A random checkpoint in bf16, as released files are, of the World vocabulary's size and for the tokenizer bytes; its number of parameters."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in RWKV(default_arch(version, n_layer, n_embd)).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    tensors = ((name, torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)) for name, shape in shapes.items())
    write_checkpoint(path, tensors, {"format": "rwkv-miss trained", "tokenizer": "bytes", "eod": ""})
    return sum(shape.numel() for shape in shapes.values())


def anonymous_bytes() -> int:
    """RssAnon of this process: memory of its own, without mapped files."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))


def peak_above_start(work) -> int:
    """The highest RssAnon seen, every millisecond, while work() runs, minus the one before it, in bytes."""
    start, seen, done = anonymous_bytes(), [], threading.Event()

    def watch():
        while not done.wait(0.001):
            seen.append(anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return max(seen) - start


def release_freed() -> None:
    """Have glibc give back what is freed, where it is the C library: what comes next would use it, and seem to need less."""
    getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)(0)


def keep_pages() -> bool:
    """Have glibc keep the memory that is freed, for this process; False where it is another C library.

    Left alone it returns large blocks to the system, and a single operation is then timed with the page faults of getting them again.
    """
    mmap_threshold, trim_threshold = -3, -1
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda name, value: 0)
    return bool(mallopt(mmap_threshold, 1 << 25) and mallopt(trim_threshold, 2**31 - 1))
