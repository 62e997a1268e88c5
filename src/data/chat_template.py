"""Interface of a chat template: it turns a conversation into pieces of text, each with a weight in the
loss."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol


class Segment(NamedTuple):
    """Piece of a document, tokenised on its own, and the weight of its tokens in the loss; 0: none."""

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


# The weight of an answer without a loss: a zero like that of prompts. Its sign tells it from theirs under
# --prompt_weight, which gives prompts a loss.
CONTEXT = -0.0


class Template(Protocol):
    """Chat template: turns a conversation into segments, for training and for a chat."""

    name: str  # for people
    record: str  # the form in a checkpoint's metadata
    stops: tuple[str, ...]  # the texts that end an answer, where the end of document does not
    turn_end: str  # the text that ends every turn, also the last one
    opening: str  # the beginning of an answer in a chat, which is not generated
    # the end of the prompt for an answer, if the template does not write it before an answer without thoughts
    asked_only: str

    def segments(
        self, messages: list[dict], tools: list[dict] | None = None, ask: bool = False
    ) -> list[Segment]:
        """Cut the conversation into segments; the assistant's turns are trained.

        `ask` adds the words after which an answer follows. Raises UserError for a conversation that the
        template has no form for.
        """

    def documents(
        self, messages: list[dict], tools: list[dict] | None = None, token_end: TokenEnd | None = None
    ) -> list[list[Segment]]:
        """Cut the conversation into documents: one, or several if the template rewrites earlier turns.

        Every answer is trained once, as it stands while it is the last. `token_end` knows a text's tokens.
        """

    def next_turn(
        self, messages: list[dict], new: list[dict], tools: list[dict] | None = None
    ) -> list[str] | None:
        """Return the pieces between the last answer in `messages` and the next; `new` are the turns between.

        It is None if the template changes earlier turns when new ones follow. Then the whole conversation has
        to be read again.
        """

    def parse(self, text: str) -> tuple[str, list[dict]]:
        """Parse an answer into (content, tool_calls), the calls as in OpenAI's API; content keeps
        thoughts."""

    def drops_thoughts(self, messages: list[dict], tools: list[dict] | None = None) -> bool:
        """Tell whether the last message, which is an answer, has thoughts that are not written."""


def weight_of(message: dict) -> float:
    """Return an answer's weight in the loss: its `"weight"`, else 1.

    OpenAI's files have 0 for an answer that is only context. That becomes CONTEXT.
    """
    return float(message.get("weight", 1)) or CONTEXT


def before_stops(text: str, stops: Sequence[str]) -> str:
    """Cut the text before the first of the stops in it."""
    places = [text.find(stop) for stop in stops if stop in text]
    return text[: min(places, default=len(text))]


def begins_thoughts(opening: str) -> bool:
    """Tell whether an answer after this opening begins inside thoughts."""
    return "<think" in opening and "</think" not in opening


def clean(text: str) -> str:
    """Remove the blank lines of a turn that is not the assistant's, because a blank line ends a turn."""
    return re.sub(r"\n{2,}", "\n", text.replace("\r\n", "\n")).strip()


def thoughts_of(message: dict) -> tuple[str, str]:
    """Split an assistant's message into (thoughts, content), stripped."""
    content = (message.get("content") or "").strip()
    thoughts = (message.get("reasoning_content") or message.get("reasoning") or "").strip()
    if not thoughts and content.startswith("<think>") and "</think>" in content:
        thoughts, _, content = content.removeprefix("<think>").partition("</think>")
    return thoughts.strip(), content.strip()
