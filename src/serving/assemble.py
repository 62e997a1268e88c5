"""A server's parts put together."""

from __future__ import annotations

from typing import Any

from starlette.applications import Starlette

from ..inference.engine import Engine
from .answering import Desk
from .app import Routes, make_app
from .guard import Guard
from .limits import Limits
from .objects import TokenNames
from .reading import Defaults, Reader
from .served import ServedModels
from .worker import Worker


def assemble(
    engine: Engine, served: ServedModels, defaults: Defaults, limits: Limits, guard: Guard, **describe: Any
) -> tuple[Starlette, Desk]:
    """(the application, its desk). The desk's worker is to be started. `describe` is told by /v1/server."""
    desk = Desk(Worker(engine), served, TokenNames(engine.tokenizer), limits)
    reader = Reader(engine.tokenizer, served.find, limits, defaults)
    return make_app(Routes(desk, reader, describe), guard), desk
