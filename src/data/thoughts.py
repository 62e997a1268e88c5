"""Thoughts of an answer: their places in its text, for --think_weight."""

from __future__ import annotations

import numpy as np

from .chat_template import OPENED_THOUGHTS

BEGIN, END = "<think>", "</think>"


def thought_spans(before: str, text: str) -> list[tuple[int, int]]:
    """Find beginnings and ends, in characters of `text`, of the thoughts between <think> and </think>.

    The end of the prompt `before` may open the tag. Thoughts at the beginning of an answer that are never
    closed last until its end.
    """
    opened = OPENED_THOUGHTS.search(before)
    lead = opened[0] if opened else ""
    whole = lead + text
    spans: list[tuple[int, int]] = []
    place = 0
    # no regex: one that looks for the end of every tag would take quadratic time on a long text
    while (begin := whole.find(BEGIN, place)) >= 0:
        place = whole.find(END, begin)
        if place < 0:
            if not spans and not whole[:begin].strip():
                spans.append((begin + len(BEGIN), len(whole)))
            break
        spans.append((begin + len(BEGIN), place))
    return [(max(begin - len(lead), 0), end - len(lead)) for begin, end in spans]


def within(begins: np.ndarray, ends: np.ndarray, spans: list[tuple[int, int]]) -> np.ndarray:
    """Tell which tokens lie wholly in one of the spans, (n,) bool; begins, ends: the tokens', (n,)."""
    inside = np.zeros(len(begins), dtype=bool)
    for first, last in spans:
        inside[np.searchsorted(begins, first) : np.searchsorted(ends, last, "right")] = True
    return inside
