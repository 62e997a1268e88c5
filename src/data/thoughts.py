"""Where the thoughts of an answer stand in its text: --think_weight."""

from __future__ import annotations

import re

# the end of a prompt that has opened the tag, or begun to; two characters may stand in it, as in `<think>嗯`
OPENED = re.compile(r"<(?:t|th|thi|thin|think(?:>[^\s<✿]{0,2})?\s*)?$")
CLOSED = re.compile(r"<think>(.*?)</think>", re.DOTALL)
BEGUN = re.compile(r"\s*<think>")


def thought_spans(before: str, text: str) -> list[tuple[int, int]]:
    """Beginnings and ends, in characters of `text`, of what stands between <think> and </think>.

    The tag may be opened by the end of the text `before`, which asks for the answer. Thoughts that the answer
    begins with and never closes last until its end.
    """
    opened = OPENED.search(before)
    lead = opened[0] if opened else ""
    whole = lead + text
    spans = [match.span(1) for match in CLOSED.finditer(whole)]
    begun = BEGUN.match(whole)
    if begun and not spans:
        spans = [(begun.end(), len(whole))]
    return [(max(begin - len(lead), 0), end - len(lead)) for begin, end in spans]
