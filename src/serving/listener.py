"""Listening socket that keeps its connections within a limit.

asyncio accepts whatever waits before it closes anything, and where no file can be opened any more it says so
a thousand times a second. So the limit is kept here, where connections are accepted.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable

from rwkv_miss.errors import UserError

RESERVED = 128  # open files that the process may need in addition to its connections


class Connected(socket.socket):
    """Accepted connection. `waits_since` is None while the server does not wait for its client."""

    def __init__(self, listener: Listener, handle: int):
        super().__init__(listener.family, listener.type, listener.proto, handle)
        self.listener, self.waits_since = listener, time.monotonic()

    def close(self) -> None:
        self.listener.open.pop(self.fileno(), None)
        super().close()


class Listener(socket.socket):
    """Listening socket for at most `most` connections.

    One more gets the place of the client that has kept the server waiting longest for its request, if it was
    for `patience` seconds. Otherwise it gets `refusal` and is closed, and when_refused() is called.
    """

    most, patience, refusal = 256, 0.3, b""

    def __init__(self, family: int, kind: int, protocol: int):
        super().__init__(family, kind, protocol)
        self.open: dict[int, Connected] = {}
        self.when_refused: Callable[[], None] = lambda: None
        self.said = -1.0  # when asyncio was last told about an error

    def accept(self) -> tuple[socket.socket, object]:
        """Accept a connection, for asyncio. Raises BlockingIOError if there is none to be answered."""
        try:
            handle, address = self._accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            raise
        except OSError as error:
            # asyncio logs it, pauses for a second, and yet goes on accepting
            if time.monotonic() < self.said + 0.5:
                raise BlockingIOError from error
            self.said = time.monotonic()
            raise
        connected = Connected(self, handle)
        if len(self.open) >= self.most and not self._made_room():
            self._refuse(connected)
            raise BlockingIOError  # asyncio comes back after all that has to be done
        self.open[handle] = connected
        return connected, address

    def _made_room(self) -> bool:
        waits = [one for one in self.open.values() if one.waits_since is not None]
        oldest = min(waits, key=lambda one: one.waits_since, default=None)
        if oldest is None or time.monotonic() - oldest.waits_since < self.patience:
            return False
        del self.open[oldest.fileno()]
        with contextlib.suppress(OSError):  # the client has just left
            oldest.shutdown(socket.SHUT_RDWR)  # asyncio sees its end, and closes it
        return True

    def _refuse(self, connected: Connected) -> None:
        self.when_refused()
        connected.setblocking(False)
        with contextlib.suppress(OSError):
            connected.send(self.refusal)
        connected.close()


def bound(host: str, port: int) -> Listener:
    """Bind a socket to this address, which does not listen yet. Raises UserError if that is not possible."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = Listener(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: can't listen there: {error.strerror}; choose another --port, or 0"
            " for a free one"
        ) from None
    return listener


def allow_files(connections: int) -> None:
    """Let the process open enough files for its connections. Raises UserError if it may not."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    needed = 2 * connections + RESERVED  # all of them may be closing, and as many new ones be there
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    except (ValueError, OSError):
        raise UserError(
            f"--limit_connections {connections} needs {needed} open files, and this process may have {hard}"
            f" (ulimit -n); give at most {max(1, (hard - RESERVED) // 2)}"
        ) from None
