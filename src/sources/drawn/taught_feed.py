"""The batches of on-policy distillation: drawn answers, with the teacher's entries for each token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...common.batch import Batch
from ..reference_model import LiveTeacher
from .feed import RolloutFeed


class TaughtFeed(RolloutFeed):
    """Feed of all drawn answers. The teacher reads a micro-batch when its turn comes, so that only its inputs
    of the head are in memory."""

    def __init__(self, *drawn: Any, teacher: LiveTeacher):
        super().__init__(*drawn)
        self.teacher = teacher

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            yield self.teacher.with_entries(batch)
