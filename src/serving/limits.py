"""How much a client may ask for."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """The most of everything. Times are in seconds."""

    body_bytes: int = 4 << 20  # of a request
    prompt_tokens: int = 65536
    answer_tokens: int = 16384  # of one answer
    answers: int = 32  # of one request: n, times the prompts of a completion
    waiting: int = 128  # answers that wait for a row
    connections: int = 256
    receiving: float = 30.0  # until a request has arrived
    finishing: float = 30.0  # until what runs is finished, after SIGTERM
