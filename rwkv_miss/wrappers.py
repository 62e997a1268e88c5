"""Models as other programs hold them: wrapped for compiling or for several processes.

The wrappers are known by the names of their classes, so that none of these programs is imported.
"""

from __future__ import annotations

from torch import Tensor, nn

from .errors import UserError

COMPILED = "OptimizedModule"  # torch.compile's
# class of a wrapper -> its attribute with the model
WRAPPERS = {
    COMPILED: "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "DeepSpeedEngine": "module",
}
FSDP1 = "FullyShardedDataParallel"


def unwrapped(model: nn.Module, to_inject: bool = False) -> nn.Module:
    """Return the model inside its wrappers, which may be nested.

    to_inject: raise UserError for wrappers that go on with the parameters that they have found, which is all
    but a compiled model. FSDP1 always is a UserError: it moves the parameters away.
    """
    while (inside := WRAPPERS.get(kind := type(model).__name__)) is not None:
        if to_inject and kind != COMPILED:
            raise UserError(
                f"the model is in {kind} already, which would not see the adapter's parameters; call inject()"
                " first, and wrap the model after that"
            )
        model = getattr(model, inside)
    if any(type(module).__name__ == FSDP1 for module in model.modules()):
        raise UserError(
            f"the model is in {FSDP1} (FSDP1), which has moved its parameters into flat tensors; shard it"
            " with torch.distributed.fsdp.fully_shard (FSDP2) instead"
        )
    return model


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether this process has a part of the tensor only, as under fully_shard()."""
    return hasattr(tensor, "full_tensor")
