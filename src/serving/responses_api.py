"""OpenAI's Responses API: a request becomes a chat's, and the answer a list of items."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from .blocks import AnswerBlock, BlockReply, refuse_n_and_logprobs
from .errors import Refused, client_names, wrong
from .fields import Fields
from .forms import read_format
from .messages import check_call, read_content, read_role
from .openai_objects import TokenNames
from .replies import Usage
from .request_parsing import ParsedChat, RequestReader, read_chat

# names of a chat's fields -> names of this API
NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
# fields that name something which a server has kept, or does later
NEEDS_STORAGE = ("previous_response_id", "conversation", "prompt", "background")
KEEPS_NOTHING = "this server keeps no answers; send the whole conversation as input"
LOGPROBS = "message.output_text.logprobs"


class ItemNames(NamedTuple):
    """Names of a block's kind in this API."""

    prefix: str  # the beginning of the item's id
    type: str
    part: str  # the type of the item's part; "" for an item without parts
    event: str


KINDS = {
    "thoughts": ItemNames("rs", "reasoning", "reasoning_text", "reasoning_text"),
    "text": ItemNames("msg", "message", "output_text", "output_text"),
    "call": ItemNames("fc", "function_call", "", "function_call_arguments"),
}


@dataclasses.dataclass(frozen=True)
class ParsedResponse(ParsedChat):
    body: dict[str, Any]  # the reply repeats some of its fields


def read_response(reader: RequestReader, body: dict[str, Any]) -> ParsedResponse:
    """Read a request to /v1/responses. Raises Refused."""
    fields = Fields(body)
    for name in NEEDS_STORAGE:
        if fields.take(name):
            raise wrong(name, KEEPS_NOTHING)
    refuse_n_and_logprobs(fields)
    include = fields.take("include")
    if isinstance(include, list) and LOGPROBS in include:
        raise wrong("include", f"/v1/chat/completions gives log-probabilities; leave out {LOGPROBS}")
    text, reasoning = fields.inner("text"), fields.inner("reasoning")
    chat_fields = {
        "messages": _messages(fields),
        "max_completion_tokens": fields.take("max_output_tokens"),
        "response_format": read_format(text.inner("format")) if text else None,
        "reasoning_effort": reasoning.take("effort") if reasoning else None,
        "tools": [_tool(tool) for tool in fields.objects("tools") or ()],
        "tool_choice": fields.take("tool_choice"),
    }
    same_fields = {name: value for name, value in body.items() if name not in fields.seen}
    with client_names(NAMES):
        parsed = read_chat(reader, {**same_fields, **chat_fields})
    return ParsedResponse(**vars(parsed), body=body)


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """Put the function of a tool into an object of its own, as a chat has it."""
    if tool.get("type", "function") != "function" or "function" in tool:
        return tool
    function = {name: value for name, value in tool.items() if name != "type" and value is not None}
    return {"type": "function", "function": function}


def _messages(fields: Fields) -> list[dict[str, Any]]:
    """Read instructions and input as the messages of a chat."""
    value = fields.take("input")
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    items = Fields({"input": value}).objects("input", 1)
    if items is None:
        raise fields.refuse("input", None, "a text, or a list of items")
    instructions = fields.text("instructions")
    messages = [{"role": "system", "content": instructions}] if instructions else []
    for i, item in enumerate(items):
        _add_item(messages, Fields(item, f"input[{i}]."))
    return messages


def _add_item(messages: list[dict[str, Any]], item: Fields) -> None:
    """Add an item: a message, or a part of an answer, whose thoughts, text and calls are items each."""
    kind = item.text("type", "message")
    last = messages[-1] if messages else {}
    if kind == "message":
        message = {"role": read_role(item), "content": read_content(item, True)}
        if message["role"] == "assistant" and last.get("role") == "assistant" and not last["content"]:
            if "tool_calls" not in last:
                message = {**messages.pop(), **message}
        messages.append(message)
    elif kind == "function_call_output":
        output = read_content(item, True, "output")
        messages.append({"role": "tool", "tool_call_id": item.text("call_id"), "content": output})
    elif kind == "function_call":
        if last.get("role") != "assistant":
            messages.append(last := {"role": "assistant", "content": ""})
        function = {"name": item.text("name"), "arguments": item.text("arguments")}
        call = {"id": item.text("call_id"), "type": "function", "function": function}
        check_call(call, item.within.removesuffix("."))
        last.setdefault("tool_calls", []).append(call)
    elif kind == "reasoning":
        parts = item.objects("content") or item.objects("summary") or []
        thoughts = "\n".join(str(part.get("text", "")) for part in parts)
        messages.append({"role": "assistant", "content": "", "reasoning_content": thoughts})
    elif kind == "item_reference":
        raise wrong(f"{item.within}type", f"{KEEPS_NOTHING}, as clients do that are told store: false")
    else:
        raise item.refuse("type", kind, "message, function_call, function_call_output or reasoning")


class ResponsesReply(BlockReply):
    """Reply with the items of an answer."""

    def __init__(self, parsed: ParsedResponse, names: TokenNames):
        super().__init__(parsed)
        self.body, self.tokenizer = parsed.body, names.tokenizer
        self.created, self.number = int(time.time()), -1

    def first(self) -> Iterator[dict[str, Any]]:
        for kind in ("created", "in_progress"):
            yield self._event(kind, response=self._response("in_progress"))

    def begun(self, block: AnswerBlock) -> Iterator[dict[str, Any]]:
        item = self._item(block, "in_progress", begun=True)
        yield self._event("output_item.added", output_index=block.index, item=item)
        if block.kind != "call":
            yield self._event("content_part.added", **self._place(block), part=self._part(block))

    def grown(self, block: AnswerBlock, text: str) -> Iterator[dict[str, Any]]:
        name = KINDS[block.kind].event
        yield self._event(f"{name}.delta", **self._place(block), delta=text)

    def ended(self, block: AnswerBlock) -> Iterator[dict[str, Any]]:
        name, text = KINDS[block.kind].event, block.text
        whole = {"arguments": text, "name": block.name} if block.kind == "call" else {"text": text}
        yield self._event(f"{name}.done", **self._place(block), **whole)
        if block.kind != "call":
            yield self._event("content_part.done", **self._place(block), part=self._part(block))
        item = self._item(block, self._status(block))
        yield self._event("output_item.done", output_index=block.index, item=item)

    def last(self, usage: Usage) -> Iterator[dict[str, Any]]:
        response = self.whole(usage)
        yield self._event(response["status"], response=response)

    def error(self, refused: Refused) -> dict[str, Any]:
        error = {"code": "server_error", "message": refused.message}
        return self._event("failed", response={**self._response("failed"), "error": error})

    def whole(self, usage: Usage) -> dict[str, Any]:
        thoughts = "".join(block.text for block in self.blocks if block.kind == "thoughts")
        reasoning = min(usage.answer, len(self.tokenizer.encode(thoughts)))
        tokens = {
            "input_tokens": usage.prompt,
            "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
            "output_tokens": usage.answer,
            "output_tokens_details": {"reasoning_tokens": reasoning},
            "total_tokens": usage.prompt + usage.answer,
        }
        status = self._status(self.blocks[-1])
        return {
            **self._response(status),
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": [self._item(block, self._status(block)) for block in self.blocks],
            "usage": tokens,
        }

    def _status(self, block: AnswerBlock) -> str:
        is_cut = self.finish == "length" and block is self.blocks[-1] and block.kind != "call"
        return "incomplete" if is_cut else "completed"

    def _response(self, status: str) -> dict[str, Any]:
        request = self.parsed.requests[0]
        said = {name: self.body.get(name) for name in ("instructions", "user")}
        return {
            "id": f"resp_{self.key}",
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            **said,
            "max_output_tokens": request.max_tokens,
            "metadata": self.body.get("metadata") or {},
            "model": self.parsed.model,
            "output": [],
            "parallel_tool_calls": self.parsed.tools.parallel,
            "previous_response_id": None,
            "reasoning": self.body.get("reasoning") or {"effort": None, "summary": None},
            "store": False,
            "temperature": request.sampling.temperature,
            "text": self.body.get("text") or {"format": {"type": "text"}},
            "tool_choice": self.body.get("tool_choice") or "auto",
            "tools": self.body.get("tools") or [],
            "top_p": request.sampling.top_p,
            "truncation": "disabled",
            "usage": None,
        }

    def _item(self, block: AnswerBlock, status: str, begun: bool = False) -> dict[str, Any]:
        kind = KINDS[block.kind]
        item = {"id": f"{kind.prefix}_{block.key}", "type": kind.type, "status": status}
        if block.kind == "call":
            return {**item, "call_id": f"call_{block.key}", "name": block.name, "arguments": block.text}
        item["content"] = [] if begun else [self._part(block)]
        return {**item, "summary": []} if block.kind == "thoughts" else {**item, "role": "assistant"}

    def _part(self, block: AnswerBlock) -> dict[str, Any]:
        part = {"type": KINDS[block.kind].part, "text": block.text}
        return part if block.kind == "thoughts" else {**part, "annotations": [], "logprobs": []}

    def _place(self, block: AnswerBlock) -> dict[str, Any]:
        place = {"item_id": f"{KINDS[block.kind].prefix}_{block.key}", "output_index": block.index}
        if block.kind == "call":
            return place
        return {**place, "content_index": 0, **({"logprobs": []} if block.kind == "text" else {})}

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self.number += 1
        return {"type": f"response.{kind}", "sequence_number": self.number, **fields}
