"""samples.jsonl: now and then the rollouts of one question, as they were rewarded."""

from __future__ import annotations

from typing import Any

from ...common.formatting import both_ends
from ...data.held_out import SAMPLE_CHARACTERS
from ...evaluation.rewards import Failed

SAMPLES = "samples.jsonl"
LINES = 20  # approximate number in a run


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
        "right": both_ends(str(group.question.right), SAMPLE_CHARACTERS),
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
    for number, answer in enumerate(answers):
        answer["reward"] = float(group.scored.total[number])
        for name, value in zip(names, group.scored.values[number].tolist(), strict=True):
            answer[f"reward_{name}"] = value
        answer["advantage"] = float(group.advantages[number])
    return line | {"answers": answers}


def answer_text(answer: dict[str, Any]) -> str:
    """Write an answer of a line, in one line: "reward 1, advantage 0.935, 4 tokens: 'abc'"."""
    known = [f"{name} {answer[name]:.3g}" for name in ("reward", "advantage") if name in answer]
    known.append(f"{answer['tokens']} tokens{', cut' if answer['cut'] else ''}")
    return f"{', '.join(known)}: {answer['answer']!r}"
