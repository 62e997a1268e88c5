"""What a run needs of a device's memory, part by part, before anything is loaded; and what the device has.

| part          | bytes                                                              | where it comes from
|
|---------------|--------------------------------------------------------------------|-------------------------------------------------|
| base          | frozen parameters in --precision; of the layers in --quant         | model.RWKV.load and
quantise                    |
| trained       | 4 a trained parameter, and what a method keeps beside them         |
adapter.AdapterLinear.setup; fp32 in full training |
| gradients     | 4 a trained parameter                                              | kept from one
micro-batch to the next           |
| Adam          | 8 a trained parameter: exp_avg and exp_avg_sq                      |
trainer.FineTuning.configure_optimizers         |
| DeepSpeed     | 4 a trained parameter / processes: its master copy; its buckets    |
deepspeed_anywhere.AnywhereDeepSpeed            |
| rollback      | 24 a trained parameter: two copies of it and its moments           | rollback.LastGood,
which keeps them on the CPU  |
| activations   | what the layers keep for the backward                              | allocation.step_bytes,
counted from the code    |
| working       | the most beyond that: logits of the trained tokens, temporaries    | the same
|
| allocator     | memory that is not in use and not given back                       | HEAP_WASTE, CACHE_WASTE
|
| libraries     | Python, torch, Lightning, CUDA's context                           | LIBRARIES, measured by
benchmarks/memory.py     |

ZeRO divides by the number of processes: stage 1 Adam and the master copy, stage 2 also gradients, stage 3
also base and trained.
"""

from __future__ import annotations

import heapq
import os

import torch

from rwkv_miss.errors import UserError
from rwkv_miss.files.checkpoint import Arch
from rwkv_miss.quantised import empty

from .allocation import StepBytes, model_on_meta, step_bytes
from .config import Config
from .data import Schedule
from .device import DTYPES
from .model import RWKV

GIB, MIB = 1 << 30, 1 << 20
# glibc's heap stays as large as it ever was, with holes: beside the most that live in blocks of up to 32 MiB,
# 0.4 to 0.9 of that were seen with glibc 2.41 (benchmarks/memory.py)
HEAP_WASTE = 0.6
# of torch's CUDA allocator: an assumption, this project has not run on a GPU
CACHE_WASTE = 0.1
# what a process of train.py holds before the model: seen on a CPU; on a GPU the context and cuBLAS's
# workspace are an assumption
LIBRARIES = {"cpu": 380 * MIB, "gpu": 700 * MIB}
DEEPSPEED_LIBRARY = 150 * MIB  # on the CPU
BUCKET = 10_000_000  # numbers that DeepSpeed reduces or gathers at once, as AnywhereDeepSpeed sets it
USABLE = 0.9  # of what is free, the rest is for what no part foresees


def largest_batch(schedule: Schedule, config: Config) -> tuple[int, int]:
    """(tokens of the longest row, most targets in micro_bsz rows): no micro-batch is larger, whichever rows
    meet in it.
    """
    most = heapq.nlargest(config.micro_bsz, schedule.targets)
    row = min(max(schedule.lengths), config.ctx_len)
    return row, max(1, min(sum(most), row * config.micro_bsz))


def memory_parts(
    arch: Arch, config: Config, accelerator: str, kernel: str, precision: str, row: int, targets: int
) -> dict[str, float]:
    """Bytes by part on one device: rows of `row` tokens, `targets` of them trained in a micro-batch.
    `precision` is not auto.
    """
    model = model_on_meta(arch, config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    world = config.world
    stage = int(config.strategy[len("deepspeed_stage_")]) if config.strategy.startswith("deepspeed") else 0
    offload = config.strategy.endswith("_offload") and accelerator == "gpu"
    full = config.peft == "none"
    base_size = 4 if full else DTYPES[precision].itemsize

    def shared(size: float, from_stage: int, away: bool = False) -> float:
        return 0 if away else size / world if from_stage <= stage else size

    parts = {
        "base": shared(
            base_size * frozen - saved_by_quant(model, config.quant, base_size), 3, offload and stage == 3
        ),
        "trained": shared(4 * trained, 3, offload and stage == 3) + buffers,
        "gradients": shared(4 * trained, 2, offload),
        "Adam": shared(8 * trained, 1, offload),
    }
    if stage:
        parts["DeepSpeed"] = shared(4 * trained, 1, offload) + 4 * min(BUCKET, trained)
        if stage == 3 and (world > 1 or offload):
            # whole at one time: a bucket of parameters, or one that is larger by itself, such as the head,
            # and a bucket that is fetched ahead
            largest = max(p.numel() for p in model.parameters())
            parts["DeepSpeed"] += base_size * min(max(BUCKET, largest) + BUCKET, frozen + trained)
    if accelerator == "cpu" and config.rollback_steps and not full:
        parts["rollback"] = 24 * trained + 2 * buffers
    step = step_bytes(arch, config, kernel, precision, row, targets)
    # under stage 3 AnywhereDeepSpeed has glibc give back what is freed
    waste = 0 if stage == 3 and accelerator == "cpu" else allocator_waste(step, accelerator)
    parts |= {
        "activations": step.activations,
        "working": max(step.peak - step.activations, 0),
        "allocator": waste,
    }
    parts["libraries"] = LIBRARIES[accelerator] + (DEEPSPEED_LIBRARY if stage and accelerator == "cpu" else 0)
    return parts


def saved_by_quant(model: RWKV, quant: str, size: int) -> int:
    """Bytes that quantised weights of the layers take less than those of `size` bytes each."""
    if quant == "none":
        return 0
    weights = [linear.weight for linear in model.layer_linears().values()]
    return sum(size * w.numel() - empty(quant, *w.shape, "meta").nbytes for w in weights)


def needed(parts: dict[str, float], config: Config, accelerator: str) -> float:
    """Bytes that the memory behind free_memory() must have: the processes of a CPU share it."""
    return sum(parts.values()) * (config.devices if accelerator == "cpu" else 1)


def allocator_waste(step: StepBytes, accelerator: str) -> float:
    """Memory that the allocator holds beyond the most that tensors use at one time.

    glibc gives large blocks back and keeps the heap of the small ones at its highest, so that on a CPU the
    most of both adds up.
    """
    if accelerator == "gpu":
        return CACHE_WASTE * step.peak
    return step.large + (1 + HEAP_WASTE) * step.small - step.peak


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
