"""A step of one of two processes with a GPU each: torch's DDP, and DeepSpeed's stages.

The process group is torch's own fake one: it moves nothing, and every process is told that all is well. So
this shows how a process comes through a step, not what the processes say to each other.
"""

from __future__ import annotations

import contextlib
import os
from unittest import mock

import torch
import torch.distributed as dist
import torch.optim.optimizer as optimizers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from src.common.batch import Batch
from src.config import Config
from src.model import default_arch
from src.planning.memory import memory_parts
from src.sources import source_of
from src.training.optimizer import parameter_groups

from .device import FakeGpu
from .micro_batch import batch_on, config_of, small_model_on

PROCESSES = 2
KIB = 1024


class Loss(nn.Module):
    """The loss of a batch as a module, which is what is wrapped."""

    def __init__(self, version: int, config: Config, device: str, *sizes: int):
        super().__init__()
        self.model, self.chunks = small_model_on(device, version, config, *sizes), source_of(config).chunks

    def forward(self, batch: Batch) -> Tensor:
        return self.chunks.loss(self.model, batch)


def start_processes() -> None:
    """The process group, which stays: DeepSpeed keeps groups that are made of it."""
    if not dist.is_initialized():
        dist.init_process_group("fake", rank=0, world_size=PROCESSES, store=FakeStore())


def ddp(version: int) -> dict:
    """Forward and backward; `reduced` are the gradients that go to the other process."""
    from torch.nn.parallel import distributed

    reduced = []

    def reduce(_, bucket):
        buffer = bucket.buffer()
        reduced.append(f"{buffer.numel()} {buffer.dtype} on {buffer.device}".replace("torch.", ""))
        done = torch.futures.Future()
        done.set_result(buffer)
        return done

    start_processes()
    device = "cuda:1"
    with (
        FakeGpu() as gpu,
        # the processes compare their parameters' shapes, and the other one is not there
        mock.patch.object(distributed, "_verify_param_shape_across_processes"),
    ):
        module = Loss(version, config_of("miss"), device)
        batch = batch_on(device, 2, 37)
        wrapped = distributed.DistributedDataParallel(module, broadcast_buffers=False)
        wrapped.register_comm_hook(None, reduce)
        gpu.begin()
        wrapped(batch).backward()
    trained = [p for p in module.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.device == torch.device(device) for p in trained)
    return gpu.counts() | {"reduced": reduced}


def zero(stage: int, version: int) -> dict:
    """A step of DeepSpeed's engine with the settings of a run."""
    with engine_of(version, config_of("miss", strategy=f"deepspeed_stage_{stage}")) as (gpu, engine, batch):
        gpu.begin()
        engine.backward(engine(batch))
        engine.step()
    assert engine.skipped_steps == 0
    return gpu.counts()


def zero_memory(stage: int, version: int) -> dict:
    """The most that the second step of a full training has, and the plan of it.

    The model is so large and the batch so small that the optimizer's step is the most.
    """
    sizes = 4, 2048, 4096
    config = config_of("none", strategy=f"deepspeed_stage_{stage}", devices=PROCESSES, micro_bsz=2)
    arch = default_arch(version, *sizes, 64)
    parts = memory_parts(arch, config, "gpu", "cuda", "bf16", 37, 74)
    planned = sum(size for part, size in parts.items() if part not in ("allocator", "libraries"))
    with engine_of(version, config, *sizes) as (gpu, engine, batch):
        for _ in range(2):
            gpu.begin()
            engine.backward(engine(batch))
            engine.step()
    return {"planned KiB": int(planned) // KIB, "KiB": gpu.peak // KIB, "ratio": round(gpu.peak / planned, 3)}


@contextlib.contextmanager
def engine_of(version: int, config: Config, *sizes: int):
    """Context with the fake GPU, DeepSpeed's engine around a model of these sizes, and a batch."""
    start_processes()
    with deepspeed_on_fakes() as deepspeed, FakeGpu() as gpu:
        from src.distributed.deepspeed_strategy import AnywhereDeepSpeed

        settings = AnywhereDeepSpeed(config.strategy, 2, torch.bfloat16, "gpu").config
        module = Loss(version, config, "cuda:0", *sizes)
        batch = batch_on("cuda:0", 2, 37)
        optimizer = torch.optim.AdamW(parameter_groups(module.model, 1e-3, 0.01), lr=1e-3)
        parameters = [p for p in module.parameters() if p.requires_grad]
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            model_parameters=parameters,
            config=settings,
            dist_init_required=False,
        )
        yield gpu, engine, batch


@contextlib.contextmanager
def deepspeed_on_fakes():
    """Context with the module. Its questions to CUDA that are no operators of torch are answered here."""
    with (
        mock.patch.dict(os.environ, LOCAL_RANK="0"),  # as a launcher sets it
        mock.patch("torch.cuda.nvtx.range_push"),
        mock.patch("torch.cuda.nvtx.range_pop"),
        # AdamW takes _foreach for the tensors of a GPU, if they are of these types
        mock.patch.object(optimizers, "_foreach_supported_types", [Tensor, FakeTensor]),
    ):
        import deepspeed
        from deepspeed.runtime.zero import stage3, stage_1_and_2

        # a number that is read from the fake GPU is 1: true
        with (
            mock.patch.object(stage_1_and_2, "is_invalid_grad_norm", return_value=False),
            mock.patch.object(stage3, "is_invalid_grad_norm", return_value=False),
            mock.patch.object(
                stage_1_and_2.DeepSpeedZeroOptimizer, "has_overflow", lambda self, *args: False
            ),
            mock.patch.object(
                stage3.DeepSpeedZeroOptimizer_Stage3, "has_overflow", lambda self, *args: False
            ),
        ):
            yield deepspeed
