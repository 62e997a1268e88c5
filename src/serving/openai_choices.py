"""Answers of one request as OpenAI's choices, in a stream or whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..data.tokenizer import Tokenizer
from .chat_text import ChatText, Delta
from .openai_objects import TokenNames, delta_object, message_object
from .request_parsing import AskedChat, AskedText
from .worker import Piece


class DrawnInText:
    """Drawn tokens in an answer's text, and the place where each begins.

    The tokens of a stop and of half a character at the end are drawn, but are not in the text.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.decoder = tokenizer.decoder()
        self.end = 0
        self.waiting: list[tuple[int, Any]] = []

    def push(self, drawn: Sequence[Any], length: int) -> list[tuple[int, Any]]:
        """Return (begin, drawn) of those that begin before `length`, the characters of the answer so far."""
        for one in drawn:
            self.waiting.append((self.end, one))
            self.end += len(self.decoder.push(one.token))
        inside = [(begin, one) for begin, one in self.waiting if begin < length]
        self.waiting = self.waiting[len(inside) :]
        return inside


class ChatChoices:
    """Choices of a chat. push() returns a stream's next objects, whole() the complete one."""

    prefix, kind = "chatcmpl", "chat.completion"

    def __init__(self, asked: AskedChat, names: TokenNames):
        self.names = names
        count = asked.requests[0].n
        self.wants_logprobs = asked.requests[0].logprobs is not None
        self.texts = [ChatText(asked.template, asked.tools) for _ in range(count)]
        self.drawn = [DrawnInText(names.tokenizer) for _ in range(count)]
        self.lengths = [0] * count
        self.said: list[list[Delta]] = [[] for _ in range(count)]
        self.logprobs: list[list[Any]] = [[] for _ in range(count)]
        self.finish = [""] * count

    def first(self) -> Iterator[dict[str, Any]]:
        for index in range(len(self.texts)):
            yield self._choice(index, {"role": "assistant", "content": ""})

    def push(self, piece: Piece) -> Iterator[dict[str, Any]]:
        index, text = piece.index, self.texts[piece.index]
        deltas = [text.push(piece.text)]
        if piece.finish:
            deltas.append(text.finish())
            self.finish[index] = "tool_calls" if deltas[-1].calls else piece.finish
        self.lengths[index] += len(piece.text)
        drawn = [one for _, one in self.drawn[index].push(piece.drawn, self.lengths[index])]
        delta = joined(deltas)
        self.said[index].append(delta)
        self.logprobs[index] += drawn
        parts = delta_object(delta)
        if parts or drawn:
            logprobs = self.names.chat(drawn) if self.wants_logprobs else None
            yield self._choice(index, parts, logprobs)
        if piece.finish:
            yield self._choice(index, {}, None, self.finish[index])

    def whole(self) -> list[dict[str, Any]]:
        return [
            {
                "index": index,
                "message": message_object(joined(deltas)),
                "logprobs": self.names.chat(self.logprobs[index]) if self.wants_logprobs else None,
                "finish_reason": self.finish[index],
            }
            for index, deltas in enumerate(self.said)
        ]

    @staticmethod
    def _choice(index: int, delta: dict, logprobs: Any = None, finish: str | None = None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


class TextChoices:
    """Choices of a completion, with the same methods."""

    prefix = "cmpl"
    kind = "text_completion"

    def __init__(self, asked: AskedText, names: TokenNames):
        self.names = names
        self.wants_logprobs = asked.requests[0].logprobs is not None
        self.echoes = [echo for echo in asked.echoes for _ in range(asked.requests[0].n)]
        count = len(self.echoes)
        self.drawn = [DrawnInText(names.tokenizer) for _ in range(count)]
        self.texts, self.finish = [""] * count, [""] * count
        self.logprobs: list[list[Any]] = [[] for _ in range(count)]

    def first(self) -> Iterator[dict[str, Any]]:
        for index, echo in enumerate(self.echoes):
            if echo:
                yield self._choice(index, echo)

    def push(self, piece: Piece) -> Iterator[dict[str, Any]]:
        index = piece.index
        self.texts[index] += piece.text
        drawn = self.drawn[index].push(piece.drawn, len(self.texts[index]))
        self.logprobs[index] += drawn
        if piece.finish:
            self.finish[index] = piece.finish
        if piece.text or piece.finish or drawn:
            yield self._choice(index, piece.text, self._logprobs(index, drawn), piece.finish or None)

    def whole(self) -> list[dict[str, Any]]:
        return [
            self._choice(index, echo + text, self._logprobs(index, self.logprobs[index]), self.finish[index])
            for index, (echo, text) in enumerate(zip(self.echoes, self.texts, strict=True))
        ]

    def _logprobs(self, index: int, drawn: list[tuple[int, Any]]) -> dict[str, Any] | None:
        return self.names.completion(drawn, len(self.echoes[index])) if self.wants_logprobs else None

    @staticmethod
    def _choice(index: int, text: str, logprobs: Any = None, finish: str | None = None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


def joined(deltas: Sequence[Delta]) -> Delta:
    return Delta(
        "".join(delta.thoughts for delta in deltas),
        "".join(delta.content for delta in deltas),
        [call for delta in deltas for call in delta.calls],
    )
