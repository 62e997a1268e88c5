"""Limits of a client's requests."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """Upper limits. Times are in seconds."""

    body_bytes: int = 4 << 20  # bytes of one request's body
    prompt_tokens: int = 65536
    answer_tokens: int = 16384  # tokens of one answer
    answers: int = 32  # answers to one request: n, times the prompts of a completion
    waiting: int = 128  # answers that wait for a row
    states: int = 32  # that clients keep
    adapters: int = 32  # that clients have loaded
    connections: int = 256
    receiving: float = 30.0  # until a request has arrived
    finishing: float = 30.0  # after SIGTERM, until running answers are finished
