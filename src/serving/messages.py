"""Messages of a chat request, as the templates take them."""

from __future__ import annotations

from typing import Any

from rwkv_miss.errors import UserError

from ..data.chat_template import thoughts_of
from ..data.tool_styles import read_call
from .errors import wrong
from .fields import Fields

# OpenAI's newer name of the system's role
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


def read_messages(fields: Fields) -> list[dict[str, Any]]:
    """Read the conversation: {"role", "content": text} and an answer's or a result's fields. Raises
    Refused."""
    messages = fields.objects("messages", 1)
    if messages is None:
        raise fields.refuse("messages", None, "a list of at least one message")
    return [_message(Fields(message, f"messages[{i}].")) for i, message in enumerate(messages)]


def without_thoughts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drop the thoughts of earlier answers, for a mode that has no place for them."""
    plain = []
    for message in messages:
        if message["role"] == "assistant":
            _, content = thoughts_of(message)
            message = {key: value for key, value in message.items() if key != "reasoning_content"}
            message["content"] = content
        plain.append(message)
    return plain


def _message(fields: Fields) -> dict[str, Any]:
    role = read_role(fields)
    content = read_content(fields, required=role != "assistant")
    message: dict[str, Any] = {"role": role, "content": content}
    if role == "assistant":
        thoughts = fields.text("reasoning_content") or fields.text("reasoning")
        if thoughts and not content.lstrip().startswith("<think>"):
            message["reasoning_content"] = thoughts
        if calls := _calls(fields):
            message["tool_calls"] = calls
    elif role == "tool" and (identity := fields.text("tool_call_id")) is not None:
        message["tool_call_id"] = identity
    return message


def read_role(fields: Fields) -> str:
    role = fields.choice("role", ROLES)
    if role is None:
        raise fields.refuse("role", None, f"one of {', '.join(ROLES)}")
    return ROLES[role]


def read_content(fields: Fields, required: bool, name: str = "content") -> str:
    """Read the text of a message, also if it comes in parts."""
    value = fields.take(name)
    if value is None and not required:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise fields.refuse(name, value, "a text, or a list of parts")
    texts = []
    for i, part in enumerate(value):
        if not isinstance(part, dict):
            raise fields.refuse(f"{name}[{i}]", part, 'a part such as {"type": "text", "text": "..."}')
        inner = Fields(part, f"{fields.within}{name}[{i}].")
        kind = inner.text("type", "text")
        if kind not in ("text", "input_text", "output_text"):
            raise inner.refuse("type", kind, "text: this model reads nothing else")
        text = inner.text("text")
        if text is None:
            raise inner.refuse("text", None, "a text")
        texts.append(text)
    return "\n".join(texts)


def _calls(fields: Fields) -> list[dict[str, Any]]:
    calls = fields.objects("tool_calls") or []
    for i, call in enumerate(calls):
        check_call(call, f"{fields.within}tool_calls[{i}]")
    return calls


def check_call(call: dict[str, Any], param: str) -> None:
    """Raise Refused for a call without a name, or without an object of arguments."""
    try:
        read_call(call)
    except UserError as error:
        raise wrong(param, str(error)) from None
