"""OpenAI's JSON objects for an answer, whole or in chunks."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from ..data.tokenizer import BROKEN, ByteTokenizer, Tokenizer
from ..inference.prompt_logprobs import ScoredToken
from ..inference.sampling import Drawn
from .chat_text import Delta
from .replies import Usage
from .spelling import Spelled


class Envelope:
    """Common part of all objects of one request. `kind` is the whole reply's `object`.

    All parts of a stream have a usage if the last one tells it.
    """

    def __init__(self, prefix: str, kind: str, model: str, fingerprint: str, says_usage: bool):
        self.kind, self.says_usage = kind, says_usage
        self.common = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def whole(self, choices: list[dict], usage: Usage) -> dict[str, Any]:
        return {"object": self.kind, **self.common, "choices": choices, "usage": usage_object(usage)}

    def chunk(self, choices: list[dict], usage: dict | None = None) -> dict[str, Any]:
        """Make a part of a stream."""
        kind = "chat.completion.chunk" if self.kind == "chat.completion" else self.kind
        extra = {"usage": usage} if self.says_usage else {}
        return {"object": kind, **self.common, "choices": choices, **extra}


def usage_object(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.answer,
        "total_tokens": usage.prompt + usage.answer,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }


def message_object(delta: Delta) -> dict[str, Any]:
    """Make the whole answer of a chat."""
    message: dict[str, Any] = {"role": "assistant", "content": delta.content, "refusal": None}
    if delta.thoughts:
        message["reasoning_content"] = delta.thoughts
    if delta.calls:
        message["content"] = delta.content or None
        message["tool_calls"] = calls_object(delta.calls)
    return message


def delta_object(delta: Delta) -> dict[str, Any]:
    """Make a part of an answer of a chat; {} if it has nothing."""
    parts: dict[str, Any] = {}
    if delta.thoughts:
        parts["reasoning_content"] = delta.thoughts
    if delta.content:
        parts["content"] = delta.content
    if delta.calls:
        calls = calls_object(delta.calls)
        parts["tool_calls"] = [{"index": i, **call} for i, call in enumerate(calls)]
    return parts


def calls_object(calls: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"id": f"call_{secrets.token_hex(12)}", **call} for call in calls]


class TokenNames:
    """Token names for OpenAI's objects."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def text(self, token: int) -> str:
        return self.tokenizer.decode([token])

    def name(self, token: int) -> str:
        """Return the token's text, or its bytes if it is no whole characters, as other tokens' text is
        equal."""
        text = self.text(token)
        if BROKEN not in text:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.bytes_of(token))

    def bytes_of(self, token: int) -> list[int]:
        """Return the token's own bytes, which may be half a character."""
        if isinstance(self.tokenizer, ByteTokenizer):
            return list(self.tokenizer.table[token])
        return list(self.text(token).encode("utf-8"))

    def chat(self, tokens: Sequence[Spelled]) -> dict[str, Any]:
        """Make the `logprobs` of a chat's answer, whose content the tokens spell."""
        content = []
        for text, data, token in ((one.text, one.bytes, one.token) for one in tokens):
            top = [
                {"token": self.text(other), "logprob": _finite(logprob), "bytes": self.bytes_of(other)}
                for other, logprob in token.likeliest
            ]
            own = {"token": text, "logprob": _finite(token.logprob), "bytes": data}
            content.append({**own, "top_logprobs": top})
        return {"content": content, "refusal": None}

    def completion(self, tokens: Sequence[Spelled], count: int) -> dict[str, Any]:
        """Make the `logprobs` of a completion, whose text the tokens spell, with `count` of the likeliest."""
        return {
            "tokens": [one.text for one in tokens],
            "token_logprobs": [one.token.logprob and _finite(one.token.logprob) for one in tokens],
            "top_logprobs": [self._top(one.token, count) for one in tokens],
            "text_offset": [one.begin for one in tokens],
        }

    def _top(self, token: Drawn | ScoredToken, count: int) -> dict[str, float] | None:
        """Name the likeliest tokens and the token itself; None for the first one of a prompt."""
        if token.logprob is None:
            return None
        top: dict[str, float] = {}
        for other, logprob in (*token.likeliest[:count], (token.token, token.logprob)):
            top.setdefault(self.name(other), _finite(logprob))  # two tokens of a file may have one text
        return top

    def prompt(self, scores: Sequence[ScoredToken], count: int) -> list[dict[str, Any] | None]:
        """Make `prompt_logprobs` as vLLM does: of each token and of the `count` likeliest in its place."""
        return [None if one.logprob is None else self._ranked(one, count) for one in scores]

    def _ranked(self, one: ScoredToken, count: int) -> dict[str, Any]:
        likeliest = enumerate(one.likeliest[:count], 1)
        found = {one.token: (one.rank, one.logprob)} | {
            token: (rank, logprob) for rank, (token, logprob) in likeliest
        }
        return {
            str(token): {"logprob": _finite(logprob), "rank": rank, "decoded_token": self.text(token)}
            for token, (rank, logprob) in found.items()
        }


def _finite(logprob: float) -> float:
    """Bound ln p: JSON has no -inf; OpenAI writes this number for a practically impossible token."""
    return max(float(logprob), -9999.0)
