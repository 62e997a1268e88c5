"""Tools of every benchmark: flags, contenders that take turns, memory above the start, the last line."""

import argparse
import functools
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import torch

from rwkv_miss import write_checkpoint
from rwkv_miss.version import commit
from src.common.device import choose_precision
from src.model import RWKV, default_arch

# CPU features that decide which kernels run, named as in /proc/cpuinfo (asimd is NEON)
X86 = "avx2 avx512f avx512_vnni avx512_bf16 avx512_fp16 avx_vnni amx_tile amx_bf16 amx_int8"
ARM = "asimd asimddp bf16 i8mm sve sve2"
INSTRUCTIONS = f"{X86} {ARM}".split()


def cpu(path: str = "/proc/cpuinfo") -> dict[str, object]:
    """Return name, family, model and INSTRUCTIONS of this machine's first CPU, and on ARM also implementer
    and part.
    """
    try:
        with open(path) as info:
            lines = info.read().partition("\n\n")[0].splitlines()
    except OSError:  # no Linux
        return {"name": platform.processor() or platform.machine()}
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    found = {"name": facts.get("model name") or platform.machine()}
    numbers = {"family": "cpu family", "model": "model", "implementer": "CPU implementer", "part": "CPU part"}
    for key, name in numbers.items():
        if name in facts:
            found[key] = int(facts[name], 0)
    return found | {"instructions": [name for name in INSTRUCTIONS if name in flags]}


def machine_line() -> str:
    """Describe the CPU in words: "AMD EPYC (family 26, model 2), 2 cores, avx2 avx512f"."""
    facts = cpu()
    numbers = ", ".join(
        f"{key} {value}" for key, value in facts.items() if key not in ("name", "instructions")
    )
    name = f"{facts['name']} ({numbers})" if numbers else facts["name"]
    return ", ".join(filter(None, [name, f"{os.cpu_count()} cores", " ".join(facts.get("instructions", []))]))


@functools.cache
def environment() -> dict[str, object]:
    """Collect machine, versions and commit, for a benchmark's JSON line."""
    return {
        "machine": machine_line(),
        "cpu": cpu(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": commit(),
    }


def report(benchmark: str, **figures) -> None:
    """Print the last lines of a benchmark's output: the machine in words, and JSON."""
    print(f"measured on {machine_line()}")
    report_so_far(benchmark, **figures)


def report_so_far(benchmark: str, **figures) -> None:
    """Print the JSON of the figures so far, so that they are not lost if the benchmark is stopped."""
    print(json.dumps({"benchmark": benchmark, **figures, **environment()}), flush=True)


def precision_on(device: str, asked: str) -> str:
    """Return train.py's choice for precision "auto" on cpu or cuda: fp32, bf16 or fp16."""
    return choose_precision(asked, "gpu" if device == "cuda" else "cpu")[0]


def runs_out(work: Callable[[], object]) -> bool:
    """Do work(), and tell whether a GPU's memory ran out; in that case free the work's memory."""
    try:
        work()
    except torch.OutOfMemoryError:
        pass  # leaving this block frees the traceback, which holds the tensors
    else:
        return False
    torch.cuda.empty_cache()
    return True


def argument_parser(doc: str) -> argparse.ArgumentParser:
    """Make a parser whose help begins with the first paragraph of the benchmark's docstring."""
    return argparse.ArgumentParser(description=doc.partition("\n\n")[0], allow_abbrev=False)


def add_integers(parser: argparse.ArgumentParser, **defaults: int) -> None:
    """Add a flag for each number, with its default."""
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)


def settings_without(args: argparse.Namespace, *names: str) -> dict[str, object]:
    """Return all flags' values but the named ones, for the JSON line."""
    return {name: value for name, value in vars(args).items() if name not in names}


def as_flags(**values: object) -> list[str]:
    """Write flags of a command line: as_flags(micro_bsz=2) is ["--micro_bsz", "2"]."""
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def same_flags(args: argparse.Namespace, *names: str) -> list[str]:
    """Return the named flags with this process's values."""
    return as_flags(**{name: getattr(args, name) for name in names})


def json_of_process(module: str, *flags: str) -> object:
    """Run a module in a fresh process, whose memory is untouched, and return the JSON that it prints."""
    command = [sys.executable, "-m", module, *flags]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def clock_name(threads: int) -> str:
    """Name the time that timed() measures."""
    return "CPU time" if threads == 1 else "wall time"


def timed(work: Callable[[], object], threads: int | None = None, device: str = "cpu") -> float:
    """Measure the seconds of work(): CPU time with one thread, wall time with several, or the time until a
    GPU is done. The number of threads is torch's by default.
    """
    one_thread = (threads or torch.get_num_threads()) == 1
    clock = time.process_time if one_thread and device == "cpu" else time.perf_counter
    start = clock()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def fastest_by_turns(
    works: dict[str, Callable[[], object]],
    rounds: int,
    device: str = "cpu",
    after_round: Callable[[dict[str, float]], None] = lambda seconds: None,
) -> dict[str, float]:
    """Measure the seconds of each contender's fastest round. Contenders take turns, so that a slow minute of
    the machine slows all. An additional first round warms up. `after_round` gets the seconds so far.
    """
    seconds = dict.fromkeys(works, float("inf"))
    for done in range(rounds + 1):
        for name, work in works.items():
            seconds[name] = min(seconds[name], timed(work, device=device))
        if done < rounds:
            after_round(seconds)
    return seconds


def write_random_base(path, version: int, n_layer: int, n_embd: int, tokenizer: str = "bytes") -> int:
    """Write a random checkpoint in bf16, as released files are, with the World vocabulary's size; return its
    number of parameters. The file records the tokenizer; with "" it records none, like released files.
    """
    with torch.device("meta"):
        shapes = {
            name: p.shape for name, p in RWKV(default_arch(version, n_layer, n_embd)).named_parameters()
        }
    generator = torch.Generator().manual_seed(0)
    tensors = (
        (name, torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator))
        for name, shape in shapes.items()
    )
    record = {"format": "rwkv-miss trained", "tokenizer": tokenizer, "eod": ""} if tokenizer else None
    write_checkpoint(path, tensors, record)
    return sum(shape.numel() for shape in shapes.values())


def anonymous_bytes() -> int:
    """Return RssAnon of this process: its memory without mapped files."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))


def peak_above_start(work) -> int:
    """Measure how many bytes RssAnon rises above its start while work() runs, sampled every millisecond."""
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
    return max(seen, default=start) - start
