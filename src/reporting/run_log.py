"""Logs of a run."""

from __future__ import annotations

import json
import os
from typing import NamedTuple

from ..common.files import read_lines
from ..sources.drawn import SAMPLES
from ..training.run_folder import METRICS
from ..training.validation_log import VALIDATION


class RunLog(NamedTuple):
    """Lines of a run's files, up to a step."""

    metrics: list[dict]  # the steps with a loss
    history: list[dict]  # the evaluations
    drawn: list[dict] = []  # groups of answers of a training on rewards

    @classmethod
    def read(cls, folder: str, step: int) -> RunLog:
        """Read the logs of the run in a folder."""
        with open(os.path.join(folder, METRICS), encoding="utf-8") as file:
            metrics = [line for line in map(json.loads, file) if line["loss"] is not None]
        others = (read_lines(os.path.join(folder, name), step) for name in (VALIDATION, SAMPLES))
        return cls(metrics, *others)
