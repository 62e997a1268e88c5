"""Lightning's DeepSpeed strategy, also on a machine with only CPUs (gloo), with the model's own dtypes."""

from __future__ import annotations

from typing import NamedTuple

import deepspeed.ops
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.runtime.zero import partition_parameters
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_set_full_fp32_param,
    safe_set_local_fp32_param,
)
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn

from ..common.freed_memory import return_large_blocks
from ..common.moments import packed, unpacked
from ..common.zero_sizes import SIZES


class KeepDtypes(DeepSpeedPrecision):
    """Precision that casts nothing: Lightning's modes would give a bf16 base and fp32 adapters one dtype."""

    def __init__(self):
        super().__init__("32-true")

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module

    def convert_input(self, data):
        return data

    def backward(self, tensor, model, optimizer, *args, **kwargs) -> None:
        # Lightning has divided the loss by the number of micro-batches already. DeepSpeed would do it again.
        # Adam hides that, but gradient clipping does not.
        super().backward(tensor, model, optimizer, *args, scale_wrt_gas=False, **kwargs)


class Works:
    """Several operations under way, as one handle."""

    def __init__(self, works: list):
        self.works = works

    def wait(self) -> None:
        for work in self.works:
            work.wait()


def gather_by_broadcasts(share: Tensor, whole: Tensor, group=None) -> Works:
    """Do DeepSpeed's all-gather of a parameter by broadcasts.

    gloo's own all-gather takes the memory of `whole` once more, and three times as long.
    """
    parts = whole.chunk(dist.get_world_size(group))
    parts[dist.get_rank(group)].copy_(share)
    return Works([dist.broadcast(part, source, group, async_op=True) for source, part in enumerate(parts)])


class RankShare(NamedTuple):
    """Place of a rank's share of a parameter."""

    piece: int  # number in AnywhereDeepSpeed._pieces()
    start: int  # place in the piece
    begin: int  # place in the flat parameter
    size: int


class AnywhereDeepSpeed(DeepSpeedStrategy):
    """`DeepSpeedStrategy` that also accepts the CPU accelerator.

    `name` is deepspeed_stage_1, _2 or _3, with _offload after it or not. Under stage 3 the model may be
    mapped from its file, in the file's dtypes. Each process keeps its share of every tensor; frozen tensors
    are cast to `dtype`. Apart from its shares a process holds at most one whole tensor.
    `accelerator` is cpu or gpu.
    """

    def __init__(self, name: str, micro_bsz: int, dtype: torch.dtype, accelerator: str):
        self.stage, self.dtype = int(name.removesuffix("_offload")[-1]), dtype
        config = {
            "zero_optimization": zero_settings(self.stage, name.endswith("_offload"), accelerator),
            "zero_allow_untested_optimizer": True,
            # torch's AdamW runs on the CPU too, and needs no compiler
            "zero_force_ds_cpu_optimizer": False,
            "train_micro_batch_size_per_gpu": micro_bsz,
            "steps_per_print": 10**9,
            "wall_clock_breakdown": False,
        }
        super().__init__(config=config, precision_plugin=KeepDtypes())

    @property
    def _on_cpu(self) -> bool:
        return isinstance(self.accelerator, CPUAccelerator)

    def setup_environment(self) -> None:
        if not self._on_cpu:
            return super().setup_environment()
        # gloo is enough; DeepSpeed would compile a shared-memory all-reduce, for about a minute
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        partition_parameters._dist_allgather_fn = gather_by_broadcasts
        super(DeepSpeedStrategy, self).setup_environment()  # skips only the CUDA-only check

    def setup_distributed(self) -> None:
        if not self._on_cpu:
            return super().setup_distributed()
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        # DeepSpeed wants a device *index*
        return torch.device("cpu", 0) if self._on_cpu else super().root_device

    def _setup_model(self, model: nn.Module) -> nn.Module:
        """Share out the model, tensor by tensor, under stage 3.

        Left to DeepSpeed, all of it would be on every device first.
        """
        if self.stage < 3:
            return model
        if self._on_cpu:
            return_large_blocks()
        # the empty module makes DeepSpeed replace F.linear by its own, whose backward gathers the weight
        # again instead of keeping it
        shares = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=self.config)
        for p in model.parameters():
            # A copy in any case: DeepSpeed writes to it. Pages of a mapped file that are written to stay in
            # memory.
            p.data = p.data.to(torch.float32 if p.requires_grad else self.dtype, copy=True)
            shares._convert_to_zero_parameters([p])
        for buffer in model.buffers():
            buffer.data = buffer.data.to(self.root_device)
        return model

    def setup(self, trainer) -> None:
        super().setup(trainer)
        if self.stage == 3:
            for module in self.model.modules():
                # a parameter of another module that this one reads is gathered with its own
                for p in getattr(module, "external_parameters", list)():
                    deepspeed.zero.register_external_parameter(module, p)
            trained = [p for p in self.model.parameters() if p.requires_grad]
            self._accumulators = [_gather_to_accumulate(p) for p in trained]

    def _pieces(self) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Return this rank's share of the trained parameters: flat fp32 tensors with their optimizer
        state."""
        zero = self.deepspeed_engine.optimizer
        if self.stage == 3:
            pieces = zero.fp32_partitioned_groups_flat
        else:
            pieces = zero.single_partition_of_fp32_groups
        return [(piece, zero.optimizer.state[piece]) for piece in pieces]

    def _share(self, p: nn.Parameter) -> RankShare:
        """Find this rank's share of a trained parameter."""
        zero = self.deepspeed_engine.optimizer
        if self.stage == 3:
            piece, start, size = zero.grad_position[zero.get_param_id(p)]
            begin = min(size * self.global_rank, p.ds_numel)
            return RankShare(piece, start, begin, min(size, p.ds_numel - begin))
        link = p._hp_mapping
        if link is None:
            return RankShare(0, 0, 0, 0)
        in_piece, in_parameter = link.hp_fragment_address, link.lp_fragment_address
        return RankShare(link.param_group_index, in_piece.start, in_parameter.start, in_piece.numel)

    def whole_gradient(self, p: nn.Parameter) -> Tensor | None:
        """Gather the gradient that the next optimizer step will use on every rank."""
        return safe_get_full_grad(p)

    def read_whole(self, p: nn.Parameter) -> tuple[Tensor, dict[str, Tensor]]:
        """Gather (parameter, its moments) on every rank."""
        whole, share = safe_get_full_fp32_param(p), self._share(p)
        _, state = self._pieces()[share.piece]
        kept = {}
        for key, value in unpacked(state, share.start, share.size).items():
            if value.dim():
                part, value = value, torch.zeros_like(whole)
                value.view(-1)[share.begin :][: share.size] = part
                dist.all_reduce(value)
            kept[key] = value
        return whole, kept

    def write_whole(self, p: nn.Parameter, whole: Tensor, kept: dict[str, Tensor]) -> None:
        """Invert read_whole(); pack_moments() follows after the last parameter.

        Without `kept` there is no state, as before the first step.
        """
        for piece, state in self._pieces():
            if not kept or "state1" in state:
                state.clear()
            for key, value in kept.items():
                if not value.dim():
                    state[key] = value.clone()
                elif key not in state:
                    # Packed moments are for where memory is tight.
                    state[key] = torch.zeros_like(piece, device="cpu" if self._packs else None)
        share = self._share(p)
        _, state = self._pieces()[share.piece]
        for key, value in kept.items():
            if value.dim():
                state[key][share.start :][: share.size] = value.flatten()[share.begin :][: share.size]
        if self.stage == 3:
            size = p.ds_tensor.numel()
            padded = F.pad(whole.flatten(), (0, size * self.world_size - whole.numel()))
            safe_set_local_fp32_param(p, padded[size * self.global_rank :][:size])
            with deepspeed.zero.GatheredParameters([p], modifier_rank=0):
                p.copy_(whole)
        else:
            p.copy_(whole)
            safe_set_full_fp32_param(p, whole)

    @property
    def _packs(self) -> bool:
        return not isinstance(self.deepspeed_engine.optimizer.optimizer, torch.optim.AdamW)

    def pack_moments(self) -> None:
        """Pack the moments that write_whole() has written, for an optimizer that keeps them in 8 bits."""
        zero = self.deepspeed_engine.optimizer
        for piece, state in self._pieces() if self._packs else ():
            zero.optimizer.state[piece] = packed(state, piece.device)
        zero._hp_optimizer_states_linked = False  # stage 1 and 2 would keep views of the state before


def zero_settings(stage: int, offload: bool, accelerator: str) -> dict[str, object]:
    """Build ZeRO's settings, with small buckets.

    With the default of 5e8 elements stage 3 gathers a whole frozen base at once.
    """
    sizes, gloo = SIZES[accelerator], accelerator == "cpu"
    zero: dict[str, object] = {
        "stage": stage,
        "contiguous_gradients": True,
        # DeepSpeed's default; gloo sends nothing while something is computed
        "overlap_comm": stage == 3 and not gloo,
        "reduce_bucket_size": sizes.bucket,
        "allgather_bucket_size": sizes.bucket,
    }
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": sizes.ahead,
            "stage3_max_live_parameters": sizes.live,
            "stage3_max_reuse_distance": sizes.live,
            "stage3_param_persistence_threshold": sizes.kept_whole,
        }
        # Not in the oldest versions. It writes tensors to their places one after the other, without a bucket
        # between; NCCL is faster with few large messages.
        if gloo and "allgather_sequential" in DeepSpeedZeroConfig.model_fields:
            zero["stage3_allgather_sequential"] = True
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    return zero


def _gather_to_accumulate(p: nn.Parameter):
    """Return autograd's node that adds to p.grad; it gathers p first, if p is shared out.

    Stage 3 has a parameter whole only while its module runs. The gradient of a row in chunks
    (src/model/batch_loss.py) comes after that. Autograd compares its shape with the parameter's twice: with
    the shape when the node was made, so the node is kept, and with the shape when it adds.
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
    """Show every rank these parameters whole inside the block, whatever the stage."""
    return deepspeed.zero.GatheredParameters(parameters)
