"""Short trainings of one model, which show what a learning rate is worth.

Each has the same start and the same batches. There is no trainer around them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch

import rwkv_miss
from rwkv_miss.progress import progress

from .. import ops
from ..config import Config
from ..data.batches import Batches, collate, make_schedule
from ..data.dataset import Documents
from ..data.held_out import evaluation_batches
from ..model import RWKV
from ..model.batch_loss import batch_loss
from ..planning.step import chunks_of, half_of
from .optimizer import learning_rate_factor, parameter_groups, state_learning_rate


@dataclasses.dataclass(frozen=True)
class Trial:
    """A training at one rate."""

    rate: float
    losses: list[float]  # of each step, nats per trained token, up to the first that is not finite
    # on other documents after the last step; None where that was not reached, or this loss is not finite
    held_out: float | None

    @property
    def last(self) -> float:
        """The mean loss of the last tenth of the steps."""
        tail = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(tail) / len(tail)


def trials(
    model: RWKV,
    config: Config,
    documents: Documents,
    held_out: Documents,
    steps: int,
    setting: str,
    rates: list[float],
) -> Iterator[Trial]:
    """A training of so many steps for each rate, which is the value of `setting`, "lr_init" or "state_lr".
    The model ends as it began.
    """
    start = {name: tensor.clone() for name, tensor in _changing(model).items()}
    for rate in rates:
        try:
            losses = train(model, dataclasses.replace(config, **{setting: rate}), documents, steps)
            held = held_out_loss(model, config, held_out) if math.isfinite(losses[-1]) else math.nan
        finally:
            for name, tensor in _changing(model).items():
                tensor.copy_(start[name])
        yield Trial(rate, losses, held if math.isfinite(held) else None)


def _changing(model: RWKV) -> dict[str, torch.Tensor]:
    """What a training may change, without its gradients.

    That is the trained parameters, and the buffers in which methods keep what they derive.
    """
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {**trained, **dict(model.named_buffers())}


def train(model: RWKV, config: Config, documents: Documents, steps: int) -> list[float]:
    """The losses of train.py's optimizer steps with these settings, in this process.

    They end with the first that is not finite.
    """
    schedule = make_schedule(documents, config, 1)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = parameter_groups(
        model, config.lr_init, config.weight_decay, state_learning_rate(config), config.lr_map
    )
    optimizer = torch.optim.AdamW(
        groups, lr=config.lr_init, betas=(config.beta1, config.beta2), eps=config.adam_eps
    )
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(config, steps))
    batches = iter(Batches(documents, schedule, steps, 0))
    losses: list[float] = []
    model.train()
    with ops.nan_passes():
        for step in progress(range(steps), f"training at {config.lr_init:g}", unit="steps"):
            optimizer.zero_grad()
            loss = 0.0
            for micro in range(schedule.accumulate):
                seed = schedule.seed_of(step, micro, 0)
                loss += _backward(model, config, next(batches), seed, schedule.accumulate)
            losses.append(loss)
            if not math.isfinite(losses[-1]):
                break
            rwkv_miss.before_step(model, step + 1, steps)
            if config.grad_clip:
                torch.nn.utils.clip_grad_norm_(trained, config.grad_clip)
            optimizer.step()
            rate.step()
            rwkv_miss.after_step(model, step + 1, steps)
    optimizer.zero_grad()
    return losses


def _backward(model: RWKV, config: Config, batch: dict, seed: int, accumulate: int) -> float:
    """Add a micro-batch's gradients; its share of the step's loss."""
    torch.manual_seed(seed)
    loss = batch_loss(
        model, _on_device(batch, model), chunks_of(config), half_of(config), batch["width"]
    ) / max(batch["step_targets"], 1)
    penalty = rwkv_miss.penalty(model)
    (loss if penalty is None else loss + penalty / accumulate).backward()
    return float(loss.detach())


@torch.no_grad()
def held_out_loss(model: RWKV, config: Config, held_out: Documents) -> float:
    """The loss over the trained tokens of the documents, nats per token."""
    model.eval()
    with ops.nan_passes():
        total = sum(
            float(batch_loss(model, _on_device(collate(batch, 1), model), chunks_of(config), half_of(config)))
            for batch in progress(evaluation_batches(held_out, config), "validation", unit="batches")
        )
    return total / held_out.targets


def _on_device(batch: dict, model: RWKV) -> dict:
    device = model.emb.weight.device
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
