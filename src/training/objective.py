"""What a training makes small: the one place that the steps, the evaluations and the trials ask for it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..config import Config
from ..model import RWKV
from ..model.batch_loss import Chunks, batch_loss
from ..model.grpo_loss import GrpoLoss
from ..model.log_probs import token_log_probs
from ..model.preference_loss import PreferenceLoss
from ..planning.step import chunks_of
from .process_group import ALONE, Processes

AnswersLoss = PreferenceLoss | GrpoLoss  # of ln p of the tokens of answers, and a batch of them
NO_METRICS = torch.zeros(0, dtype=torch.float64)


def objective(
    model: RWKV,
    batch: dict,
    chunks: Chunks,
    answers_loss: AnswersLoss | None,
    keep: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss of a batch, summed over what its step's weight counts; sums of the metrics beside it).

    Without `answers_loss` it is the weighted cross entropy over the trained tokens, and there are no
    metrics. With it the sums are float64, as its means() takes them, and `keep` gets ln p of the trained
    tokens, (n,). The batch's `width` is the length of the longest row that any rank has in its batch.
    """
    if answers_loss is None:
        return batch_loss(model, batch, chunks, batch["width"]), NO_METRICS
    log_probs = token_log_probs(model, batch, chunks, batch["width"])
    if keep:
        keep(log_probs.detach())
    return answers_loss(log_probs, batch)


@dataclasses.dataclass(frozen=True)
class Policy:
    """The model that a run trains, as its processes ask it. They all ask at once."""

    log_probs: Callable[[dict], Tensor]  # a batch on the device -> ln p of its trained tokens, (n,)
    processes: Processes
    device: torch.device


def policy_of(model: RWKV, config: Config, processes: Processes = ALONE) -> Policy:
    """A model that each process has whole, and that no trainer runs."""
    chunks = chunks_of(config)

    def log_probs(batch: dict) -> Tensor:
        return token_log_probs(model, batch, chunks, batch["width"])

    return Policy(log_probs, processes, model.emb.weight.device)


@contextlib.contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Context for a look at a model during its training: without dropout and gradients.

    Afterwards everything is as before, the random numbers too.
    """
    modes = {module: module.training for module in model.modules()}
    gpus = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(gpus):
        for module in modes:
            module.training = False
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
