"""Routes of the training page."""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from rwkv_miss.errors import UserError
from rwkv_miss.files.hub_names import is_hub_name, recorded
from rwkv_miss.files.hub_names import parse as parse_hub_name
from rwkv_miss.version import VERSION

from ..config.parse import parse
from ..export import unfit
from ..serving.app import PAGE as CHAT_PAGE
from ..serving.app import page_file
from ..serving.duty import Duty
from ..serving.errors import Refused, wrong
from ..serving.fields import Fields, read_object
from ..serving.replies import error_reply, ignored_header, json_reply, read_body
from ..training.run_folder import MERGED, MODEL
from . import settings
from .folders import Folders
from .jobs import Jobs
from .runs import Run, Runs
from .trial import TriedModel

PAGE = pathlib.Path(__file__).parent / "page"
SAMPLES = 10  # rows that a preview shows
UPLOADS = 4  # uploads at once
WORKING = 30.0  # seconds that a request may take in the thread
MOST_POINTS = 5000  # points of a curve
EXPORTS = {"gguf": "merged.gguf", "safetensors": "merged.safetensors", "ai00": "merged.st"}


class Studio:
    """Endpoints of all routes. Endpoints without `await` run one after another in a thread."""

    def __init__(self, folders: Folders, operators: dict[str, str], trial: TriedModel, upload_bytes: int):
        self.folders, self.operators, self.trial = folders, operators, trial
        self.upload_bytes, self.uploads = upload_bytes, 0
        self.jobs, self.runs = Jobs(), Runs(folders, operators)
        self.duty = Duty("studio", WORKING)

    def all(self) -> list[Route]:
        run = "/studio/runs/{name:path}"
        return [
            self._route("/health", lambda request, fields: {"status": "ok"}),
            self._route("/studio", self.about),
            self._route("/studio/settings", lambda request, fields: settings.described()),
            self._route("/studio/models", lambda request, fields: self.folders.models()),
            self._route(
                "/studio/models",
                lambda request, fields: self.folders.model(fields.required("name")[0]),
                "POST",
            ),
            self._route("/studio/data", lambda request, fields: self.folders.data()),
            self._route("/studio/command", self.command, "POST"),
            self._route("/studio/jobs", self.start_job, "POST"),
            self._route("/studio/jobs/{id}", lambda request, fields: self._job(request).as_object()),
            self._route("/studio/jobs/{id}", self.end_job, "DELETE"),
            self._route("/studio/runs", lambda request, fields: self.runs.overviews()),
            self._route("/studio/runs", self.start_run, "POST", 201),
            self._route(f"{run}/stop", lambda request, fields: self.runs.stop(name_of(request)), "POST"),
            self._route(f"{run}/resume", lambda request, fields: self.runs.resume(name_of(request)), "POST"),
            self._route(f"{run}/files/{{file}}", self.download),
            self._route(run, self.details),
            self._awaited("/studio/data", self.receive, "POST"),
            self._awaited("/studio/try", self.tried),
            self._awaited(f"{run}/try", self.start_trial, "POST"),
            self._awaited("/", self.page),
            self._awaited("/page/{name}", self.page),
        ]

    def _route(
        self, path: str, endpoint: Callable[[Request, Fields], Any], method: str = "GET", status: int = 200
    ) -> Route:
        """Make a route whose endpoint takes the request and the fields of its body, in the thread."""

        async def in_thread(request: Request) -> Response:
            body = await read_body(request, self.trial.limits) if method == "POST" else b""
            fields = Fields(read_object(body or b"{}"))
            value = await self.duty.run(lambda: endpoint(request, fields))
            if isinstance(value, Response):
                return value
            return json_reply(value, status, ignored_header(fields.ignored()))

        return self._awaited(path, in_thread, method)

    def _awaited(self, path: str, endpoint: Callable[[Request], Awaitable[Any]], method: str = "GET"):
        """Make a route whose refusals become error objects."""

        async def answered(request: Request) -> Response:
            try:
                value = await endpoint(request)
                return value if isinstance(value, Response) else json_reply(value)
            except Refused as refused:
                return error_reply(refused, request.url.path)
            except UserError as error:
                return error_reply(Refused(400, str(error), code="invalid_value"), request.url.path)

        return Route(path, answered, methods=[method])

    async def close(self) -> None:
        self.jobs.close()
        await self.trial.close()

    async def page(self, request: Request) -> Response:
        return page_file(request.path_params.get("name", "studio.html"), PAGE, CHAT_PAGE)

    def about(self, request: Request, fields: Fields) -> dict[str, Any]:
        return {
            "folder": self.folders.work,
            "models_folders": self.folders.others,
            "version": VERSION,
            "cores": os.cpu_count(),
            "limits": {"upload_bytes": self.upload_bytes},
            "train_flags": [f"--{name}={text}" for name, text in self.operators.items()],
            "exports": list(EXPORTS),
        }

    async def receive(self, request: Request) -> dict[str, Any]:
        if self.uploads >= UPLOADS:
            raise Refused(429, f"{UPLOADS} files are on their way; try again later", code="too_many_uploads")
        self.uploads += 1
        try:
            name = request.query_params.get("name", "")
            return await self.folders.receive(request, name, self.upload_bytes, self.trial.limits.receiving)
        finally:
            self.uploads -= 1

    # jobs

    def _words(self, fields: Fields) -> tuple[str, list[str]]:
        name, folder = self.folders.new_run(fields.text("run") or "run")
        return name, self.runs.words(settings_in(fields), folder)

    def command(self, request: Request, fields: Fields) -> dict[str, Any]:
        """Write the command line that does what the page would, and what is wrong with it."""
        name, words = self._words(fields)
        problem = None
        try:
            parse(words)
        except UserError as error:
            problem = str(error)
        return {"command": settings.command(words), "problem": problem, "name": name}

    def start_job(self, request: Request, fields: Fields) -> dict[str, str]:
        kind = fields.choice("kind", ("preview", "plan", "fetch", "merge", "export")) or ""
        if kind in ("preview", "plan"):
            _, words = self._words(fields)
            if kind == "preview":
                words += ["--samples", str(fields.integer("samples", 0, 100, SAMPLES))]
            return self.jobs.start(kind, [f"scripts.{kind}", "--json", *words])
        if kind == "fetch":
            (name,) = fields.required("name")
            if not is_hub_name(name):
                raise wrong("name", f"got {name[:80]!r}, expected hf://OWNER/NAME/FILE")
            repo_type = fields.choice("type", ("model", "dataset")) or "model"
            parse_hub_name(name, repo_type)
            return self.jobs.start(kind, ["fetch", name, repo_type])
        if kind not in ("merge", "export"):
            raise wrong("kind", "is missing, expected preview, plan, fetch, merge or export")
        run = self.runs.find(fields.required("run")[0])
        return self._merge(run) if kind == "merge" else self._export(run, fields)

    def _merge(self, run: Run) -> dict[str, str]:
        adapter = run.trained()
        words = ["--base", self._base(run), "--adapter", adapter, "--out", run.path(MERGED)]
        return self.jobs.start("merge", ["rwkv_miss", "merge", *words], run=run.name, file=MERGED)

    def _export(self, run: Run, fields: Fields) -> dict[str, str]:
        to = fields.choice("to", EXPORTS) or "gguf"
        model = run.trained() if run.leaves_models else run.path(MERGED)
        if not os.path.isfile(model):
            raise Refused(409, f"{run.name} has no {MERGED}; merge it first", code="not_merged")
        words = ["scripts.export", "--model", model, "--to", to, "--out", run.path(EXPORTS[to])]
        return self.jobs.start("export", words, run=run.name, file=EXPORTS[to])

    def _blocked(self, run: Run) -> dict[str, str]:
        """Tell why a run's model can't be merged, and why not exported to GGUF; "" where nothing is known."""
        merge, whole = "", next(filter(os.path.isfile, map(run.path, (MODEL, MERGED))), "")
        try:
            base = self._base(run)
        except Refused as refused:
            merge, base = str(refused), ""
        model, config = whole or base, run.config
        if not os.path.exists(model):  # a name of the hub is not known before it is fetched
            return {"merge": merge, "export": merge if config.load_model else ""}
        has_state = not whole and (config.peft == "state" or config.state_learning_rate is not None)
        reason = unfit(model, "gguf", has_state)
        return {"merge": merge, "export": reason.replace(model, os.path.basename(model))}

    def _base(self, run: Run) -> str:
        # the run's record has the commit of an hf:// name
        model = recorded(run.config.load_model) or run.typed().get("load_model")
        if not model:
            raise Refused(409, f"{run.name} trains a new model, which has no base", code="no_base")
        return self.folders.named("load_model", str(model))

    def _job(self, request: Request):
        return self.jobs.find(request.path_params["id"])

    def end_job(self, request: Request, fields: Fields) -> dict[str, Any]:
        self._job(request).end()
        return {"id": request.path_params["id"]}

    # runs

    def start_run(self, request: Request, fields: Fields) -> dict[str, str]:
        (name,) = fields.required("name")
        return self.runs.start(name, settings_in(fields))

    def details(self, request: Request, fields: Fields) -> dict[str, Any]:
        query = {"points": 400, "from": 0, "to": math.inf, **request.query_params}
        try:
            points, begin, end = (float(query[name]) for name in ("points", "from", "to"))
            points = int(min(max(points, 10), MOST_POINTS))
        except ValueError:
            raise wrong("points", "expected a number, as for from and to") from None
        run = self.runs.find(name_of(request))
        blocked = {} if run.is_alive else {"blocked": self._blocked(run)}
        return {**run.details(points, begin, end), **blocked}

    def download(self, request: Request, fields: Fields) -> Response:
        path = self.folders.file_of_run(name_of(request), request.path_params["file"])
        name = os.path.basename(path)
        headers = {"X-Content-Type-Options": "nosniff"}
        return FileResponse(path, filename=name, media_type="application/octet-stream", headers=headers)

    async def tried(self, request: Request) -> dict[str, Any]:
        return self.trial.as_object()

    async def start_trial(self, request: Request) -> dict[str, Any]:
        def files() -> tuple[str, str | None]:
            run = self.runs.find(name_of(request))
            trained = run.trained()
            return (trained, None) if run.leaves_models else (self._base(run), trained)

        model, adapter = await self.duty.run(files)
        return self.trial.start(name_of(request), model, adapter)


def settings_in(fields: Fields) -> dict[str, Any]:
    inner = fields.inner("settings")
    return inner.values if inner else {}


def name_of(request: Request) -> str:
    return request.path_params["name"]
