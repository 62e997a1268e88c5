"""Short trainings of one model, which compare learning rates.

Each has the same start and the same batches. There is no trainer around them, and one process does them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from rwkv_miss.around_steps import AroundSteps
from rwkv_miss.progress import progress

from .. import ops
from ..common.batch import Batch
from ..data.batches import Schedule, make_schedule
from ..data.examples import Examples
from ..data.held_out import evaluation_batches
from ..model import RWKV
from ..sources.base import Source, TrainingData
from ..sources.policy import policy_of
from .optimizer import adamw, learning_rate_factor, parameter_groups

INITIAL_SCALE = 1024.0  # for losses in fp16: from 65536 a short run would spend its first steps on a search


@dataclasses.dataclass(frozen=True)
class Trial:
    """Training at one rate."""

    rate: float
    losses: list[float]  # loss of each step, nats per trained token, up to the first that is not finite
    # after the last step, on the documents that decide between rates; None: the step was not reached, or the
    # loss is not finite
    deciding_loss: float | None

    @property
    def last(self) -> float:
        """Mean loss of the last tenth of the steps."""
        tail = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(tail) / len(tail)


def judge_of(source: Source) -> Source:
    """Return the source with the loss that decides between rates."""
    return source.having(loss=source.loss.judge())


def trials(
    model: RWKV,
    source: Source,
    documents: Examples,
    held_out: Examples,
    steps: int,
    setting: str,
    rates: list[float],
) -> Iterator[Trial]:
    """Train for `steps` steps at each rate, the value of `setting`, "lr_init" or "state_lr". The loss
    afterwards is that of judge_of(). The model ends as it began."""
    judge = judge_of(source)
    for rate in rates:
        tried = source.having(dataclasses.replace(source.config, **{setting: rate}))
        with put_back(model):
            watched = progress(train(model, tried, documents, steps), f"training at {rate:g}", steps, "steps")
            trial = trial_of(model, judge, rate, list(watched), held_out)
        yield trial


def trial_of(model: RWKV, source: Source, rate: float, losses: list[float], documents: Examples) -> Trial:
    """Describe the training with these losses, whose end the model is in. Its loss on `documents` decides."""
    loss = held_out_loss(model, source, documents) if math.isfinite(losses[-1]) else math.nan
    return Trial(rate, losses, loss if math.isfinite(loss) else None)


def with_reference(
    model: RWKV, source: Source, documents: Examples, held_out: Examples, schedule: Schedule, steps: int
) -> tuple[Examples, Examples]:
    """Return (documents, held_out) with the reference model's values, if the loss needs them."""
    shared = source.prompt_reading(documents, schedule, model.arch).shared
    data, policy = TrainingData(documents, held_out, held_out), policy_of(model, source.chunks)
    found = source.with_reference(data, schedule, steps, policy, shared)
    return found.documents, found.evaluated


@contextlib.contextmanager
def put_back(model: RWKV):
    """Undo a training after the block: the model and the random numbers are restored."""
    # in main memory: a GPU that is full with a run has no room for it
    start = {name: tensor.to("cpu", copy=True) for name, tensor in _changing(model).items()}
    device = model.emb.weight.device
    modes = {module: module.training for module in model.modules()}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            for name, tensor in _changing(model).items():
                tensor.copy_(start[name])
            for module, mode in modes.items():
                module.training = mode


def _changing(model: RWKV) -> dict[str, Tensor]:
    """Return what a training may change, without its gradients.

    These are the trained parameters, and the buffers of values that methods derive.
    """
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {**trained, **dict(model.named_buffers())}


def train(model: RWKV, source: Source, documents: Examples, steps: int) -> Iterator[float]:
    """Do train.py's optimizer steps; yields the loss of each, up to the first that is not finite."""
    config = source.config
    schedule = make_schedule(documents, config, 1, source.schedule_type)
    trained, around = [p for p in model.parameters() if p.requires_grad], AroundSteps(model)
    rate = config.lr_init
    factors = config.lr_map
    groups = parameter_groups(model, rate, config.weight_decay, config.state_learning_rate, factors)
    optimizer = adamw(groups, config, rate)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(config, rate, steps))
    device = model.emb.weight.device
    scaler = torch.amp.GradScaler(device.type, init_scale=INITIAL_SCALE, enabled=config.precision == "fp16")
    shared = source.prompt_reading(documents, schedule, model.arch).shared
    policy = policy_of(model, source.chunks)
    feed = source.feed(TrainingData(documents), schedule, range(steps), policy, shared)
    batches = iter(feed)
    model.train()
    with ops.nan_passes():
        for step in range(steps):
            optimizer.zero_grad()
            total = torch.zeros((), dtype=torch.float64, device=device)
            entries = feed.before_step()
            for micro in range(schedule.accumulate):
                torch.manual_seed(schedule.seed_of(step, micro, 0))
                batch = next(batches).having(**entries)
                total += _backward(model, source, batch, around, schedule.accumulate, scaler)
            loss = float(total)
            if not math.isfinite(loss):
                yield loss
                break
            scaler.unscale_(optimizer)
            around.before(step + 1, steps)
            if config.grad_clip:
                torch.nn.utils.clip_grad_norm_(trained, config.grad_clip)
            scaler.step(optimizer)
            scaler.update()
            rates.step()
            around.after(step + 1, steps)
            yield loss
    optimizer.zero_grad()


def _backward(
    model: RWKV,
    source: Source,
    batch: Batch,
    around: AroundSteps,
    shares: int,
    scaler: torch.amp.GradScaler,
) -> Tensor:
    """Backpropagate a micro-batch; return its part of the loss that reports show. `shares`: micro-batches in
    the step."""
    batch = batch.to(model.emb.weight.device)
    total, metrics = source.loss(model, batch, source.chunks)
    weight = batch.step_weight or 1.0
    loss = total / weight
    penalty = around.penalty()
    scaler.scale(loss if penalty is None else loss + penalty / shares).backward()
    return (source.loss.reported(total, metrics) / weight).double()


@torch.no_grad()
def held_out_loss(model: RWKV, source: Source, held_out: Examples) -> float:
    """Compute the loss over the documents' trained tokens, nats per token; of preferences, per example."""
    model.eval()
    device, config = model.emb.weight.device, source.config
    sizes = (config.ctx_len, config.micro_bsz, config.random_seed)

    def batches(documents: Examples) -> Iterator[Batch]:
        collate = documents.collator(source.chunks.size)
        for rows in progress(evaluation_batches(documents, *sizes), "validation", unit="batches"):
            yield collate(rows, 1).to(device)

    total = torch.zeros((), dtype=torch.float64, device=device)
    with ops.nan_passes():
        entries = source.before_evaluation(held_out, batches, policy_of(model, source.chunks))
        for batch in batches(held_out):
            total += source.loss.held_out(model, batch.having(**entries), source.chunks)[0]
    return float(total) / held_out.weight
