"""KTO's baseline: how far the model has moved from the reference on answers to other prompts.

It is one number for an optimizer step: the mean of ln p - ln ref of an answer over the step's mismatched
examples, of all ranks and micro-batches, not below 0. A pass without gradient before the step computes it.
So it does not depend on the step's micro-batches.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...common.batch import Batch
from ...data.batches import Batches, Schedule
from ..base import Feed
from ..policy import Policy


class WithBaseline(Feed):
    """Micro-batches with the baseline of their step, a scalar in fp32."""

    def __init__(self, batches: Batches, schedule: Schedule, steps: range, policy: Policy, chunk: int):
        super().__init__(batches, schedule)
        others = batches.documents.others
        # each step has the examples of the trained step, in rows of other lengths
        lengths = dataclasses.replace(schedule, lengths=schedule.rows.sums(others.lengths - 1))
        self.others = iter(Batches(others, lengths, steps.stop, policy.processes.rank, steps.start, chunk))
        self.policy = policy

    def before_step(self) -> dict[str, Any]:
        mismatched = itertools.islice(self.others, self.schedule.accumulate)
        on_device = (batch.to(self.policy.device) for batch in mismatched)
        with self.policy.undisturbed():
            return {"baseline": baseline(on_device, self.policy)}


def baseline(batches: Iterable[Batch], policy: Policy) -> Tensor:
    """Compute the baseline of the mismatched examples of all processes, a scalar in fp32."""
    sums = torch.zeros(2, dtype=torch.float64, device=policy.device)
    for batch in batches:
        log_probs = policy.log_probs(batch)  # also without examples: all ranks run the same operations
        if len(batch.chosen):
            sums[0] += (log_probs - batch.reference).double().sum()
            sums[1] += len(batch.chosen)
    moved, answers = policy.processes.total(sums)
    return (moved / answers.clamp(min=1)).clamp(min=0).float()
