"""Answers of one request as OpenAI's choices, in a stream or whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .chat_text import ChatText, Delta
from .errors import Refused
from .openai_objects import Envelope, TokenNames, delta_object, message_object, usage_object
from .replies import Reply, Usage
from .request_parsing import ParsedChat, ParsedCompletion, ParsedRequest
from .spelling import Spelled, Spelling, spelled_prompt
from .worker import Piece


class Choices(Reply):
    """Choices of an answer: first_choices() and next_choices() of a stream, all_choices() of a whole one."""

    prefix = kind = ""
    end = b"data: [DONE]\n\n"

    def __init__(self, parsed: ParsedRequest, names: TokenNames):
        self.names, self.parsed = names, parsed
        self.envelope = Envelope(
            self.prefix, self.kind, parsed.model, parsed.chosen.fingerprint, parsed.usage
        )

    def first(self) -> Iterator[dict[str, Any]]:
        return (self.envelope.chunk([choice]) for choice in self.first_choices())

    def first_choices(self) -> Iterator[dict[str, Any]]:
        return iter(())

    def events(self, piece: Piece) -> Iterator[dict[str, Any]]:
        return (self.envelope.chunk([choice]) for choice in self.next_choices(piece))

    def last(self, usage: Usage) -> Iterator[dict[str, Any]]:
        if self.envelope.says_usage:
            yield self.envelope.chunk([], usage_object(usage))

    def whole(self, usage: Usage) -> dict[str, Any]:
        return self.envelope.whole(self.all_choices(), usage) | self.extra()

    def error(self, refused: Refused) -> dict[str, Any]:
        return refused.as_object()

    def extra(self) -> dict[str, Any]:
        """Return further fields of the reply, next to "choices"."""
        return {}


class ChatChoices(Choices):
    """Choices of a chat."""

    prefix, kind = "chatcmpl", "chat.completion"

    def __init__(self, parsed: ParsedChat, names: TokenNames):
        super().__init__(parsed, names)
        count = parsed.requests[0].n
        self.wants_logprobs = parsed.requests[0].logprobs is not None
        self.texts = [ChatText(parsed.template, parsed.tools) for _ in range(count)]
        self.drawn = [Spelling(names.tokenizer, with_bytes=True) for _ in range(count)]
        self.said: list[list[Delta]] = [[] for _ in range(count)]
        self.logprobs: list[list[Spelled]] = [[] for _ in range(count)]
        self.finish = [""] * count
        self.prompt_logprobs: Sequence[Any] = ()

    def first_choices(self) -> Iterator[dict[str, Any]]:
        for index in range(len(self.texts)):
            yield self._choice(index, {"role": "assistant", "content": ""})

    def take(self, piece: Piece) -> tuple[Delta, list[Spelled]]:
        """Take a piece: what it adds to its answer, and the tokens of that."""
        index, text = piece.index, self.texts[piece.index]
        deltas = [text.push(piece.text)]
        if piece.finish:
            deltas.append(text.finish())
            self.finish[index] = "tool_calls" if deltas[-1].calls else piece.finish
        self.prompt_logprobs = piece.prompt_logprobs or self.prompt_logprobs
        self.drawn[index].push(piece.drawn)
        drawn = self.drawn[index].take(*text.span(), bool(piece.finish))
        delta = join_deltas(deltas)
        self.said[index].append(delta)
        self.logprobs[index] += drawn
        return delta, drawn

    def next_choices(self, piece: Piece) -> Iterator[dict[str, Any]]:
        delta, drawn = self.take(piece)
        parts = delta_object(delta)
        if parts or drawn:
            yield self._choice(piece.index, parts, self._logprobs(drawn))
        if piece.finish:
            yield self._choice(piece.index, {}, None, self.finish[piece.index])

    def all_choices(self) -> list[dict[str, Any]]:
        return [
            {
                "index": index,
                "message": message_object(join_deltas(deltas)),
                "logprobs": self._logprobs(self.logprobs[index]),
                "finish_reason": self.finish[index],
            }
            for index, deltas in enumerate(self.said)
        ]

    def extra(self) -> dict[str, Any]:
        if (count := self.parsed.requests[0].prompt_logprobs) is None:
            return {}
        return {"prompt_logprobs": self.names.prompt(self.prompt_logprobs, count)}

    def _logprobs(self, tokens: list[Spelled]) -> dict[str, Any] | None:
        return self.names.chat(tokens) if self.wants_logprobs else None

    @staticmethod
    def _choice(index: int, delta: dict, logprobs: Any = None, finish: str | None = None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


class TextChoices(Choices):
    """Choices of a completion."""

    prefix = "cmpl"
    kind = "text_completion"

    def __init__(self, parsed: ParsedCompletion, names: TokenNames):
        super().__init__(parsed, names)
        self.count = parsed.requests[0].logprobs
        each = range(parsed.requests[0].n)
        self.prompts = [prompt for prompt in parsed.prompts for _ in each]
        self.echoes = [prompt.text if parsed.echo else "" for prompt in self.prompts]
        count = len(self.prompts)
        self.drawn = [Spelling(names.tokenizer, False, len(echo)) for echo in self.echoes]
        self.texts, self.finish = [""] * count, [""] * count
        self.logprobs: list[list[Spelled]] = [[] for _ in range(count)]
        self.prompt_logprobs: list[Sequence[Any]] = [()] * count
        self.begun = [False] * count

    def take(self, piece: Piece) -> tuple[str, list[Spelled]]:
        """Take a piece: what it adds to its answer, and the tokens of that."""
        index, text, tokens = piece.index, piece.text, []
        echo, spelling = self.echoes[index], self.drawn[index]
        if not self.begun[index]:
            self.begun[index], self.prompt_logprobs[index] = True, piece.prompt_logprobs
            text = echo + text
            if self.parsed.echo and self.count is not None:
                in_text = piece.prompt_logprobs[self.prompts[index].begin :]
                tokens = spelled_prompt(self.names.tokenizer, in_text, echo)
        self.texts[index] += text
        spelling.push(piece.drawn)
        tokens += spelling.take(len(echo), len(self.texts[index]), bool(piece.finish), with_end=True)
        self.logprobs[index] += tokens
        if piece.finish:
            self.finish[index] = piece.finish
        return text, tokens

    def next_choices(self, piece: Piece) -> Iterator[dict[str, Any]]:
        text, tokens = self.take(piece)
        if text or piece.finish or tokens:
            yield self._choice(piece.index, text, self._logprobs(tokens), piece.finish or None)

    def all_choices(self) -> list[dict[str, Any]]:
        choices = []
        for index, text in enumerate(self.texts):
            choice = self._choice(index, text, self._logprobs(self.logprobs[index]), self.finish[index])
            if (count := self.parsed.prompt_logprobs) is not None:
                choice["prompt_logprobs"] = self.names.prompt(self.prompt_logprobs[index], count)
            choices.append(choice)
        return choices

    def _logprobs(self, tokens: list[Spelled]) -> dict[str, Any] | None:
        return None if self.count is None else self.names.completion(tokens, self.count)

    @staticmethod
    def _choice(index: int, text: str, logprobs: Any = None, finish: str | None = None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


def join_deltas(deltas: Sequence[Delta]) -> Delta:
    return Delta(
        "".join(delta.thoughts for delta in deltas),
        "".join(delta.content for delta in deltas),
        [call for delta in deltas for call in delta.calls],
    )
