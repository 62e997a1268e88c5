"""Routes of the server."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from rwkv_miss.version import VERSION

from ..data.rwkv_template import MODES
from ..inference.engine import Engine
from .anthropic_api import AnthropicReply, read_anthropic
from .dispatcher import Dispatcher, answer
from .duty import Duty
from .errors import Refused, failed
from .fields import Fields, read_object
from .guard import Guard, GuardMiddleware
from .limits import Limits
from .openai_choices import ChatChoices, TextChoices
from .openai_objects import TokenNames
from .renderer import MOST_BYTES, Renderer
from .replies import error_reply, ignored_header, json_reply, read_body
from .request_log import RequestLog
from .request_parsing import Defaults, RequestReader, read_chat, read_completion
from .responses_api import ResponsesReply, read_response
from .served_models import ServedModels
from .state_requests import ParsedState, StateReply, read_state
from .states import States
from .think_modes import efforts_of, modes_of
from .token_requests import TokensReply, read_detokenize, read_tokenize, tokenizer_info
from .worker import Worker

READING = 10.0  # seconds that the body of a request may take
PAGE = pathlib.Path(__file__).parent / "page"
KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
# the page loads only its own files and talks only with its own server
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'"
    " data:; connect-src 'self'; frame-src 'self'; frame-ancestors 'self'; base-uri 'none';"
    " form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_file(name: str, *folders: pathlib.Path) -> Response:
    """Return a file of a page, from the first of these folders that has it."""
    for folder in folders:
        files = {path.name: path for path in folder.iterdir() if path.suffix in KINDS}
        if name in files:
            return FileResponse(files[name], headers=PAGE_HEADERS, media_type=KINDS[files[name].suffix])
    raise Refused(404, "there is no such file", code="not_found")


class Routes:
    """Endpoints of all routes. `describe` is the operator's choices, for /v1/server."""

    def __init__(self, dispatcher: Dispatcher, reader: RequestReader, describe: dict[str, Any]):
        self.dispatcher, self.reader, self.describe = dispatcher, reader, describe
        # one at a time: a client with large requests does not take all cores from the engine
        self.readers = Duty("reader", READING)
        self.renderer = Renderer()

    def all(self) -> list[Route]:
        return [
            self._route("/health", self.health),
            self._route("/metrics", self.metrics),
            self._route("/v1/models", self.models),
            self._route("/v1/models/{name:path}", self.model),
            self._route("/v1/server", self.server),
            self._route("/v1/chat/completions", self.chat, "POST"),
            self._route("/v1/completions", self.completions, "POST"),
            self._route("/v1/responses", self.responses, "POST"),
            self._route("/v1/messages", self.messages, "POST"),
            self._route("/v1/messages/count_tokens", self.count_tokens, "POST"),
            self._route("/v1/adapters", self.adapters),
            self._route("/v1/adapters", self.add_adapter, "POST"),
            self._route("/v1/adapters/{name}", self.drop_adapter, "DELETE"),
            self._route("/tokenize", functools.partial(self.tokens, read_tokenize), "POST"),
            self._route("/detokenize", functools.partial(self.tokens, read_detokenize), "POST"),
            self._route("/tokenizer_info", self.tokenizer_info),
            self._route("/v1/states", self.states),
            self._route("/v1/states", self.add_state, "POST"),
            self._route("/v1/states/{id}", self.drop_state, "DELETE"),
            self._route("/v1/load_lora_adapter", self.add_adapter, "POST"),
            self._route("/v1/unload_lora_adapter", self.drop_lora, "POST"),
            self._route("/", self.page),
            self._route("/page/render", self.render, "POST"),
            self._route("/page/highlight.css", self.highlight_css),
            self._route("/page/{name}", self.page),
        ]

    async def close(self) -> None:
        await self.renderer.close()

    def _route(self, path: str, endpoint: Callable[[Request], Awaitable[Response]], method: str = "GET"):
        """Make a route whose refusals become error objects, and which is counted."""

        async def answered(request: Request) -> Response:
            try:
                response = await endpoint(request)
            except Refused as refused:
                response = error_reply(refused, request.url.path)
            self.dispatcher.metrics.requests[path, response.status_code] += 1
            return response

        return Route(path, answered, methods=[method])

    async def health(self, request: Request) -> Response:
        dispatcher = self.dispatcher
        status = "broken" if dispatcher.worker.broken else "stopping" if dispatcher.closing else "ok"
        return json_reply({"status": status}, 200 if status == "ok" else 503)

    async def metrics(self, request: Request) -> Response:
        dispatcher = self.dispatcher
        text = dispatcher.metrics.text(
            [
                ("answers_running", "Answers that have a row.", dispatcher.open - dispatcher.waiting),
                ("answers_waiting", "Answers that wait for a row.", dispatcher.waiting),
                ("rows", "Answers that the server writes at once.", dispatcher.rows),
                ("prompt_chunk", "Tokens of a prompt that are read at once.", dispatcher.worker.engine.chunk),
                ("engine_steps", "Steps of the engine so far.", dispatcher.worker.steps),
                ("engine_failures", "Steps that failed.", dispatcher.worker.failures),
                ("adapters", "Adapters that are loaded.", len(dispatcher.served.entries)),
                ("states", "States that clients keep.", len(self.reader.states.by_id)),
            ]
        )
        return Response(text, media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        return json_reply({"object": "list", "data": self._cards()})

    async def model(self, request: Request) -> Response:
        name, served = request.path_params["name"], self.dispatcher.served
        for card in self._cards():
            if name == card["id"] or card["parent"] and name == f"{served.name}:{card['id']}":
                return json_reply(card)
        raise served.unknown("model", name)

    def _cards(self) -> list[dict[str, Any]]:
        longest = self.dispatcher.limits.prompt_tokens
        common = {"object": "model", "owned_by": "rwkv-miss"}
        cards = self.dispatcher.served.cards()
        return [card | common | {"max_model_len": longest} for card in cards]

    async def server(self, request: Request) -> Response:
        served = self.dispatcher.served
        template = served.template
        return json_reply(
            {
                "model": served.name,
                "version": VERSION,
                "adapters": [entry.description for entry in served.entries.values()],
                "default_scale": served.scale,
                "adapter_dir": served.folder is not None,
                "template": template.name,
                "modes": modes_of(template),
                "reasoning_efforts": efforts_of(template),
                "sampling": self._sampling(template.opening),
                "sampling_of_mode": {
                    mode: self._sampling(MODES[mode].opening) for mode in modes_of(template)
                },
                "max_tokens": self.reader.defaults.max_tokens,
                "limits": dataclasses.asdict(self.dispatcher.limits),
                "renders": not self.renderer.missing,
                **self.describe,
            }
        )

    def _sampling(self, opening: str) -> dict[str, float]:
        return dataclasses.asdict(self.reader.defaults.sampling_of(opening))

    async def chat(self, request: Request) -> Response:
        parsed = await self._parsed(request, read_chat)
        return await answer(self.dispatcher, request, parsed, ChatChoices(parsed, self.dispatcher.names))

    async def completions(self, request: Request) -> Response:
        parsed = await self._parsed(request, read_completion)
        return await answer(self.dispatcher, request, parsed, TextChoices(parsed, self.dispatcher.names))

    async def responses(self, request: Request) -> Response:
        parsed = await self._parsed(request, read_response)
        return await answer(self.dispatcher, request, parsed, ResponsesReply(parsed, self.dispatcher.names))

    async def messages(self, request: Request) -> Response:
        parsed = await self._parsed(request, read_anthropic)
        return await answer(self.dispatcher, request, parsed, AnthropicReply(parsed))

    async def count_tokens(self, request: Request) -> Response:
        parsed = await self._parsed(request, read_anthropic)
        return json_reply({"input_tokens": parsed.state_tokens + len(parsed.requests[0].tokens)})

    async def tokens(self, read: Callable[[RequestReader, dict], TokensReply], request: Request) -> Response:
        value, ignored = await self._parsed(request, read)
        return json_reply(value, headers=ignored_header(ignored))

    async def tokenizer_info(self, request: Request) -> Response:
        return json_reply(tokenizer_info(self.reader))

    async def _parsed(self, request: Request, read: Callable[[RequestReader, dict], Any]) -> Any:
        """Parse the body of a request. Long texts are tokenised in another thread."""
        body = await read_body(request, self.dispatcher.limits)
        return await self.readers.run(lambda: read(self.reader, read_object(body)))

    async def adapters(self, request: Request) -> Response:
        entries = self.dispatcher.served.entries.values()
        return json_reply({"object": "list", "data": [entry.description for entry in entries]})

    async def add_adapter(self, request: Request) -> Response:
        fields = Fields(read_object(await read_body(request, self.dispatcher.limits)))
        of_vllm = request.url.path == "/v1/load_lora_adapter"
        name, file = fields.required(*(("lora_name", "lora_path") if of_vllm else ("name", "file")))
        served = self.dispatcher.served
        served.check_room(self.dispatcher.limits.adapters)
        entry = await served.add(name, file, self.dispatcher.worker)
        return json_reply(entry.description, headers=ignored_header(fields.ignored()))

    async def drop_adapter(self, request: Request) -> Response:
        return self._drop(request.path_params["name"])

    async def drop_lora(self, request: Request) -> Response:
        fields = Fields(read_object(await read_body(request, self.dispatcher.limits)))
        return self._drop(*fields.required("lora_name"))

    def _drop(self, name: str) -> Response:
        self.dispatcher.served.drop(name, self.dispatcher.worker)
        return json_reply({"name": name, "deleted": True})

    async def states(self, request: Request) -> Response:
        states = self.reader.states.by_id.values()
        return json_reply({"object": "list", "data": [state.as_object() for state in states]})

    async def add_state(self, request: Request) -> Response:
        parsed = await self._parsed(request, read_state)
        dispatcher, states = self.dispatcher, self.reader.states
        with states.room():
            if isinstance(parsed, ParsedState):
                return await answer(dispatcher, request, parsed, StateReply(parsed, states))
            file, chosen, ignored = parsed
            read = await dispatcher.served.state_of(file, dispatcher.worker)
            state = states.keep(chosen.id, chosen.fingerprint, [], [], read)
            return json_reply(state.as_object(), headers=ignored_header(ignored))

    async def drop_state(self, request: Request) -> Response:
        identity = request.path_params["id"]
        state, worker = self.reader.states.drop(identity), self.dispatcher.worker
        worker.post(lambda: worker.engine.cache.forget(state))
        return json_reply({"id": identity, "deleted": True})

    async def page(self, request: Request) -> Response:
        return page_file(request.path_params.get("name", "index.html"), PAGE)

    async def highlight_css(self, request: Request) -> Response:
        """Return the colours of highlighted code: none where nothing is highlighted."""

        def rules() -> str:
            from .rendering import highlight_css

            return highlight_css()

        text = "" if self.renderer.missing else await self.readers.run(rules)
        return Response(text, headers=PAGE_HEADERS, media_type=KINDS[".css"])

    async def render(self, request: Request) -> Response:
        """Return the HTML of an answer, or of its beginning."""
        limits = self.dispatcher.limits
        small = dataclasses.replace(limits, body_bytes=min(MOST_BYTES, limits.body_bytes))
        fields = Fields(read_object(await read_body(request, small)))
        text = fields.text("text", "")
        return json_reply({"html": await self.renderer.html(text, fields.flag("unfinished"))})


def assemble(
    engine: Engine,
    served: ServedModels,
    defaults: Defaults,
    limits: Limits,
    guard: Guard,
    log_requests: bool = False,
    **describe: Any,
) -> tuple[Starlette, Dispatcher]:
    """Assemble a server: (the application, its dispatcher).

    The caller starts the dispatcher's worker. /v1/server shows `describe`.
    """
    states = States(limits.states)
    dispatcher = Dispatcher(Worker(engine), served, states, TokenNames(engine.tokenizer), limits)
    reader = RequestReader(engine.tokenizer, served.find, limits, defaults, states)
    routes = Routes(dispatcher, reader, describe)
    return make_app(routes.all(), guard, log_requests, dispatcher.metrics.refused, routes.close), dispatcher


def make_app(
    routes: list[Route],
    guard: Guard,
    log_requests: bool,
    refused: Callable[[int], None],
    close: Callable[[], Awaitable[None]],
) -> Starlette:
    """Make the application; `close` is called at its end. Nothing of it runs before a server does."""
    middleware = [Middleware(GuardMiddleware, guard=guard, refused=refused)]
    if guard.origins:
        cors = Middleware(
            CORSMiddleware, allow_origins=sorted(guard.origins), allow_methods=["*"], allow_headers=["*"]
        )
        middleware.insert(0, cors)
    if log_requests:
        middleware.insert(0, Middleware(RequestLog))

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await close()

    return Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={HTTPException: _http_error, Exception: _bug},
        lifespan=lifespan,
    )


async def _http_error(request: Request, error: Exception) -> Response:
    """Answer for a path that does not exist, or not with this method."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    methods = {name for route in request.app.routes if route.path_regex.match(path) for name in route.methods}
    allowed = ", ".join(sorted(methods))
    code, advice = "not_found", "the APIs' addresses begin with /v1, such as /v1/chat/completions"
    if methods:
        code, advice = "method_not_allowed", f"expected {allowed}"
    said = f"{request.method} {path[:80]!r}: {error.detail}; {advice}"
    refused = Refused(error.status_code, said, code=code, headers={"Allow": allowed} if methods else None)
    return error_reply(refused, request.url.path)


async def _bug(request: Request, error: Exception) -> Response:
    refused = failed("this is a bug of the server; its operator has the traceback")
    return error_reply(refused, request.url.path)
