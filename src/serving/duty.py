"""Duty: blocking work, one piece after another in a thread, while the event loop goes on."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any

from .errors import Refused

WAITING = 3  # a request waits this many times the seconds of a piece, for its turn and its own piece
MOST_LEFT = 8  # pieces past their deadline that still run


class Duty:
    """Duty whose pieces of work may take `seconds` each.

    A thread can't be ended. So a piece past its deadline is left running, the next piece begins, and the
    request of the late one is refused.
    """

    def __init__(self, name: str, seconds: float):
        self.name, self.seconds = name, seconds
        self.turn = asyncio.Lock()
        self.left: list[threading.Thread] = []

    async def run(self, work: Callable[[], Any]) -> Any:
        """Return what work() returns, or raise its error. Raises Refused if it takes too long."""
        try:
            return await asyncio.wait_for(self._in_turn(work), WAITING * self.seconds)
        except asyncio.TimeoutError:
            raise self._refused("others took too long") from None

    async def _in_turn(self, work: Callable[[], Any]) -> Any:
        async with self.turn:
            self.left = [thread for thread in self.left if thread.is_alive()]
            if len(self.left) >= MOST_LEFT:
                raise self._refused(f"{MOST_LEFT} others take too long")
            future: concurrent.futures.Future = concurrent.futures.Future()
            future.set_running_or_notify_cancel()
            thread = threading.Thread(target=_do, args=(work, future), name=self.name, daemon=True)
            thread.start()
            waiting = asyncio.wrap_future(future)
            try:
                done, _ = await asyncio.wait({waiting}, timeout=self.seconds)
                if not done:
                    raise self._refused(f"it took more than {self.seconds:g} seconds, and may still go on")
                return waiting.result()
            finally:
                if not waiting.done():
                    waiting.cancel()
                    self.left.append(thread)

    def _refused(self, reason: str) -> Refused:
        said = f"the request was given up: {reason}; try again later, or ask for less"
        return Refused(503, said, code="work_timeout")


def _do(work: Callable[[], Any], future: concurrent.futures.Future) -> None:
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)
