"""Callback that writes samples.jsonl (sample_log.py)."""

from __future__ import annotations

import os

from lightning.pytorch.callbacks import Callback

from ...common.files import append_line, read_lines, write_lines
from .samples import SAMPLES, is_due, sample_line


class SampleWriter(Callback):
    """One line each time: the first group of the first process's newest rollout phase.

    {"step", "prompt", "right", "answers": [{"answer", "tokens", "cut", "reward", "reward_NAME",
    "advantage"}]}

    Where the rewards of the group failed, "failed" says why, and its answers have no rewards.
    """

    def __init__(self, folder: str):
        self.path = os.path.join(folder, SAMPLES)

    def on_train_start(self, trainer, module) -> None:
        if trainer.is_global_zero:
            # a resumed run does the steps after its checkpoint again
            write_lines(self.path, read_lines(self.path, trainer.global_step))

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        step = trainer.global_step
        if not trainer.is_global_zero or (index + 1) % module.accumulate:
            return
        if is_due(step, module.total_steps, module.config.inner_steps) and module.feed.first_group:
            append_line(self.path, sample_line(step, module.feed.first_group, module.data.rewards.names))
