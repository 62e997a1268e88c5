"""RWKV's chat template: `User: ...`, a blank line, `Assistant: ...`; turns are separated by a blank line."""

from __future__ import annotations

import re
from typing import NamedTuple

ROLES = {"system": "System", "user": "User", "assistant": "Assistant"}
TURN_END = "\n\n"
STOP = TURN_END + "User:"


class Segment(NamedTuple):
    """A piece of a document, tokenised on its own, and whether the loss is taken on it."""

    text: str
    trained: bool


def clean(text: str) -> str:
    """What a user or system turn may hold: no blank line, because that ends a turn; runs of newlines become one."""
    return re.sub(r"\n{2,}", "\n", text.replace("\r\n", "\n")).strip()


def prompt(messages: list[dict]) -> str:
    """The text before an answer: all turns and then `Assistant:`. The answer starts with a space, as its first token does in training."""
    turns = [f"{ROLES[m['role']]}: {clean(m['content']) if m['role'] != 'assistant' else m['content'].strip()}" for m in messages]
    return TURN_END.join([*turns, "Assistant:"])


def render(messages: list[dict]) -> list[Segment]:
    """A conversation as segments; the assistant's words, and the blank line that ends its turn, are trained.

    Tokenising segment by segment gives the same tokens as chat does, where the prompt is tokenised before the answer exists.
    """
    segments: list[Segment] = []
    waiting: list[dict] = []
    for message in messages:
        if message["role"] != "assistant":
            waiting.append(message)
            continue
        if segments:
            segments.append(Segment(TURN_END, True))
        segments.append(Segment(prompt(waiting), False))
        segments.append(Segment(" " + message["content"].strip(), True))
        waiting = []
    return segments
