"""Documents and a teacher's values of their trained tokens, as --loss distill reads them.

A pass of the teacher before step 1 (reference_pass.py) finds its likeliest tokens at each trained one. So the
teacher is not in memory during the training, and later runs on the same data need no pass.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from torch import Tensor

from rwkv_miss.files.checkpoint import Arch
from rwkv_miss.merging.rounding import percent

from .. import ops
from ..common.batch import Batch
from ..common.formatting import counted, size_text
from ..data.batches import Schedule
from ..data.examples import Examples
from ..data.held_out import FORWARD
from ..data.reference_values import row_shape, top_tokens
from .base import TrainingData
from .documents import DocumentCost, DocumentSource
from .estimates import Speed, Times
from .policy import Policy
from .reference_model import reference_arch, relative_work
from .reference_pass import ReferencePass, TokenValues, kept_share


class TaughtDocumentCost(DocumentCost):
    """Cost of documents and of the teacher's pass over them."""

    def reference_bytes(self, schedule: Schedule, arch: Arch) -> int:
        return self.source.values(arch).dtype.itemsize * sum(schedule.targets)

    def reference_work(self, arch: Arch, trained: float, held_out: float) -> float:
        return FORWARD * relative_work(self.config.reference, arch) * trained

    def times(
        self, data: TrainingData, arch: Arch, schedule: Schedule, steps: int, evaluations: int, speed: Speed
    ) -> Times:
        times = super().times(data, arch, schedule, steps, evaluations, speed)
        if not times.reference:
            return times
        read = read_documents(data.documents, schedule, steps)
        missing = 1 - kept_share(self.config, self.source.values(arch), read)
        return dataclasses.replace(times, reference=missing * times.reference)


class TaughtDocumentSource(DocumentSource):
    """Documents with the teacher's likeliest tokens at each trained one."""

    cost_type = TaughtDocumentCost

    def values(self, arch: Arch) -> TokenValues:
        """Return the values that the teacher gives: its likeliest tokens."""
        config = self.config
        count, temperature = min(config.distill_top, arch.vocab_size), config.distill_temperature

        def read(policy: Policy, batch: Batch) -> Tensor:
            return self.chunks.top_log_probs(policy.model, batch, count, temperature)

        return TokenValues(top_tokens(count, arch.vocab_size), read, (temperature,), as_in_steps=False)

    def with_reference(
        self, data: TrainingData, schedule: Schedule, steps: int, policy: Policy, shared: bool
    ) -> TrainingData:
        documents, whole = data.documents, steps >= schedule.steps_per_pass
        chosen = np.arange(len(documents)) if whole else documents_of(schedule, steps)
        with policy.undisturbed(), ops.nan_passes():
            teacher = ReferencePass(self, shared, policy, self.values(policy.model.arch))
            values = teacher.part(documents, chosen, "the training data")
        return dataclasses.replace(data, documents=documents.with_reference(values))

    def lines(self, documents: Examples, schedule: Schedule, arch: Arch) -> list[str]:
        config, values = self.config, self.values(arch)
        kept_in = config.proj_dir if config.data_cache == "none" else "--data_cache"
        teacher = reference_arch(config.reference).describe()
        count, size = row_shape(values.dtype)[0] // 2, values.dtype.itemsize
        likeliest = counted(count, "likeliest token")
        fewer = f", fewer than --distill_top {config.distill_top}," if count < config.distill_top else ""
        read = read_documents(documents, schedule, config.total_steps(schedule.steps_per_pass))
        origin = "found once before step 1 and"
        if share := kept_share(config, values, read):
            origin = f"{percent(share)} of them are" if share < 1 else "they are"
        return [
            f"loss       {self.loss.description}",
            f"teacher    {teacher}; its {likeliest} of {arch.vocab_size:,}{fewer} at each trained token take"
            f" {size} bytes, {size_text(size * read.targets)} in all; {origin} kept in {kept_in}",
        ]


SOURCE = TaughtDocumentSource


def read_documents(documents: Examples, schedule: Schedule, steps: int) -> Examples:
    """Return the documents whose values a run of `steps` steps needs."""
    whole = steps >= schedule.steps_per_pass
    return documents if whole else documents.take(documents_of(schedule, steps))


def documents_of(schedule: Schedule, steps: int) -> np.ndarray:
    """Find the documents that `steps` steps of the first pass read, (n,) int64 in ascending order."""
    rows = [row for step in range(steps) for row in schedule.step_rows(step)]
    return np.unique(np.fromiter((i for row in rows for i in schedule.rows[row]), np.int64))
