"""State of a training, from which a run resumes: the trained tensors, and the optimizer's state.

They are whole, and the same under every strategy. The order of the data, the learning rate and the random
numbers are functions of the step, so they need not be kept, and a checkpoint does not depend on how many
processes wrote it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from ..common.moments import packed, unpacked


def read_state(trainer: pl.Trainer) -> Iterator[tuple[str, Tensor]]:
    """Yield every trained parameter as NAME, the optimizer's tensors for it as NAME:exp_avg etc., and
    buffers.

    All ranks must walk through it, because ZeRO gathers on the way; all of them see whole tensors, one at a
    time.
    """
    model = trainer.lightning_module.model
    for name, p in model.named_parameters():
        if p.requires_grad:
            whole, kept = _read(trainer, p)
            yield name, whole
            for key, value in kept.items():
                yield f"{name}:{key}", value
    yield from _buffers(model)


@torch.no_grad()
def write_state(trainer: pl.Trainer, state: Mapping[str, Tensor]) -> None:
    """Put the tensors of read_state() back into the model and the optimizer, on every rank."""
    model = trainer.lightning_module.model
    kept: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        owner, _, key = name.partition(":")
        kept.setdefault(owner, {})[key] = tensor
    for name, p in model.named_parameters():
        if p.requires_grad:
            _write(trainer, p, kept[name].pop(""), kept[name])
    if hasattr(trainer.strategy, "deepspeed_engine"):
        trainer.strategy.pack_moments()
    for name, buffer in _buffers(model):
        buffer.copy_(state[name])


def _buffers(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers to save: the others follow from them and from the parameters."""
    saved = model.state_dict().keys()
    return ((name, buffer) for name, buffer in model.named_buffers() if name in saved)


def _read(trainer: pl.Trainer, p: torch.nn.Parameter) -> tuple[Tensor, dict[str, Tensor]]:
    """Return (parameter, its optimizer state), whole."""
    if hasattr(trainer.strategy, "deepspeed_engine"):
        return trainer.strategy.read_whole(p)
    moments = unpacked(trainer.optimizers[0].state.get(p, {}))
    return p.detach(), {key: value.view_as(p) if value.dim() else value for key, value in moments.items()}


def _write(trainer: pl.Trainer, p: torch.nn.Parameter, whole: Tensor, kept: dict[str, Tensor]) -> None:
    if hasattr(trainer.strategy, "deepspeed_engine"):
        trainer.strategy.write_whole(p, whole, kept)
        return
    p.copy_(whole)
    optimizer = trainer.optimizers[0]
    if not isinstance(optimizer, torch.optim.AdamW):
        optimizer.state[p] = packed(kept, p.device)
        return
    # the counter of updates is where AdamW makes it
    counter = p.device if optimizer.param_groups[0]["fused"] else "cpu"
    optimizer.state[p] = {
        key: value.to(p.device if value.dim() else counter, copy=True) for key, value in kept.items()
    }


def whole_gradient(trainer: pl.Trainer, p: torch.nn.Parameter) -> Tensor | None:
    """Return the gradient of the coming step, over all micro-batches and ranks, before clipping.

    It is whole, and the same on every rank.
    """
    if hasattr(trainer.strategy, "deepspeed_engine"):
        return trainer.strategy.whole_gradient(p)
    return p.grad


def gradient_norm(trainer: pl.Trainer) -> Tensor | float:
    """Compute the gradient norm of the step that was just made; not finite if the gradient was not.

    On a GPU it stays there. It is 0 if loss scaling checks that itself.
    """
    if hasattr(trainer.strategy, "deepspeed_engine"):
        return trainer.strategy.deepspeed_engine.get_global_grad_norm()
    if isinstance(trainer.precision_plugin, MixedPrecision):
        return 0.0
    return trainer.lightning_module.gradient_norm
