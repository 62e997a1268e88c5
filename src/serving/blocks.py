"""Answer as a list of blocks, which the newer APIs have: thoughts, then text, then calls."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterator
from typing import Any

from .chat_text import ChatText
from .errors import wrong
from .fields import Fields
from .openai_choices import join_deltas
from .replies import Reply
from .request_parsing import ParsedChat
from .worker import Piece


def refuse_n_and_logprobs(fields: Fields) -> None:
    """Raise Refused for what a list of blocks has no place for."""
    fields.integer("n", 1, 1)
    for name in ("logprobs", "top_logprobs", "prompt_logprobs"):
        if fields.take(name) not in (None, False, 0):
            raise wrong(name, "/v1/chat/completions gives log-probabilities; leave it out here")


@dataclasses.dataclass
class AnswerBlock:
    """Part of an answer, which grows until the next one begins."""

    kind: str  # thoughts, text or call
    index: int
    name: str  # name of the function that is called
    text: str = ""  # the arguments, if the block is a call
    key: str = dataclasses.field(default_factory=lambda: secrets.token_hex(12))  # for ids


class BlockReply(Reply):
    """Reply in blocks. An API says with which events a block begins, grows and ends."""

    end = b""

    def __init__(self, parsed: ParsedChat):
        self.parsed = parsed
        self.key = secrets.token_hex(12)
        self.text = ChatText(parsed.template, parsed.tools)
        self.blocks: list[AnswerBlock] = []
        self.finish = self.stop = ""

    def begun(self, block: AnswerBlock) -> Iterator[dict[str, Any]]:
        """Yield the events of a block that has no text yet."""

    def grown(self, block: AnswerBlock, text: str) -> Iterator[dict[str, Any]]:
        """Yield the events of new text."""

    def ended(self, block: AnswerBlock) -> Iterator[dict[str, Any]]:
        """Yield the events of a block that is complete."""

    def take(self, piece: Piece) -> None:
        for _ in self.events(piece):
            pass

    def events(self, piece: Piece) -> Iterator[dict[str, Any]]:
        deltas = [self.text.push(piece.text)]
        if piece.finish:
            deltas.append(self.text.finish())
        thoughts, content, calls = join_deltas(deltas)
        yield from self._add("thoughts", thoughts)
        yield from self._add("text", content)
        for call in calls:
            yield from self._begin("call", call["function"]["name"])
            yield from self._add("call", call["function"]["arguments"])
        if piece.finish:
            if not self.blocks:  # clients read the first one
                yield from self._begin("text")
            self.finish, self.stop = piece.finish, piece.stop
            yield from self.ended(self.blocks[-1])

    def _begin(self, kind: str, name: str = "") -> Iterator[dict[str, Any]]:
        if self.blocks:
            yield from self.ended(self.blocks[-1])
        self.blocks.append(AnswerBlock(kind, len(self.blocks), name))
        yield from self.begun(self.blocks[-1])

    def _add(self, kind: str, text: str) -> Iterator[dict[str, Any]]:
        if not text:
            return
        if not self.blocks or self.blocks[-1].kind != kind:
            yield from self._begin(kind)
        self.blocks[-1].text += text
        yield from self.grown(self.blocks[-1], text)
