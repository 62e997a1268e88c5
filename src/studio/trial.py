"""Chat with a run's base and adapter: the chat's application, mounted below /try/ of the training page."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import traceback
import types
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from rwkv_miss.errors import UserError

from ..serving import program
from ..serving.dispatcher import Dispatcher
from ..serving.errors import Refused
from ..serving.flags import Flags
from ..serving.limits import Limits
from ..serving.metrics import ServerMetrics

PATH = "/try"


class TriedModel:
    """Model that the page tries, if any. It stands for the dispatcher of the server's only application."""

    worker = types.SimpleNamespace(fatal=None)  # a trial that fails does not end the server

    def __init__(self, args: Flags, limits: Limits):
        self.args, self.limits, self.metrics = args, limits, ServerMetrics()
        self.state, self.run, self.error = "none", None, None
        self.app: ASGIApp | None = None
        self.dispatcher: Dispatcher | None = None
        self.loading: asyncio.Task | None = None
        self.open = contextlib.AsyncExitStack()

    @property
    def closing(self) -> bool:
        return self.dispatcher is not None and self.dispatcher.closing

    @closing.setter
    def closing(self, closing: bool) -> None:
        if self.dispatcher:
            self.dispatcher.closing = closing

    def as_object(self) -> dict[str, Any]:
        if self.dispatcher and self.dispatcher.worker.fatal:
            self.state, self.error = "failed", str(self.dispatcher.worker.fatal)
        return {"state": self.state, "run": self.run, "error": self.error}

    def start(self, run: str, model: str, adapter: str | None) -> dict[str, Any]:
        """Load a model and its adapter in the place of the last ones."""
        if self.state == "loading":
            raise Refused(409, f"{self.run} is being loaded; wait for its end", code="loading")
        self.state, self.run, self.error = "loading", run, None
        adapters = {"adapter": adapter} if adapter else {}
        name = self.args.name or ("base" if adapter else "trained")
        args = dataclasses.replace(self.args, model=model, adapters=adapters, name=name)
        self.loading = asyncio.create_task(self._load(args))
        return self.as_object()

    async def _load(self, args: Flags) -> None:
        try:
            await self.close()
            loaded = await asyncio.to_thread(program.load, args)
            app, self.dispatcher = program.assembled(args, self.limits, loaded)
            await self.open.enter_async_context(app.router.lifespan_context(app))
            self.dispatcher.worker.start()
            self.app, self.state = app, "ready"
        except UserError as error:
            self.state, self.error = "failed", str(error)
        except Exception as error:  # without this the page would show "loading" for ever
            traceback.print_exc()
            self.state, self.error = "failed", f"{type(error).__name__}: {error}"

    async def close(self) -> None:
        """End the answers that are written, and let go of the model."""
        self.app, dispatcher, self.dispatcher = None, self.dispatcher, None
        if dispatcher:
            dispatcher.closing = True
            dispatcher.stop_all()
            await asyncio.to_thread(dispatcher.worker.close)
        await self.open.aclose()

    def stop_all(self) -> None:
        if self.dispatcher:
            self.dispatcher.stop_all()


class Mounted:
    """Application that gives paths below /try/ to the trial, and the others to the training page."""

    def __init__(self, app: ASGIApp, trial: TriedModel):
        self.app, self.trial = app, trial

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, chat = scope.get("path", ""), self.trial.app
        if chat is None or not f"{path}/".startswith(f"{PATH}/"):
            await self.app(scope, receive, send)
            return
        # the chat checks paths itself, so it gets the path without the prefix of the training page
        inner = path[len(PATH) :] or "/"
        await chat({**scope, "path": inner, "raw_path": inner.encode()}, receive, send)
