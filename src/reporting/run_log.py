"""What a run has written down of itself."""

from __future__ import annotations

import json
import os
from typing import NamedTuple

from ..common.files import read_lines
from ..objectives.rewards.samples import SAMPLES
from ..training.run_folder import METRICS
from ..training.validation_log import VALIDATION


class RunLog(NamedTuple):
    """The lines of its files, up to a step."""

    metrics: list[dict]  # of the steps that have a loss
    history: list[dict]  # the evaluations
    drawn: list[dict] = []  # of a training on rewards, groups of answers

    @classmethod
    def read(cls, folder: str, step: int) -> RunLog:
        """That of the run in a folder."""
        with open(os.path.join(folder, METRICS), encoding="utf-8") as file:
            metrics = [line for line in map(json.loads, file) if line["loss"] is not None]
        others = (read_lines(os.path.join(folder, name), step) for name in (VALIDATION, SAMPLES))
        return cls(metrics, *others)
