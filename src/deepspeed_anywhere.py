"""Lightning's DeepSpeed strategy, also on a CPU-only machine (gloo), with the model's dtypes left as they are."""

from __future__ import annotations

import deepspeed.ops
import torch
import torch.nn.functional as F
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn


class KeepDtypes(DeepSpeedPrecision):
    """A bf16 base beside fp32 adapters: Lightning's modes would cast both to one dtype."""

    def __init__(self):
        super().__init__("32-true")

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module

    def convert_input(self, data):
        return data

    def backward(self, tensor, model, optimizer, *args, **kwargs) -> None:
        # Lightning has divided the loss by the number of micro-batches already; DeepSpeed would do it again, which Adam hides
        # and gradient clipping does not
        super().backward(tensor, model, optimizer, *args, scale_wrt_gas=False, **kwargs)


class AnywhereDeepSpeed(DeepSpeedStrategy):
    """`DeepSpeedStrategy` that also accepts the CPU accelerator."""

    def __init__(self, stage: int, micro_bsz: int):
        # small buckets: with the defaults, 5e8 elements, stage 3 gathers a whole frozen base at once
        bucket = {"reduce_bucket_size": 10_000_000, "allgather_bucket_size": 10_000_000}
        if stage == 3:
            bucket |= {"stage3_prefetch_bucket_size": 10_000_000, "stage3_max_live_parameters": 50_000_000,
                       "stage3_param_persistence_threshold": 10_000}
        self.stage = stage
        super().__init__(
            config={
                "zero_optimization": {"stage": stage, "contiguous_gradients": True, "overlap_comm": False, **bucket},
                "zero_allow_untested_optimizer": True,
                "train_micro_batch_size_per_gpu": micro_bsz,
                "steps_per_print": 10**9,
                "wall_clock_breakdown": False,
            },
            precision_plugin=KeepDtypes(),
        )

    @property
    def _on_cpu(self) -> bool:
        return isinstance(self.accelerator, CPUAccelerator)

    def setup_environment(self) -> None:
        if not self._on_cpu:
            return super().setup_environment()
        # DeepSpeed would JIT-build a shared-memory all-reduce (about a minute, needs a compiler); gloo is enough
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        super(DeepSpeedStrategy, self).setup_environment()  # skips only the CUDA-only check

    def setup_distributed(self) -> None:
        if not self._on_cpu:
            return super().setup_distributed()
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0) if self._on_cpu else super().root_device  # DeepSpeed wants a device *index*

    def setup(self, trainer) -> None:
        super().setup(trainer)
        if self.stage == 3:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            self._accumulators = [_gather_to_accumulate(p) for p in trained]

    def _pieces(self) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """This rank's share of the trained parameters as flat fp32 tensors, each with what the optimizer keeps for it."""
        zero = self.deepspeed_engine.optimizer
        pieces = zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        return [(piece, zero.optimizer.state[piece]) for piece in pieces]

    def read_whole(self, p: nn.Parameter) -> tuple[Tensor, dict[str, Tensor]]:
        """(parameter, what the optimizer keeps for it), gathered on every rank."""
        _, state = self._pieces()[0]
        kept = {key: safe_get_full_optimizer_state(p, key) if value.dim() else value for key, value in state.items()}
        return safe_get_full_fp32_param(p), kept

    def write_whole(self, p: nn.Parameter, whole: Tensor, kept: dict[str, Tensor]) -> None:
        """The inverse of read_whole(). What is absent from `kept` becomes zero, as before the first step."""
        for piece, state in self._pieces():  # none yet in a process that has not done a step
            for key, value in kept.items():
                if not value.dim():
                    state[key] = value.clone()
                elif key not in state:
                    state[key] = torch.zeros_like(piece)
            for key in state.keys() - kept.keys():
                state[key].zero_()
        moments = {key: value for key, value in kept.items() if value.dim()}
        if self.stage == 3:
            size = p.ds_tensor.numel()

            def share(tensor: Tensor) -> Tensor:
                padded = F.pad(tensor.flatten(), (0, size * self.world_size - tensor.numel()))
                return padded[size * self.global_rank :][:size]

            safe_set_local_fp32_param(p, share(whole))
            for key, value in moments.items():
                safe_set_local_optimizer_state(p, share(value), key)
            with deepspeed.zero.GatheredParameters([p], modifier_rank=0):
                p.copy_(whole)
            return
        p.copy_(whole)
        safe_set_full_fp32_param(p, whole)
        if moments:
            self.deepspeed_engine.optimizer._lazy_init_hp_params_optimizer_state()  # as after the first step
        for key, value in moments.items():
            safe_set_full_optimizer_state(p, value, key)


def _gather_to_accumulate(p: nn.Parameter):
    """The node of autograd that adds to p.grad, which from now on finds p whole, also when its gradient comes while p is shared out.

    Stage 3 has a parameter whole only while its module runs. The gradient of a row in chunks (src/infctx.py) comes after that, and autograd
    compares its shape with the parameter's: with that of a node's making, which is kept for this, and when it adds.
    """
    missing = []

    def gather(*_) -> None:
        if p.ds_status == ZeroParamStatus.NOT_AVAILABLE:
            p.all_gather()
            missing.append(True)

    def release(*_) -> None:
        if missing:
            missing.clear()
            p.partition()

    with gathered([p]):
        accumulator = p.expand_as(p).grad_fn.next_functions[0][0]
    accumulator.register_prehook(gather)
    accumulator.register_hook(release)
    return accumulator


def gathered(parameters: list[nn.Parameter]):
    """Context in which every rank sees these parameters whole, whatever the stage."""
    return deepspeed.zero.GatheredParameters(parameters)
