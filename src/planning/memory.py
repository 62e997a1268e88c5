"""Memory that a run needs on a device, part by part, before anything is loaded.

| part        | bytes                                                          | where it comes from
|-------------|----------------------------------------------------------------|---------------------------
| base        | frozen parameters in --precision; of the layers in --quant     | RWKV.load and quantise
| trained     | 4 a trained parameter, and what a method keeps with them       | AdapterLinear.setup
| gradients   | 4 a trained parameter                                          | kept between micro-batches
| Adam        | 8 a trained parameter: exp_avg and exp_avg_sq; 2 in 8 bits     | moment_bytes
| DeepSpeed   | 4 a trained parameter / processes: its master copy; buckets    | AnywhereDeepSpeed
| rollback    | 24 a trained parameter: two copies of it and its moments       | LastGood, on the CPU
| activations | what the layers keep for the backward                          | step_bytes, counted
| working     | the most beyond that: logits of trained tokens, temporaries    | step_bytes, counted
| update      | what DeepSpeed's optimizer step needs beyond all of the step   | update_bytes
| values      | what a teacher says of the trained tokens, in each process     | reference_bytes
| reference   | what --reference and its pass need beyond all above            | reference_weights, step_bytes
| drawing     | what drawing answers needs beyond activations and working      | sampling_bytes
| allocator   | memory that is not in use and not given back                   | HEAP_WASTE, CACHE_WASTE
| libraries   | Python, torch, Lightning, CUDA's context                       | LIBRARIES, measured

ZeRO divides some of these by the number of processes. Stage 1: Adam and the master copy. Stage 2: gradients
too. Stage 3: base and trained too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch

from rwkv_miss.files.checkpoint import Arch
from rwkv_miss.quantised import empty

from ..common.available_memory import MIB
from ..common.device import PRECISIONS
from ..common.moments import moment_bytes
from ..common.zero_sizes import SIZES
from ..config import Config
from ..model import RWKV
from ..sources import source_of
from ..sources.estimates import SharedPrompts
from ..sources.reference_model import reference_arch
from .step_memory import StepBytes, model_on_meta, step_bytes

# glibc's heap has holes, and never shrinks. The waste is a share of the most bytes in blocks of up to 32 MiB:
# 0.4 to 0.9 was seen with glibc 2.41 (benchmarks/memory.py).
HEAP_WASTE = 0.6
# the share that torch's CUDA allocator wastes: an assumption, because this project has not run on a GPU
CACHE_WASTE = 0.1
# memory of a process of train.py before the model; seen on a CPU; CUDA's context and cuBLAS's workspace are
# an assumption
LIBRARIES = {"cpu": 380 * MIB, "gpu": 700 * MIB}
DEEPSPEED_LIBRARY = 150 * MIB  # on the CPU
# AdamW's temporaries with ZeRO's flat tensor: torch takes _foreach on a GPU, which makes one, and the plain
# form on a CPU, which makes two. bitsandbytes has a kernel on a GPU; on a CPU it unpacks the moments.
TEMPORARIES = {("adamw", "cpu"): 2, ("adamw", "gpu"): 1, ("adamw8bit", "cpu"): 5, ("adamw8bit", "gpu"): 0}
SUB_GROUP = 10**9  # numbers of its share that a process of stage 3 updates at once, DeepSpeed's default
USABLE = 0.9  # the share of the free memory that a plan uses; the rest is for unforeseen needs


class Zero(NamedTuple):
    """ZeRO's division of a run's tensors."""

    stage: int  # 0: none
    offload: bool  # from the GPU to the computer's memory
    world: int

    @classmethod
    def of(cls, strategy: str, world: int, accelerator: str) -> Zero:
        """Read it from --strategy."""
        is_zero = strategy.startswith("deepspeed")
        stage = int(strategy[len("deepspeed_stage_")]) if is_zero else 0
        return cls(stage, strategy.endswith("_offload") and accelerator == "gpu", world)

    def share(self, size: float, from_stage: int, offloaded: bool = False) -> float:
        """Return one process's bytes on its device of tensors that are divided from a stage on."""
        if offloaded:
            return 0
        return size / self.world if from_stage <= self.stage else size


def memory_parts(
    arch: Arch,
    config: Config,
    accelerator: str,
    kernel: str,
    precision: str,
    row: int,
    targets: int,
    prompts: SharedPrompts | None = None,
    documents: Sequence[Sequence[int]] = (),
    step: StepBytes | None = None,
    values: int = 0,
) -> dict[str, float]:
    """Count bytes by part on one device, for rows of `row` tokens. `precision` is not auto.

    `targets` are the trained tokens of a micro-batch, and `prompts` its sizes if prompts are read once.
    `documents` are the lengths of those in each of its rows. `step` is the result of step_bytes(), if known.
    `values` are the bytes of a teacher's values in main memory.
    """
    model = model_on_meta(arch, config.adapter)
    zero, size = Zero.of(config.strategy, config.world, accelerator), PRECISIONS[precision].itemsize
    parts, buckets = held_parts(model, config, zero, accelerator, 4 if config.peft == "none" else size)
    step = step or step_bytes(arch, config, kernel, precision, row, targets, prompts, documents=documents)
    working = max(step.peak - step.activations, 0)
    # under stage 3 AnywhereDeepSpeed makes glibc return freed memory
    waste = 0 if zero.stage == 3 and accelerator == "cpu" else allocator_waste(step, accelerator)
    parts |= {"activations": step.activations, "working": working, "allocator": waste}
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    temporaries = TEMPORARIES[config.optimizer, accelerator]
    if zero.stage and not zero.offload:
        # the backward is over before; the update counts its own part of `gradients`
        of_backward = parts["gradients"] + buckets + step.activations + working
        parts["update"] = max(0.0, update_bytes(zero, sum(trained), temporaries) - of_backward)
    elif config.optimizer == "adamw8bit" and accelerator == "cpu":
        # a tensor at a time, after the backward
        parts["update"] = max(0.0, 4 * temporaries * max(trained) - step.activations - working)
    source = source_of(config)
    if sampling := source.cost.sampling_bytes(arch, precision, accelerator):
        # drawing is over before the forward begins
        parts["drawing"] = max(0.0, sampling - (step.activations + working))
    if values and accelerator == "cpu":
        parts["values"] = values
    if config.reference:
        is_kept = source.loss.facts.keeps_reference
        forward = step_bytes(
            reference_arch(config.reference),
            dataclasses.replace(config, layers=""),  # --layers counts those of the model in training
            kernel,
            precision,
            row,
            targets,
            prompts if is_kept else None,
            backward=False,
        )
        held = reference_weights(config.reference, config.quant, size)
        if is_kept:
            # the reference reads a micro-batch before the forward begins
            parts["reference"] = held + max(0.0, forward.peak - step.activations - working)
        else:
            # the pass is over before there are gradients, moments, copies and a step
            rest = sum(size for name, size in parts.items() if name not in ("base", "trained"))
            # values of an earlier pass are there twice
            of_pass = held + forward.peak + allocator_waste(forward, accelerator) + 2 * parts.get("values", 0)
            parts["reference"] = max(0.0, of_pass - rest)
    of_deepspeed = DEEPSPEED_LIBRARY if zero.stage and accelerator == "cpu" else 0
    return parts | {"libraries": LIBRARIES[accelerator] + of_deepspeed}


def held_parts(
    model: RWKV, config: Config, zero: Zero, accelerator: str, base_size: int
) -> tuple[dict[str, float], int]:
    """Count the bytes of what a run holds between its steps, and those of ZeRO's buckets among them.

    base_size: bytes of a frozen number that is not quantised.
    """
    tensors = [p.numel() for p in model.parameters() if p.requires_grad]
    trained = sum(tensors)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    added = sum(buffer.nbytes for buffer in model.buffers())
    updated = [trained / zero.world] * zero.world if zero.stage else tensors  # ZeRO has flat tensors
    moments = sum(moment_bytes(config.optimizer, numel) for numel in updated)
    base = base_size * frozen - saved_by_quant(model, config.quant, base_size)
    offload, buckets = zero.offload, 0
    parts = {
        "base": zero.share(base, 3, offload and zero.stage == 3),
        "trained": zero.share(4 * trained, 3, offload and zero.stage == 3) + added,
        "gradients": zero.share(4 * trained, 2, offload),
        "Adam": zero.share(moments, 1, offload),
    }
    if zero.stage:
        sizes = SIZES[accelerator]
        buckets = 4 * min(sizes.bucket, trained)
        if zero.stage == 3 and (zero.world > 1 or offload):
            # live and prefetched parameters are whole at one time; a larger parameter, such as the head, is
            # whole too
            largest = max(p.numel() for p in model.parameters())
            buckets += base_size * min(max(sizes.live, largest) + sizes.ahead, frozen + trained)
        parts["DeepSpeed"] = zero.share(4 * trained, 1, offload) + buckets
    if accelerator == "cpu" and config.rollback_steps and config.peft != "none":
        parts["rollback"] = 24 * trained + 2 * added
    return parts, buckets


def update_bytes(zero: Zero, trained: int, temporaries: int) -> float:
    """Count the bytes of gradients, their copies and AdamW's temporaries in a step of DeepSpeed's optimizer.

    A process makes one flat tensor of the gradients of its share, while it still has them. Stage 1 has the
    share in addition to all gradients at the end of the backward.
    """
    share = 4 * trained / zero.world
    at_once = min(share, 4 * SUB_GROUP) if zero.stage == 3 else share
    most = share + (1 + temporaries) * at_once
    return max(most, 4 * trained + share) if zero.stage == 1 else most


def reference_weights(reference: str, quant: str, size: int) -> float:
    """Count the bytes of the weights of --reference, of `size` bytes each where they are not quantised."""
    with torch.device("meta"):
        model = RWKV(reference_arch(reference))
    return size * sum(p.numel() for p in model.parameters()) - saved_by_quant(model, quant, size)


def saved_by_quant(model: RWKV, quant: str, size: int) -> int:
    """Count the bytes that quantised weights of the layers save, against weights of `size` bytes each."""
    if quant == "none":
        return 0
    weights = [linear.weight for linear in model.layer_linears().values()]
    return sum(size * w.numel() - empty(quant, *w.shape, "meta").nbytes for w in weights)


def needed(parts: dict[str, float], devices: int, accelerator: str) -> float:
    """Count the bytes that a CPU's or GPU's memory must have; the processes of a CPU share it."""
    return sum(parts.values()) * (devices if accelerator == "cpu" else 1)


def allocator_waste(step: StepBytes, accelerator: str) -> float:
    """Estimate the memory that the allocator holds beyond the peak of the tensors.

    glibc returns large blocks, and keeps the heap of the small ones at its peak. So on a CPU the peaks of
    both add up.
    """
    if accelerator == "gpu":
        return CACHE_WASTE * step.peak
    return step.large + (1 + HEAP_WASTE) * step.small - step.peak
