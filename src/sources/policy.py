"""Policy: the model in training, for calls by a run's processes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..common.batch import Batch
from ..distributed.process_group import ALONE, Processes
from ..model import RWKV
from ..model.batch_loss import Chunks


@dataclasses.dataclass(frozen=True)
class Policy:
    """Model in training, for calls by all processes at once."""

    log_probs: Callable[[Batch], Tensor]  # a batch on the device -> ln p of its trained tokens, (n,)
    processes: Processes
    model: RWKV
    whole: nn.Module  # the model as the run's strategy wraps it
    device: torch.device

    def undisturbed(self) -> contextlib.AbstractContextManager[None]:
        """Use the model during its training, as in undisturbed()."""
        return undisturbed(self.whole, self.device)


def policy_of(model: RWKV, chunks: Chunks, processes: Processes = ALONE) -> Policy:
    """Make the policy of a model that each process has whole, and that no trainer runs."""

    def log_probs(batch: Batch) -> Tensor:
        return chunks.log_probs(model, batch)

    return Policy(log_probs, processes, model, model, model.emb.weight.device)


@contextlib.contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Use a model during its training, without dropout and gradients.

    Afterwards everything is as before, also the random numbers.
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
