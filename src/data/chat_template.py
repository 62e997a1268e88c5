"""What a chat template is: it turns a conversation into pieces of text, each with the weight of its loss."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol


class Segment(NamedTuple):
    """A piece of a document, tokenised on its own, and the weight of its tokens in the loss; 0: none."""

    text: str
    weight: float


CHINESE_HM = "嗯"  # with it after the tag, a model thinks in Chinese
_OPENED = rf"think(?:>\s*{CHINESE_HM}?)?\s*"
# the end of a prompt that has opened <think>, also of one that was cut between two tokens of the tag
OPENED_THOUGHTS = re.compile(rf"<(?:t|th|thi|thin|{_OPENED})?$")
# the end of a prompt that an answer begins with: opened thoughts, or empty ones
BEGUN_THOUGHTS = re.compile(rf"<{_OPENED}(?:</think>?\s*)?$")

# (text, place) -> the last place up to `place` where a token of the text ends
TokenEnd = Callable[[str, int], int]


# The weight of an answer that has no loss. It is a zero like that of prompts. --prompt_weight, which gives
# prompts a loss, tells it from theirs by its sign.
CONTEXT = -0.0


class Template(Protocol):
    """Turns a conversation into segments, for training and for a chat."""

    name: str  # for people
    record: str  # what a checkpoint's metadata keep of it
    stops: tuple[str, ...]  # the texts that end an answer, where the end of document does not
    turn_end: str  # the text that ends every turn, also the last one
    opening: str  # what the answer in a chat begins with, though it is not generated
    # the end of what asks for an answer, where the template does not write it before one without thoughts
    asked_only: str

    def segments(
        self, messages: list[dict], tools: list[dict] | None = None, ask: bool = False
    ) -> list[Segment]:
        """The conversation, of which the assistant's turns are trained.

        `ask` adds the words after which an answer follows. Raises UserError for a conversation that the
        template has no form for.
        """

    def documents(
        self, messages: list[dict], tools: list[dict] | None = None, token_end: TokenEnd | None = None
    ) -> list[list[Segment]]:
        """The conversation for training: one document, or several where the template rewrites earlier turns.

        Every answer is trained once, as it stands while it is the last. `token_end` knows the tokens of
        a text.
        """

    def next_turn(
        self, messages: list[dict], new: list[dict], tools: list[dict] | None = None
    ) -> list[str] | None:
        """The pieces between the last answer in `messages` and the next one; `new` are the turns in between.

        None where the template changes earlier turns when new ones follow. Then only the whole conversation
        will do.
        """

    def parse(self, text: str) -> tuple[str, list[dict]]:
        """(content, tool_calls) of an answer, the calls as in OpenAI's API; thoughts stay in the content."""

    def drops_thoughts(self, messages: list[dict], tools: list[dict] | None = None) -> bool:
        """Whether the last message, which is an answer, has thoughts that are not written."""


def weight_of(message: dict) -> float:
    """The weight of an answer in the loss, which is its `"weight"`, else 1.

    OpenAI's files have 0 in an answer that is there as context only. That becomes CONTEXT.
    """
    return float(message.get("weight", 1)) or CONTEXT


def before_stops(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stops that are in it."""
    places = [text.find(stop) for stop in stops if stop in text]
    return text[: min(places, default=len(text))]


def begins_thoughts(opening: str) -> bool:
    """Whether an answer after this opening goes on with thoughts, and not after empty ones."""
    return "<think" in opening and "</think" not in opening


def clean(text: str) -> str:
    """A turn that is not the assistant's, without blank lines, because a blank line ends a turn."""
    return re.sub(r"\n{2,}", "\n", text.replace("\r\n", "\n")).strip()


def thoughts_of(message: dict) -> tuple[str, str]:
    """(thoughts, content) of an assistant's message, stripped."""
    content = (message.get("content") or "").strip()
    thoughts = (message.get("reasoning_content") or message.get("reasoning") or "").strip()
    if not thoughts and content.startswith("<think>") and "</think>" in content:
        thoughts, _, content = content.removeprefix("<think>").partition("</think>")
    return thoughts.strip(), content.strip()
