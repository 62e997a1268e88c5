"""Small files: text and JSON lines, read with a bound on their size and written whole."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable

from rwkv_miss.errors import UserError, did_you_mean, similar_path
from rwkv_miss.files.output import whole_file

LARGEST_TEXT = 1 << 26  # bytes


def read_text(path: str, purpose: str, otherwise: str, known: Iterable[str] = ()) -> str:
    """Read a small UTF-8 file. `otherwise` tells what else to give; one of the names `known` may be meant.

    Raises UserError for another encoding, anything but a regular file, and a file far too large for its
    purpose: the path may come from a checkpoint's metadata.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError("it is no regular file")
        if (size := os.path.getsize(path)) > LARGEST_TEXT:
            raise OSError(f"it has {size:,} bytes")
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        raise UserError(
            f"cannot read {path} as {purpose}: no such file; {otherwise}"
            f"{did_you_mean(path, known) or similar_path(path)}"
        ) from None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"cannot read {path} as {purpose}: {error}; {otherwise}") from None


def write_text(path: str, text: str) -> None:
    """Write a text in UTF-8, as write_bytes() does."""
    write_bytes(path, text.encode())


def write_bytes(path: str, content: bytes) -> None:
    """Write a file of a run, whole or not at all. Raises UserError for a full or read-only disk."""
    try:
        # no random name, so that the next run replaces the leftover of a killed one
        with whole_file(path, len(content), temporary=f"{path}.tmp") as file:
            file.write(content)
    except OSError as error:
        raise UserError(
            f"{path} could not be written ({error.strerror}); what was there before is unchanged"
        ) from None


def read_lines(path: str, last_step: int) -> list[dict]:
    """Read the JSON lines of a run's log up to a step.

    They end before a line that a crash cut off. Without a file there are none.
    """
    lines = []
    with (
        contextlib.suppress(FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError),
        open(path, "rb") as file,
    ):
        for line in map(json.loads, file):
            if line["step"] > last_step:
                break
            lines.append(line)
    return lines


def write_lines(path: str, lines: list[dict]) -> None:
    """Write the log again, whole or not at all."""
    write_text(path, "".join(map(_json_line, lines)))


def append_line(path: str, line: dict) -> None:
    """Append one JSON line. Raises UserError for a full or read-only disk."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(_json_line(line))
    except OSError as error:
        raise UserError(f"{path} could not be written ({error.strerror})") from None


def _json_line(line: dict) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"
