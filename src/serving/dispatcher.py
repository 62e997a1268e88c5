"""Dispatcher of requests: which may run, which have to wait, and whose client has left."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from rwkv_miss.errors import UserError

from ..common.formatting import counted
from .errors import Refused, failed
from .limits import Limits
from .metrics import ServerMetrics
from .openai_objects import TokenNames
from .replies import EventStream, Reply, Usage, WholeReply, ignored_header, json_reply, until_gone
from .request_parsing import ParsedRequest
from .served_models import ServedModels
from .states import States
from .worker import EngineJob, Piece, Worker

GONE = 499  # status, as other servers log it, of a client who left before its reply; for the log alone


class Dispatcher:
    """Dispatcher: takes as many requests as may wait, and counts their ends. It belongs to the event loop."""

    def __init__(
        self, worker: Worker, served: ServedModels, states: States, names: TokenNames, limits: Limits
    ):
        self.worker, self.served, self.states = worker, served, states
        self.names, self.limits = names, limits
        self.rows = worker.engine.decoder.rows
        self.metrics = ServerMetrics()
        self.running: set[RunningRequest] = set()
        self.open = 0  # answers that are not finished
        self.closing = False

    @property
    def waiting(self) -> int:
        """Answers that have no row yet."""
        return max(0, self.open - self.rows)

    async def begin(self, parsed: ParsedRequest) -> RunningRequest:
        """Give a request to the engine. Raises Refused if too many wait, or the engine refuses it."""
        answers = sum(request.n for request in parsed.requests)
        if self.closing:
            raise Refused(503, "the server is stopping", code="stopping", headers={"Retry-After": "10"})
        if self.worker.broken:
            raise Refused(503, self.worker.broken, code="broken")
        # a request to an idle server may be larger than the queue
        if self.open and self.open + answers > self.rows + self.limits.waiting:
            raise Refused(
                429,
                f"{counted(self.waiting, 'answer')} of at most {self.limits.waiting} (--limit_waiting) wait"
                " already; try again later",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(self._seconds_to_wait())},
            )
        run = RunningRequest(self, parsed, answers)
        try:
            run.job = await self.worker.submit(parsed.requests)
        except UserError as error:
            raise Refused(400, str(error), code="invalid_value") from None
        except RuntimeError as error:
            raise failed(str(error)) from None
        finally:
            if run.job is None:
                run.close()
        return run

    def _seconds_to_wait(self) -> int:
        """Estimate the seconds until a row is free, from the time that requests took so far."""
        whole = self.metrics.whole
        mean = whole.total / max(1, sum(whole.counts))
        return min(60, max(1, math.ceil(mean * self.waiting / self.rows)))

    def stop_all(self) -> None:
        """End the running answers: their clients are told."""
        for run in self.running:
            if run.job:
                run.job.end()


class RunningRequest:
    """Request from begin() to its end, which is close()."""

    def __init__(self, dispatcher: Dispatcher, parsed: ParsedRequest, answers: int):
        self.dispatcher, self.parsed = dispatcher, parsed
        self.entries = dispatcher.served.held(parsed.requests[0].applied)
        self.job: EngineJob | None = None
        self.left = answers  # answers that are not finished
        self.began, self.first_token = time.monotonic(), 0.0
        self.tokens = 0
        self.prompt_tokens = sum(parsed.state_tokens + len(request.tokens) for request in parsed.requests)
        self.cached = [0] * len(parsed.requests)
        self.closed = False
        dispatcher.open += answers
        dispatcher.running.add(self)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield new pieces of the answers. Raises Refused if one of them fails."""
        metrics = self.dispatcher.metrics
        assert self.job
        async for pieces in self.job.pieces():
            for piece in pieces:
                if piece.tokens and not self.first_token:
                    self.first_token = time.monotonic() - self.began
                    metrics.first_token.add(self.first_token)
                self.tokens += piece.tokens
                metrics.answer_tokens += piece.tokens
                place = piece.index // self.parsed.requests[0].n
                self.cached[place] = max(self.cached[place], self.parsed.state_tokens + piece.cached_tokens)
                if piece.finish:
                    self.left -= 1
                    self.dispatcher.open -= 1
                if piece.finish == "error":
                    if piece.status == 400:
                        raise Refused(400, piece.error, code="form_too_slow")
                    raise failed(piece.error)
                if piece.finish == "cancelled":
                    raise Refused(503, "the server stopped before the answer was complete", code="stopping")
                yield piece
        metrics.whole.add(time.monotonic() - self.began)

    def usage(self) -> Usage:
        return Usage(self.prompt_tokens, self.tokens, sum(self.cached))

    def close(self) -> None:
        """Free what the request holds. It may be called twice."""
        if self.closed:
            return
        self.closed = True
        dispatcher = self.dispatcher
        if self.job:
            self.job.cancel()
            dispatcher.metrics.prompt_tokens += self.prompt_tokens
            dispatcher.metrics.cached_tokens += sum(self.cached)
        dispatcher.open -= self.left
        dispatcher.running.discard(self)
        dispatcher.served.release(self.entries, dispatcher.worker)
        start = self.parsed.requests[0].start
        if start is not None and not dispatcher.states.has(start):  # a client deleted the state meanwhile
            dispatcher.worker.post(lambda: dispatcher.worker.engine.cache.forget(start))


async def answer(
    dispatcher: Dispatcher, request: Request, parsed: ParsedRequest, reply: WholeReply
) -> Response:
    """Answer a request: with a stream, which takes a Reply, or with the whole answer. Raises Refused."""
    run = await dispatcher.begin(parsed)
    headers = {"X-System-Fingerprint": parsed.chosen.fingerprint, **ignored_header(parsed.ignored)}
    headers["X-Max-Tokens"] = str(parsed.requests[0].max_tokens)  # a larger limit was cut to the server's
    if parsed.stream:
        return EventStream(_events(run, reply), headers, reply.end, run.close, dispatcher.metrics.left)
    gone = asyncio.create_task(until_gone(request))
    work = asyncio.create_task(_collected(run, reply))
    try:
        await asyncio.wait({gone, work}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            dispatcher.metrics.left()
            return Response(status_code=GONE)
        return json_reply(work.result(), headers=headers)
    finally:
        gone.cancel()
        work.cancel()
        await asyncio.wait({gone, work})
        run.close()


async def _collected(run: RunningRequest, reply: WholeReply) -> dict[str, Any]:
    async for piece in run.pieces():
        reply.take(piece)
    return reply.whole(run.usage())


async def _events(run: RunningRequest, reply: Reply) -> AsyncGenerator[dict[str, Any], None]:
    try:
        for event in reply.first():
            yield event
        async for piece in run.pieces():
            for event in reply.events(piece):
                yield event
    except Refused as refused:  # the status was sent long ago
        yield reply.error(refused)
        return
    for event in reply.last(run.usage()):
        yield event
