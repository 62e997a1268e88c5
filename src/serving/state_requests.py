"""Requests that make a state: from a file, or from a conversation, which the engine reads as a prompt."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from ..inference.engine import Request
from .errors import Refused, wrong
from .fields import Fields
from .messages import read_messages
from .replies import Usage, WholeReply
from .request_parsing import Chosen, ParsedRequest, RequestReader, chat_tokens
from .states import States
from .think_modes import read_mode
from .tools import read_tools
from .worker import Piece

# The next message of a conversation: the state holds the tokens that do not depend on it. Words that begin
# with a letter and with a sign show what a token may take along.
NEXT = [{"role": role, "content": words} for role in ("user", "assistant") for words in ("a", '"')]


@dataclasses.dataclass(frozen=True)
class ParsedState(ParsedRequest):
    """Request for the state after a conversation."""

    messages: list[dict[str, Any]]
    tokens: list[int]  # tokens of the whole conversation, including those of the state that it goes on from


class ParsedFile(NamedTuple):
    """Request for the state of a file."""

    file: str
    chosen: Chosen
    ignored: list[str]  # fields that nobody has read


def read_state(reader: RequestReader, body: dict[str, Any]) -> ParsedState | ParsedFile:
    """Read a request to /v1/states. Raises Refused."""
    fields = Fields(body)
    chosen = reader.find(fields)
    if not (file := fields.text("file")):
        return _read_conversation(reader, fields, chosen)
    if fields.take("messages") is not None:
        raise wrong("file", "both file and messages tell the state; give one of them")
    return ParsedFile(file, chosen, fields.ignored())


def _read_conversation(reader: RequestReader, fields: Fields, chosen: Chosen) -> ParsedState:
    state = reader.states.find(fields, chosen.fingerprint)
    template, tools = read_mode(fields, chosen.template), read_tools(fields)
    messages = [*state.messages, *read_messages(fields)]
    tokens = _tokens_before_others(
        messages, lambda messages: chat_tokens(reader, chosen, template, tools, messages)
    )
    request = Request(
        state.rest(tokens), max_tokens=0, applied=chosen.applied, start=state.state, keep_state=True
    )
    return ParsedState(
        chosen, [request], False, False, fields.ignored(), messages, tokens, state_tokens=len(state.tokens)
    )


def _tokens_before_others(messages: list[dict], encode: Callable[[list[dict]], list[int]]) -> list[int]:
    """Encode the beginning that a conversation of these messages has, however it goes on."""
    conversations, refusal = [], None
    for message in NEXT:
        try:
            conversations.append(encode([*messages, message]))
        except Refused as refused:  # a template may want the roles in turn
            refusal = refused
    if not conversations:
        raise refusal
    return os.path.commonprefix(conversations)


class StateReply(WholeReply):
    """Reply with the state that a request made; its answer has no token."""

    def __init__(self, parsed: ParsedState, states: States):
        self.parsed, self.states = parsed, states

    def take(self, piece: Piece) -> None:
        self.state = piece.state

    def whole(self, usage: Usage) -> dict[str, Any]:
        parsed, chosen = self.parsed, self.parsed.chosen
        state = self.states.keep(chosen.id, chosen.fingerprint, parsed.messages, parsed.tokens, self.state)
        return state.as_object()
