"""samples.jsonl: now and then the rollouts of one question, as they were rewarded."""

from __future__ import annotations

import os
from typing import Any

from lightning.pytorch.callbacks import Callback

from ...common.files import append_line, read_lines, write_lines
from ...common.formatting import both_ends
from ...data.held_out import SAMPLE_CHARACTERS
from ...evaluation.rewards import Failed
from . import SAMPLES

LINES = 20  # approximate number in a run


class SampleWriter(Callback):
    """One line each time: the first group of the first process's newest rollout phase.

    {"step", "prompt", "right", "answers": [{"answer", "tokens", "cut", "reward", "reward_NAME",
    "advantage"}]}

    Where the rewards of the group failed, "failed" says why, and its answers have no rewards. Without
    --rewards none has.
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


def is_due(step: int, total: int, inner_steps: int) -> bool:
    """Tell whether the rollouts of this step are written down: the first, the last, and some in between."""
    phase, phases = (step - 1) // inner_steps, -(-total // inner_steps)
    if (step - 1) % inner_steps:
        return False
    return phase % max(1, phases // LINES) == 0 or phase == phases - 1


def sample_line(step: int, group, names: tuple[str, ...]) -> dict[str, Any]:
    """Make the line of a sampled group, whose rewards have these names."""
    line: dict[str, Any] = {
        "step": step,
        "prompt": both_ends(group.question.prompt, SAMPLE_CHARACTERS),
        "right": both_ends(str(group.question.answer), SAMPLE_CHARACTERS),
    }
    answers = [
        {
            "answer": both_ends(answer.text, SAMPLE_CHARACTERS),
            "tokens": len(answer.tokens),
            "cut": answer.cut,
        }
        for answer in group.answers
    ]
    if isinstance(group.scored, Failed):
        return line | {"failed": group.scored.reason, "answers": answers}
    for number, answer in enumerate(answers if names else ()):
        answer["reward"] = float(group.scored.total[number])
        for name, value in zip(names, group.scored.values[number].tolist(), strict=True):
            answer[f"reward_{name}"] = value
        answer["advantage"] = float(group.advantages[number])
    return line | {"answers": answers}
