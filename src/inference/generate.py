"""Stream of an answer, piece by piece, from the engine (engine.py)."""

from __future__ import annotations

from collections.abc import Generator

from .engine import Answer, Engine, Request


def stream(engine: Engine, request: Request) -> Generator[str, None, Answer]:
    """Yield a request's only answer in pieces of whole characters; return it once it is complete.

    Closed or interrupted, it is cancelled. Raises UserError for a request that can't be answered, and for a
    model that overflows.
    """
    (answer,) = engine.submit(request)
    shown = 0
    try:
        while not answer.finish:
            engine.step()
            if len(answer.text) > shown:
                piece, shown = answer.text[shown:], len(answer.text)
                yield piece
    finally:
        engine.cancel(answer)
    if answer.error:
        raise answer.error
    return answer
