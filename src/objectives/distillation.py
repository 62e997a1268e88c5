"""Distillation: supervised fine-tuning that also brings the model closer to a teacher, --loss distill.

A pass of the teacher before step 1 (reference_pass.py) finds its likeliest tokens at each trained one. So the
teacher is not in memory during the training, and later runs on the same data need no pass. The loss that
reports show is the cross entropy, which can be compared with any other run's; the KL stands beside it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from rwkv_miss.files.checkpoint import Arch
from rwkv_miss.files.hub_names import recorded
from rwkv_miss.merging.rounding import percent

from .. import ops
from ..common.batch import Batch, Reads
from ..common.formatting import counted, size_text
from ..data.batches import Schedule
from ..data.examples import Examples
from ..data.held_out import FORWARD
from ..data.reference_values import row_shape, top_tokens
from ..model import RWKV
from ..model.batch_loss import batch_distillation
from ..model.distillation_loss import Teacher
from ..model.log_probs import top_log_probs
from .base import TrainingData
from .estimates import Speed, Times
from .loss_metrics import Shown
from .policy import Policy
from .reference_model import reference_arch, relative_work
from .reference_pass import ReferencePass, TokenValues, kept_share
from .sft import SUPERVISED, Supervised

DISTILLED = dataclasses.replace(
    SUPERVISED,
    titles={**SUPERVISED.titles, "kl": "KL from the teacher, per token"},
    bar=(Shown(("kl",), lambda nats: f"KL {nats:.3f}"),),
    line=(*SUPERVISED.line, Shown(("kl",), lambda nats: f"KL from the teacher {nats:.4f}")),
)


class Distilled(Supervised):
    """Objective of --loss distill. The loss of held-out documents is the cross entropy alone."""

    metrics = DISTILLED
    called = "teacher"

    def __call__(
        self, model: RWKV, batch: Batch, keep: Callable[[Tensor], None] | None = None
    ) -> tuple[Tensor, Tensor]:
        if batch.teacher is None and not torch.is_grad_enabled():
            return super().__call__(model, batch, keep)
        teacher = Teacher(batch.teacher, self.config.distill_mix, self.config.distill_temperature)
        sums = batch_distillation(model, batch, self.chunks, teacher)
        weights = batch.weights
        count = sums.new_full((1,), batch.targets.numel())
        weight = count if weights is None else weights.sum(0, keepdim=True)
        return sums[0], torch.cat([sums[1:].detach(), weight]).double()

    def reported(self, loss: Tensor, metrics: Tensor) -> Tensor:
        # a batch without a teacher has no metrics, and its loss is the cross entropy
        return metrics[0] if len(metrics) else loss.detach()

    def joined(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def means(self, sums: list[float]) -> dict[str, float]:
        return {"kl": sums[1] / max(sums[2], 1e-30)} if sums else {}

    def reads(self) -> Reads:
        return Reads(("teacher",), teacher=2 * self.config.distill_top + 1)

    def _values(self, arch: Arch) -> TokenValues:
        """Return what the teacher is asked."""
        config = self.config
        count, temperature = min(config.distill_top, arch.vocab_size), config.distill_temperature

        def read(policy: Policy, batch: Batch) -> Tensor:
            return top_log_probs(policy.model, batch, self.chunks, count, temperature)

        return TokenValues(top_tokens(count, arch.vocab_size), read, (temperature,), as_in_steps=False)

    def reference_bytes(self, schedule: Schedule, arch: Arch) -> int:
        return self._values(arch).dtype.itemsize * sum(schedule.targets)

    def reference_work(self, arch: Arch, trained: float, held_out: float) -> float:
        return FORWARD * relative_work(self.config.reference, arch) * trained

    def times(
        self, data: TrainingData, arch: Arch, schedule: Schedule, steps: int, evaluations: int, speed: Speed
    ) -> Times:
        found = super().times(data, arch, schedule, steps, evaluations, speed)
        if not found.reference:
            return found
        asked = asked_of(data.documents, schedule, steps)
        missing = 1 - kept_share(self.config, self._values(arch), asked)
        return dataclasses.replace(found, reference=missing * found.reference)

    def with_reference(
        self, data: TrainingData, schedule: Schedule, steps: int, policy: Policy, shared: bool
    ) -> TrainingData:
        documents, whole = data.documents, steps >= schedule.steps_per_pass
        chosen = np.arange(len(documents)) if whole else documents_of(schedule, steps)
        with policy.undisturbed(), ops.nan_passes():
            teacher = ReferencePass(self, shared, policy, self._values(policy.model.arch))
            values = teacher.part(documents, chosen, "the training data")
        return dataclasses.replace(data, documents=documents.with_reference(values))

    @property
    def description(self) -> str:
        """The loss with its settings: 0.1 x the cross entropy + 0.9 x T^2 x the KL from big.pth, T 2."""
        config = self.config
        teacher, mix = os.path.basename(recorded(config.reference).rstrip("/")), config.distill_mix
        return (
            f"distill, {1 - mix:g} x the cross entropy + {mix:g} x T^2 x the KL from {teacher},"
            f" T {config.distill_temperature:g}"
        )

    def lines(self, documents: Examples, schedule: Schedule, arch: Arch) -> list[str]:
        config, values = self.config, self._values(arch)
        kept_in = config.proj_dir if config.data_cache == "none" else "--data_cache"
        teacher = reference_arch(config.reference).describe()
        count, size = row_shape(values.dtype)[0] // 2, values.dtype.itemsize
        likeliest = counted(count, "likeliest token")
        fewer = f", fewer than --distill_top {config.distill_top}," if count < config.distill_top else ""
        asked = asked_of(documents, schedule, config.total_steps(schedule.steps_per_pass))
        found = "found once before step 1 and"
        if known := kept_share(config, values, asked):
            found = f"{percent(known)} of them are" if known < 1 else "they are"
        return [
            f"loss       {self.description}",
            f"teacher    {teacher}; its {likeliest} of {arch.vocab_size:,}{fewer} at each trained token take"
            f" {size} bytes, {size_text(size * asked.targets)} in all; {found} kept in {kept_in}",
        ]


def asked_of(documents: Examples, schedule: Schedule, steps: int) -> Examples:
    """Return the documents whose values a run of `steps` steps needs."""
    whole = steps >= schedule.steps_per_pass
    return documents if whole else documents.take(documents_of(schedule, steps))


def documents_of(schedule: Schedule, steps: int) -> np.ndarray:
    """Find the documents that `steps` steps of the first pass read, (n,) int64 in ascending order."""
    rows = [row for step in range(steps) for row in schedule.step_rows(step)]
    return np.unique(np.fromiter((i for row in rows for i in schedule.rows[row]), np.int64))
