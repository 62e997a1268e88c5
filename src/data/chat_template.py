"""What a chat template is: it turns a conversation into pieces of text, each trained or not."""

from __future__ import annotations

import re
from typing import NamedTuple, Protocol


class Segment(NamedTuple):
    """A piece of a document, tokenised on its own, and whether the loss is taken on it."""

    text: str
    trained: bool


class Template(Protocol):
    """`record` is what a checkpoint's metadata keep of it, `name` is for people; `stop` is the text that ends
    an answer, where the end of document does not; `opening` is what the answer in a chat begins with, though
    it is not generated.
    """

    name: str
    record: str
    stop: str
    opening: str

    def segments(
        self, messages: list[dict], tools: list[dict] | None = None, ask: bool = False
    ) -> list[Segment]:
        """The conversation, the assistant's turns trained; `ask`: with the words at its end after which an
        answer follows.

        Raises UserError for a conversation that the template has no form for.
        """

    def next_turn(self, messages: list[dict], new: list[dict]) -> list[str] | None:
        """The pieces between the last answer in `messages` and the next one, given the turns in between; None
        where the template changes earlier turns when new ones follow, so that only the whole conversation
        will do.
        """


def is_trained(message: dict) -> bool:
    """OpenAI's files have `"weight": 0` in an answer that is there as context only."""
    return message.get("weight") != 0


def clean(text: str) -> str:
    """What a turn other than the assistant's may hold: no blank line, because that ends a turn; runs of
    newlines become one.
    """
    return re.sub(r"\n{2,}", "\n", text.replace("\r\n", "\n")).strip()


def thoughts_of(message: dict) -> tuple[str, str]:
    """(thoughts, content) of an assistant's message, stripped."""
    content = (message.get("content") or "").strip()
    thoughts = (message.get("reasoning_content") or message.get("reasoning") or "").strip()
    if not thoughts and content.startswith("<think>") and "</think>" in content:
        thoughts, _, content = (
            part.strip() for part in content.removeprefix("<think>").partition("</think>")
        )
    return thoughts, content
