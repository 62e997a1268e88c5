"""Reward `math_verify`, in a process of its own (reward_functions.py).

SymPy may take hours, or all memory, for a model's text. In its own process it is ended after
--reward_timeout.
"""

from __future__ import annotations

# mathematics.py of this folder: `src.evaluation.mathematics` would need the repository on the path
from mathematics import require_math_verify, same_mathematics

require_math_verify()  # imports SymPy, which takes a second that must not count for the first group


def math_verify(prompt: str, answers: list[str], right: str) -> list[bool]:
    """Tell whether each answer has the mathematics of the reference answer."""
    return [same_mathematics(answer, right) for answer in answers]
