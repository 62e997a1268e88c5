"""KTO's baseline: how far the model has moved from the reference on answers that belong to other prompts.

It is one number for an optimizer step: the mean of ln p - ln ref of an answer over the step's mismatched
units, of all ranks and micro-batches, not below 0. A pass without gradient before the step makes it. So it
does not depend on how the step is cut up.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

from ...data.batches import Batches, Schedule
from ...data.collate import to_device
from ...data.preferences import Preferences
from ..policy import Policy


class StepBaseline:
    """The baselines of `steps` (0-based), in order.

    `others` are the mismatched units of the run's, at the same places.
    """

    def __init__(
        self,
        others: Preferences,
        schedule: Schedule,
        steps: range,
        chunk: int,
        policy: Policy,
    ):
        # the same units in each step, and rows of other lengths
        schedule = dataclasses.replace(schedule, lengths=schedule.rows.sums(others.lengths - 1))
        self.accumulate = schedule.accumulate
        self.batches = iter(Batches(others, schedule, steps.stop, policy.processes.rank, steps.start, chunk))
        self.policy = policy

    def next(self) -> Tensor:
        """That of the next step, a scalar in fp32. Dropout and gradients are to be off."""
        batches = itertools.islice(self.batches, self.accumulate)
        on_device = (to_device(batch, self.policy.device) for batch in batches)
        return baseline(on_device, self.policy)


def baseline(batches: Iterable[dict], policy: Policy) -> Tensor:
    """The baseline of this process's batches of mismatched units and of all others', a scalar in fp32."""
    sums = torch.zeros(2, dtype=torch.float64, device=policy.device)
    for batch in batches:
        found = policy.log_probs(batch)  # also without units: all ranks do the same operations
        if len(batch["chosen"]):
            sums[0] += (found - batch["reference"]).double().sum()
            sums[1] += len(batch["chosen"])
    moved, answers = policy.processes.total(sums)
    return (moved / answers.clamp(min=1)).clamp(min=0).float()
