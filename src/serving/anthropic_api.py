"""Anthropic's Messages API: a request becomes a chat's, and the answer a list of content blocks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from .blocks import AnswerBlock, BlockReply, refuse_n_and_logprobs
from .errors import Refused, client_names, wrong
from .fields import Fields
from .forms import read_format
from .messages import check_call, read_content, read_role
from .replies import Usage
from .request_parsing import ParsedChat, RequestReader, read_chat
from .worker import Piece

# names of a chat's fields -> names of this API
NAMES = {"stop": "stop_sequences", "response_format": "output_config.format", "reasoning_effort": "thinking"}
# Anthropic's efforts -> OpenAI's
EFFORTS = {"low": "low", "medium": "medium", "high": "high", "xhigh": "xhigh", "max": "xhigh"}
CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class BlockNames(NamedTuple):
    """Names of a block's kind in this API."""

    type: str
    field: str  # the key of a block's text
    delta_type: str  # the type of an event with new text
    delta_field: str


KINDS = {
    "thoughts": BlockNames("thinking", "thinking", "thinking_delta", "thinking"),
    "text": BlockNames("text", "text", "text_delta", "text"),
    "call": BlockNames("tool_use", "input", "input_json_delta", "partial_json"),
}


def read_anthropic(reader: RequestReader, body: dict[str, Any]) -> ParsedChat:
    """Read a request to /v1/messages. Raises Refused."""
    fields = Fields(body)
    refuse_n_and_logprobs(fields)
    config, tools = fields.inner("output_config"), fields.objects("tools") or []
    chat_fields = {
        "messages": _messages(fields),
        "stop": fields.take("stop_sequences"),
        "reasoning_effort": _effort(fields, config),
        "response_format": read_format(config.inner("format")) if config else None,
        "tools": [_tool(Fields(tool, f"tools[{i}].")) for i, tool in enumerate(tools)],
        **_choice(fields),
    }
    same_fields = {name: value for name, value in body.items() if name not in fields.seen}
    with client_names(NAMES):
        return read_chat(reader, {**same_fields, **chat_fields})


def _effort(fields: Fields, config: Fields | None) -> str | None:
    """Read how much the model thinks; None leaves it to the template."""
    thinking = fields.inner("thinking")
    kind = thinking and thinking.choice("type", ("enabled", "adaptive", "disabled"))
    effort = config and config.choice("effort", EFFORTS)
    if kind == "disabled":
        return "none"
    return EFFORTS[effort or "medium"] if kind or effort else None


def _choice(fields: Fields) -> dict[str, Any]:
    choice = fields.inner("tool_choice")
    if not choice:
        return {}
    kind = choice.choice("type", (*CHOICES, "tool"))
    function = {"type": "function", "function": {"name": choice.text("name")}}
    return {
        "tool_choice": function if kind == "tool" else CHOICES.get(kind),
        "parallel_tool_calls": not choice.flag("disable_parallel_tool_use"),
    }


def _tool(tool: Fields) -> dict[str, Any]:
    kind = tool.text("type", "custom")
    if kind != "custom":
        raise tool.refuse("type", kind, "custom: this server runs no tools of its own")
    function = {name: tool.take(name) for name in ("name", "description", "strict")}
    function["parameters"] = tool.take("input_schema")
    function = {name: value for name, value in function.items() if value is not None}
    return {"type": "function", "function": function}


def _messages(fields: Fields) -> list[dict[str, Any]]:
    """Read system and messages as the messages of a chat."""
    sent = fields.objects("messages", 1)
    if sent is None:
        raise fields.refuse("messages", None, "a list of at least one message")
    system = read_content(fields, False, "system")
    messages = [{"role": "system", "content": system}] if system else []
    for i, message in enumerate(sent):
        messages += _turns(Fields(message, f"messages[{i}]."))
    if messages[-1]["role"] == "assistant":
        raise wrong("messages", "the last one is the assistant's, and this server begins a new answer")
    return messages


def _turns(fields: Fields) -> list[dict[str, Any]]:
    """Read the content of a message: the results of tools, which are turns of their own, then the rest."""
    role = read_role(fields)
    if not isinstance(fields.take("content"), list):
        return [{"role": role, "content": read_content(fields, True)}]
    results, texts, thoughts, calls = [], [], [], []
    for i, one in enumerate(fields.objects("content")):
        block = Fields(one, f"{fields.within}content[{i}].")
        kind = block.text("type", "text")
        if kind == "tool_result":
            content = read_content(block, False)
            results.append({"role": "tool", "tool_call_id": block.text("tool_use_id"), "content": content})
        elif kind == "tool_use":
            function = {"name": block.text("name"), "arguments": block.take("input")}
            calls.append({"id": block.text("id"), "type": "function", "function": function})
            check_call(calls[-1], block.within.removesuffix("."))
        elif kind == "thinking":
            thoughts.append(block.text("thinking", ""))
        elif kind == "text":
            if block.take("text") is None:
                raise block.refuse("text", None, "a text")
            texts.append(block.text("text"))
        elif kind != "redacted_thinking":
            raise block.refuse("type", kind, "text, thinking, tool_use or tool_result: it reads nothing else")
    turn: dict[str, Any] = {"role": role, "content": "\n".join(texts)}
    if thoughts:
        turn["reasoning_content"] = "\n".join(thoughts)
    if calls:
        turn["tool_calls"] = calls
    return [*results, turn] if texts or thoughts or calls or not results else results


class AnthropicReply(BlockReply):
    """Reply with the content blocks of an answer."""

    has_begun = False

    def first(self) -> Iterator[dict[str, Any]]:
        return iter(())

    def events(self, piece: Piece) -> Iterator[dict[str, Any]]:
        if not self.has_begun:  # only the first piece tells what was cached
            self.has_begun = True
            read = self.parsed.state_tokens
            usage = Usage(read + len(self.parsed.requests[0].tokens), 0, read + piece.cached_tokens)
            yield {"type": "message_start", "message": self._message([], usage)}
        yield from super().events(piece)

    def begun(self, block: AnswerBlock) -> Iterator[dict[str, Any]]:
        content = self._content(block, {} if block.kind == "call" else "")
        yield {"type": "content_block_start", "index": block.index, "content_block": content}

    def grown(self, block: AnswerBlock, text: str) -> Iterator[dict[str, Any]]:
        kind = KINDS[block.kind]
        delta = {"type": kind.delta_type, kind.delta_field: text}
        yield {"type": "content_block_delta", "index": block.index, "delta": delta}

    def ended(self, block: AnswerBlock) -> Iterator[dict[str, Any]]:
        yield {"type": "content_block_stop", "index": block.index}

    def last(self, usage: Usage) -> Iterator[dict[str, Any]]:
        yield {"type": "message_delta", "delta": self._reason(), "usage": _usage(usage)}
        yield {"type": "message_stop"}

    def error(self, refused: Refused) -> dict[str, Any]:
        return refused.as_anthropic()

    def whole(self, usage: Usage) -> dict[str, Any]:
        content = [
            self._content(block, json.loads(block.text) if block.kind == "call" else block.text)
            for block in self.blocks
        ]
        return self._message(content, usage)

    def _message(self, content: list[dict], usage: Usage) -> dict[str, Any]:
        return {
            "id": f"msg_{self.key}",
            "type": "message",
            "role": "assistant",
            "model": self.parsed.model,
            "content": content,
            **self._reason(),
            "usage": _usage(usage),
        }

    def _reason(self) -> dict[str, Any]:
        """Say why the answer has ended."""
        stop = self.stop if self.stop in self.parsed.stops else None
        reasons = {"": None, "length": "max_tokens"}
        reason = reasons.get(self.finish, "stop_sequence" if stop else "end_turn")
        if any(block.kind == "call" for block in self.blocks) and self.finish:
            reason = "tool_use"
        return {"stop_reason": reason, "stop_sequence": stop}

    @staticmethod
    def _content(block: AnswerBlock, value: Any) -> dict[str, Any]:
        kind = KINDS[block.kind]
        content = {"type": kind.type, kind.field: value}
        if block.kind == "thoughts":
            content["signature"] = ""  # nothing here could be forged
        elif block.kind == "call":
            content |= {"id": f"toolu_{block.key}", "name": block.name}
        return content


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.answer,
    }
