"""Choice whether the prompt of a pair is read once for both answers."""

from __future__ import annotations

import numpy as np

from ...data.batches import Schedule
from ...data.preferences import Preferences

# Overhead of a pass through the layers, whatever its tokens, in tokens times n_embd. A wider model takes
# longer for a token, but as long for the overhead of each operator. The CPU's number was measured at width
# 96 (docs/speed.md); the GPU's is an estimate from its launches.
PASS_COST = {"cpu": 32_000, "gpu": 2_000_000}
LEAST_GAIN = 1.05  # the least speed-up for which prompts are shared
SAMPLED_STEPS = 32  # number of steps of the first pass that are sampled


def tokens_of_layouts(preferences: Preferences, schedule: Schedule) -> tuple[float, float]:
    """Count the tokens of the mean micro-batch with padding: of separate rows, and with shared prompts."""
    prompts, answers = preferences.prompt_lengths, preferences.answers.lengths - preferences.prompt_lengths
    separate, shared, count = 0, 0, 0
    all_steps = schedule.steps_per_pass
    sampled = np.linspace(0, all_steps - 1, min(SAMPLED_STEPS, all_steps)).astype(int)
    for step in np.unique(sampled).tolist():
        for group in range(schedule.accumulate * schedule.world):
            rows = schedule.micro_rows(step, *divmod(group, schedule.world))
            if not rows:
                continue
            pairs = np.array([example for row in rows for example in schedule.rows[row]])
            separate += len(rows) * max(schedule.lengths[row] for row in rows)
            # an answer's row begins with the last token of its prompt, and ends before its own last one
            longest = max(answers[2 * pairs].max(), answers[2 * pairs + 1].max())
            shared += len(pairs) * (max(1, prompts[2 * pairs].max() - 1) + 2 * longest)
            count += 1
    return separate / count, shared / count
