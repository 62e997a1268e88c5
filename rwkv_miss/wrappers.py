"""Wrapped models: by torch.compile, or for several processes.

Wrappers are recognised by the names of their classes, so that no other package is imported.
"""

from __future__ import annotations

from torch import nn

from .errors import UserError
from .sharding import is_sharded

COMPILED = "OptimizedModule"  # class of torch.compile's wrapper
# class of a wrapper -> its attribute that holds the model
WRAPPERS = {
    COMPILED: "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "DeepSpeedEngine": "module",
}
FSDP1 = "FullyShardedDataParallel"


def unwrapped(model: nn.Module, to_inject: bool = False) -> nn.Module:
    """Return the model inside its wrappers, which may be nested.

    to_inject: raise UserError for a sharded model, and for every wrapper but torch.compile's, because others
    would not see new parameters. FSDP1 always is a UserError: it moves the parameters away.
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
    if to_inject and any(map(is_sharded, model.parameters())):
        raise UserError(
            "the model is sharded already, and would not shard the adapter's parameters; call inject() first,"
            " and fully_shard() after that"
        )
    return model


def injected(model: nn.Module) -> nn.Module:
    """Return the model inside its wrappers. Raises UserError if it carries no adapter."""
    model = unwrapped(model)
    if not hasattr(model, "injection"):
        inside = next((name for name, part in model.named_modules() if hasattr(part, "injection")), "")
        advice = f"its module {inside} does: give model.{inside}" if inside else "call inject() first"
        raise UserError(f"this {type(model).__name__} carries no adapter; {advice}")
    return model
