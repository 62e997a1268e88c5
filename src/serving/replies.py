"""Replies to a client: JSON objects, errors, and streams of server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from ..common.formatting import short
from .errors import Refused
from .limits import Limits
from .worker import Piece

QUIET_SECONDS = 15.0  # after which a stream shows that it is still there
MOST_NAMED = 20
ANTHROPIC_PATH = "/v1/messages"
DROPPED = 4  # times the largest body: the part of a larger one that is read and dropped


class Usage(NamedTuple):
    """Tokens of a request."""

    prompt: int
    answer: int
    cached: int  # tokens of the prompt whose state was cached


class WholeReply(Protocol):
    """Reply to a request without a stream, in the form of one API."""

    def take(self, piece: Piece) -> Any:
        """Take the next piece of an answer."""

    def whole(self, usage: Usage) -> dict[str, Any]:
        """Make the object of the reply."""


class Reply(WholeReply, Protocol):
    """Reply that may be a stream, too. An event with a `type` is named by it."""

    end: bytes  # the bytes that end a stream, after the last event

    def first(self) -> Iterator[dict[str, Any]]:
        """Yield the events that begin a stream."""

    def events(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """Take the next piece of an answer, and yield its events."""

    def last(self, usage: Usage) -> Iterator[dict[str, Any]]:
        """Yield the events that end a stream."""

    def error(self, refused: Refused) -> dict[str, Any]:
        """Make the event that ends a stream which failed."""


def dumped(value: Any) -> bytes:
    """Write JSON in UTF-8. Half a surrogate pair, which a client may have sent, becomes a question mark."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def json_reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(dumped(value), status, dict(headers or {}), "application/json")


def error_reply(refused: Refused, path: str) -> Response:
    """Reply with an error, in the form of the API that the path is of."""
    error = refused.as_anthropic() if path.startswith(ANTHROPIC_PATH) else refused.as_object()
    # the connection is closed after a failure of the server
    close = {"Connection": "close"} if refused.status == 500 else {}
    return json_reply(error, refused.status, {**close, **refused.headers})


def ignored_header(names: list[str]) -> dict[str, str]:
    """Make the warning about fields that nobody has read."""
    if not names:
        return {}
    shown = [name.encode("ascii", "backslashreplace").decode()[:40] for name in names[:MOST_NAMED]]
    shown = ["".join(c if c.isprintable() and c != "," else "?" for c in name) for name in shown]
    return {"X-Ignored-Fields": ", ".join(shown)}


async def read_body(request: Request, limits: Limits) -> bytes:
    """Read the body of a request. Raises Refused if it is too large, or does not come.

    A part of a body that is too large is read and dropped: a client sees no reply while it sends.
    """
    close = {"Connection": "close"}
    coding = request.headers.get("content-encoding", "identity")
    if coding != "identity":
        plain = f"Content-Encoding: got {short(coding)}, expected a body that is not compressed"
        raise Refused(415, plain, code="unsupported_encoding", headers=close)
    too_large = f"the request is larger than the {limits.body_bytes:,} bytes that this server reads"
    refused = Refused(413, too_large, code="request_too_large", headers=close)
    most = DROPPED * limits.body_bytes
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > most:
        raise refused
    body, size = bytearray(), 0

    async def read() -> None:
        nonlocal size
        async for part in request.stream():
            size += len(part)
            if size > most:
                return
            if size <= limits.body_bytes:
                body.extend(part)

    try:
        await asyncio.wait_for(read(), limits.receiving)
    except asyncio.TimeoutError:
        late = f"the request did not arrive within {limits.receiving:g} seconds"
        raise Refused(408, late, code="request_timeout", headers=close) from None
    except ClientDisconnect:
        raise Refused(400, "the client left before its request was complete") from None
    if size > limits.body_bytes:
        raise refused
    return bytes(body)


async def until_gone(request: Request) -> None:
    """Return when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Stream of server-sent events, each a JSON object, then `end`. It ends if the client leaves."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[Any, None],
        headers: Mapping[str, str],
        end: bytes,
        at_end: Callable[[], None],
        at_leaving: Callable[[], None],
    ):
        """Start the stream. `at_end` is always called, `at_leaving` if the client leaves before the end."""
        self.events, self.end, self.at_end, self.at_leaving = events, end, at_end, at_leaving
        self.status_code, self.background, self.body = 200, None, b""
        self.init_headers({**headers, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        # Response counts its body, and this one has no length
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]

    async def __call__(self, scope, receive, send) -> None:
        async def part(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        gone = asyncio.create_task(until_gone(Request(scope, receive)))
        coming: asyncio.Task | None = None
        try:
            while True:
                coming = coming or asyncio.ensure_future(anext(self.events))
                await asyncio.wait({coming, gone}, timeout=QUIET_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    self.at_leaving()
                    return
                if not coming.done():
                    await part(b": still here\n\n")
                    continue
                try:
                    event = coming.result()
                except StopAsyncIteration:
                    await part(self.end, False)
                    return
                coming = None
                name = f"event: {event['type']}\n" if "type" in event else ""
                await part(name.encode() + b"data: " + dumped(event) + b"\n\n")
        finally:
            gone.cancel()
            if coming:
                coming.cancel()
                await asyncio.wait({coming})
            self.at_end()
            await self.events.aclose()
