"""JSONL -> rows."""

from __future__ import annotations

import json
from collections.abc import Iterator

from rwkv_miss.errors import UserError

from ..template import ROLES


def read_rows(path) -> Iterator[tuple[str, dict]]:
    """("FILE, line N", row) for every row of a JSONL file that is not blank; a broken row is a UserError with file and line.

    Rows are {"text": ...}, trained as a whole, or {"messages": [{"role": ..., "content": ...}, ...]}, trained on the assistant's turns.
    """
    try:
        file = open(path, "rb")
    except OSError as error:
        raise UserError(f"data file {path} can't be read: {error.strerror}") from None
    with file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip()
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start + 1})") from None
            if text:
                yield where, _row(text, where)


def _row(line: str, where: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(row, dict) or ("text" in row) == ("messages" in row):
        seen = f"keys {sorted(row)}" if isinstance(row, dict) else type(row).__name__
        raise UserError(f'{where}: expected one of {{"text": ...}} and {{"messages": [...]}}, got {seen}')
    if "text" in row:
        if not isinstance(row["text"], str) or not row["text"]:
            raise UserError(f"{where}: text must be a non-empty string, got {row['text']!r}")
        return row
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: messages must be a non-empty list, got {messages!r}")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str) or message.get("role") not in list(ROLES):
            raise UserError(f'{where}: a message must be {{"role": {" | ".join(ROLES)}, "content": text}}, got {message!r}')
    if messages[-1]["role"] != "assistant":
        raise UserError(f"{where}: the last message is from {messages[-1]['role']}; expected the assistant's answer, which is trained")
    return row
