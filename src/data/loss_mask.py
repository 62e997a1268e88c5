"""Which pieces of a row carry loss: --loss_mask."""

from __future__ import annotations

import re

from .chat_template import Segment, Template
from .rwkv_template import TURN_END

NEXT_TURN = r"(?<=\n\n)(?:System|User|Tool):"


def trains_by_marker(loss_mask: str) -> bool:
    return loss_mask not in ("assistant", "all")


def row_segments(row: dict, template: Template, loss_mask: str) -> list[Segment]:
    """The pieces of a row {"text"}, {"prompt", "completion"} or {"messages", "tools"}.

    `loss_mask`: assistant trains the assistant's turns, completions, and texts as a whole; all trains
    everything; any other text is a marker, such as `Assistant:`, and trains what follows it until the next
    turn (see `marked`), in any kind of row.
    """
    if "messages" in row:
        segments = template.segments(row["messages"], row.get("tools"))
    elif "prompt" in row:
        segments = [Segment(row["prompt"], False), Segment(row["completion"], True)]
    else:
        segments = [Segment(row["text"], True)]
    if loss_mask == "assistant":
        return segments
    if loss_mask == "all":
        return [Segment(text, True) for text, _ in segments]
    return marked("".join(text for text, _ in segments), loss_mask)


def marked(text: str, marker: str) -> list[Segment]:
    """A text cut at a marker: what follows it is trained, until the next `System:`, `User:` or `Tool:` after
    a blank line, or the next marker.

    A marker `START...END` has an end of its own instead. The blank line at the end of a turn is a piece by
    itself, as in a conversation.
    """
    segments: list[Segment] = []
    place = 0
    for begin, end in marked_spans(text, marker):
        segments.append(Segment(text[place:begin], False))
        words = text[begin:end].removesuffix(TURN_END)
        segments += [Segment(words, True), Segment(text[begin + len(words) : end], True)]
        place = end
    segments.append(Segment(text[place:], False))
    return [segment for segment in segments if segment.text]


def marked_spans(text: str, marker: str) -> list[tuple[int, int]]:
    """Beginnings and ends, in characters, of what a marker trains."""
    start, _, end = (part.replace("\\n", "\n") for part in marker.partition("..."))
    after = re.compile(f"{re.escape(end) if end else NEXT_TURN}|{re.escape(start)}")
    spans: list[tuple[int, int]] = []
    place = text.find(start)
    while place >= 0:
        begin = place + len(start)
        found = after.search(text, begin)
        spans.append((begin, found.start() if found else len(text)))
        place = text.find(start, spans[-1][1])
    return spans
