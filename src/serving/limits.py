"""Limits of a client's requests."""

from __future__ import annotations

import dataclasses
from typing import Any

from rwkv_miss.flags import flag


def limit(default: float, name: str, help: str, **bounds: float) -> Any:
    """Declare a limit with its flag, --limit_NAME."""
    return flag(default, f"{help}; default %(default)s", name=f"limit_{name}", **bounds)


@dataclasses.dataclass(frozen=True)
class Limits:
    """Upper limits. Times are in seconds."""

    body_bytes: int = 4 << 20  # bytes of one request's body
    prompt_tokens: int = limit(65536, "prompt", "the longest prompt, in tokens", low=1)
    answer_tokens: int = limit(16384, "answer", "the longest answer, in tokens", low=1)
    answers: int = limit(32, "answers", "the most answers to one request", low=1)
    waiting: int = limit(
        128, "waiting", "the most answers that may wait; others are told to try again", low=0
    )
    states: int = limit(32, "states", "the most states that clients may keep", low=0)
    adapters: int = limit(32, "adapters", "the most adapters that clients may load", low=0)
    connections: int = limit(256, "connections", "the most connections", low=1)
    receiving: float = limit(30.0, "receiving", "seconds until a request has arrived", above=0)
    finishing: float = limit(30.0, "finishing", "seconds that running answers have after SIGTERM", above=0)
