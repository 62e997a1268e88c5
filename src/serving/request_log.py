"""Log of requests: a line for each, without its content."""

from __future__ import annotations

import sys
import time


class RequestLog:
    """Middleware that writes a line to stderr at the end of each request.

    The line has the time, the client's address, method, path, status and seconds. 499 is a client who left
    before its reply began. A stream has begun with 200, also if its client leaves.
    Neither the query nor the headers or the body are written.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, began = 500, time.monotonic()  # if there is no reply, a bug's

        async def noted(message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            # a path may have any characters
            path = scope["path"][:80].encode("unicode_escape").decode()
            client, seconds = (scope["client"] or ["?"])[0], time.monotonic() - began
            when = time.strftime("%Y-%m-%d %H:%M:%S")
            print(f"{when} {client} {scope['method']} {path} {status} {seconds:.2f}s", file=sys.stderr)
