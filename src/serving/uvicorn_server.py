"""Server by uvicorn for one application: it closes silent connections, and ends in order."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
import socket
import threading
import time
import types
from collections.abc import Callable, Iterator

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .dispatcher import Dispatcher
from .errors import Refused
from .http_parser import HttpParser
from .listener import Listener
from .replies import dumped

KEEP_ALIVE = 15  # seconds that a connection may stay without a request


class Connection(H11Protocol):
    """Connection with a time limit for the head of every request, and one for a client to receive its reply.

    Its `connected` knows whether the server waits for the client.
    """

    receiving = 30.0
    listener: Listener

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.conn = HttpParser()

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.timer: asyncio.TimerHandle | None = None
        self.stalled: asyncio.TimerHandle | None = None
        self.connected = self.listener.open.get(transport.get_extra_info("socket").fileno())
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unwatch()
        self._resumed()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.stalled = self.loop.call_later(self.receiving, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._resumed()

    def _resumed(self) -> None:
        if self.stalled:
            self.stalled.cancel()
            self.stalled = None

    def _watch(self) -> None:
        """Limit the time for the head of a request, as long as none is being answered."""
        cycle, connected = self.cycle, self.connected
        if connected and cycle is not None and not cycle.response_complete and not cycle.more_body:
            connected.waits_since = None
        elif connected and connected.waits_since is None:
            connected.waits_since = time.monotonic()
        if cycle is not None and not cycle.response_complete or self.transport.is_closing():
            self._unwatch()
        elif self.timer is None:
            self.timer = self.loop.call_later(self.receiving, self.transport.close)

    def _unwatch(self) -> None:
        if self.timer:
            self.timer.cancel()
            self.timer = None


def too_many() -> bytes:
    """Write the reply to a connection beyond the limit, which comes before its request."""
    refused = Refused(
        503, "the server has too many connections; try again later", code="too_many_connections"
    )
    body = dumped(refused.as_object())
    return (
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
        f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body


class Server(uvicorn.Server):
    """Server that ends at SIGTERM or SIGINT: running answers may finish, for limits.finishing seconds.

    It also ends when the worker can't go on.
    """

    def __init__(
        self,
        app,
        dispatcher: Dispatcher,
        listener: Listener,
        when_ready: Callable[[], None],
        tls_cert: str | None = None,
        tls_key: str | None = None,
    ):
        """Prepare the server; `when_ready` is called as soon as it answers."""
        limits = dispatcher.limits
        connection = type("Connection", (Connection,), {"receiving": limits.receiving, "listener": listener})
        super().__init__(
            uvicorn.Config(
                app,
                http=connection,
                ws="none",
                ssl_certfile=tls_cert,
                ssl_keyfile=tls_key,
                lifespan="on",
                loop="asyncio",
                log_level="error",
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE,
                # after `finishing` every answer is ended; the rest is for clients who do not take theirs
                timeout_graceful_shutdown=int(limits.finishing) + 5,
            )
        )
        self.dispatcher, self.listener, self.when_ready = dispatcher, listener, when_ready
        # under TLS a reply is possible after the handshake only
        listener.most, listener.refusal = limits.connections, b"" if tls_cert else too_many()
        listener.when_refused = functools.partial(dispatcher.metrics.refused, 503)

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        super().run([self.listener])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.when_ready()

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self.dispatcher.worker.fatal is not None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.dispatcher.closing = True
        loop = asyncio.get_running_loop()
        end = loop.call_later(self.dispatcher.limits.finishing, self.dispatcher.stop_all)
        try:
            await super().shutdown(sockets)
        finally:
            end.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """End the server in order at both signals; uvicorn would raise them again at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: types.FrameType | None) -> None:
        """End the answers, too, at the second signal."""
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True
