"""Sharded tensors: each process has a part, as under torch's fully_shard() (FSDP2).

Every process must call the functions that gather or write. Nothing is imported from torch.distributed before
a tensor is sharded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from .errors import UserError


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether this process has a part of the tensor only."""
    return hasattr(tensor, "full_tensor")  # only a DTensor has this method


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process has."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    """Return the whole tensor, on every process."""
    if not is_sharded(tensor):
        return tensor
    return tensor.detach().to(tensor.device_mesh.device_type).full_tensor()  # shards may be off the device


def put(tensor: Tensor, value: Tensor) -> None:
    """Write a value, the same on every process, into a tensor that may be sharded."""
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        mesh = tensor.device_mesh
        value = distribute_tensor(value.to(mesh.device_type), mesh, tensor.placements)
    local(tensor).copy_(local(value))


@contextlib.contextmanager
def unsharded(layer: nn.Module) -> Iterator[None]:
    """Make a layer's own parameters whole tensors inside the block; afterwards shard their values again."""
    shards = {name: p for name, p in layer._parameters.items() if p is not None and is_sharded(p)}
    for name, p in shards.items():
        layer._parameters[name] = nn.Parameter(gathered(p), p.requires_grad)
    try:
        yield
    finally:
        values = {name: layer._parameters[name].detach() for name in shards}
        layer._parameters.update(shards)
    for name, p in shards.items():
        put(p.detach(), values[name])


def class_of(model: nn.Module) -> type[nn.Module]:
    """Return the model's class as it was before fully_shard(), which gives a module a class of its own."""
    return next(kind for kind in type(model).__mro__ if not hasattr(kind, "reshard"))


def reshard(model: nn.Module) -> None:
    """Shard parameters that a module keeps gathered after a forward: values written there would be lost."""
    for module in model.modules():
        if hasattr(module, "reshard"):  # only an FSDPModule has this method
            module.reshard()


def require_whole(model: nn.Module) -> None:
    """Raise UserError for trained parameters that DeepSpeed's ZeRO-3 has shared out: they are empty here."""
    for name, p in model.named_parameters():
        if p.requires_grad and hasattr(p, "ds_id") and not p.numel():
            raise UserError(
                f"{name} is shared out by ZeRO-3; call this on every process inside"
                " deepspeed.zero.GatheredParameters([p for p in model.parameters() if p.requires_grad],"
                " modifier_rank=0), which saves from rank 0 and loads on all"
            )
