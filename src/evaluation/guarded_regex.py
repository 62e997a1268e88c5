"""Reward `regex`, in a process of its own (reward_functions.py).

A regular expression may take exponential time on a model's text. In its own process it is ended after
--reward_timeout.
"""

from __future__ import annotations

import re


def regex(prompt: str, answers: list[str], pattern: str) -> list[bool]:
    """Tell whether the pattern is found anywhere in each answer."""
    return [re.search(pattern, answer) is not None for answer in answers]
