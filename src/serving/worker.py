"""Worker: the one thread that runs the engine, and its exchange with the server's event loop.

The engine is not for two threads. Calls of the loop go through a queue; the engine's results come back by
loop.call_soon_threadsafe. An idle engine waits at the queue and takes no time.

A step that fails ends the requests that the engine had, and the engine goes on with the next ones. If none
of them gets on before the next failure, the process has to end: see `fatal`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import queue
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple

from rwkv_miss.files.mapped import ChangedFile

from ..inference.constraint import TooSlow
from ..inference.engine import Answer, Engine, Request
from ..model import State


class Piece(NamedTuple):
    """New part of one answer of a job."""

    index: int  # number of the answer, counted over all requests of the job
    text: str
    tokens: int
    drawn: Sequence[Any]  # the new tokens, if log-probabilities were asked for
    finish: str  # why the answer ended; "" while it goes on
    error: str
    cached_tokens: int
    prompt_logprobs: Sequence[Any] = ()  # with the answer's first piece, if asked for
    stop: str = ""  # the stop text that ended the answer
    state: State | None = None  # the state after the prompt, if the request asks for it
    status: int = 500  # HTTP status of an error


class EngineJob:
    """Job for the engine: requests that one client has made together. It belongs to the event loop."""

    def __init__(self, worker: Worker, requests: Sequence[Request]):
        self.worker, self.requests = worker, requests
        self.loop = asyncio.get_running_loop()
        self.unfinished = sum(request.n for request in requests)
        self.arrived: asyncio.Queue[list[Piece]] = asyncio.Queue()
        self.answers: list[Answer] = []  # only the worker's thread uses them

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """Yield new pieces until all answers are finished."""
        while self.unfinished:
            pieces = await self.arrived.get()
            while not self.arrived.empty():
                pieces = [*pieces, *self.arrived.get_nowait()]
            self.unfinished -= sum(bool(piece.finish) for piece in pieces)
            yield pieces

    def cancel(self) -> None:
        """Free the rows of unfinished answers. Nothing more comes."""
        if self.unfinished:
            self.unfinished = 0
            self.worker.post(lambda: self.worker.forget(self, "cancelled"))

    def end(self) -> None:
        """Finish the answers as they are: a listening client is told "cancelled"."""
        self.worker.post(lambda: self.worker.forget(self, "cancelled"))


class _Followed(NamedTuple):
    job: EngineJob
    index: int
    answer: Answer


class Worker:
    """Worker that runs an engine in a thread of its own, from start() until close()."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # by id() of an unfinished answer; `sent`: the characters and tokens that its job has received
        self.followed: dict[int, _Followed] = {}
        self.sent: dict[int, tuple[int, int]] = {}
        self.broken = ""  # the message to clients from the fatal error on
        self.fatal: Exception | None = None  # why the whole server has to end
        self.steps = self.failures = 0
        self.went_well = True  # whether a step went well since the last failure
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def close(self) -> None:
        """End the thread after its present work."""
        self.post(None)
        self.thread.join()

    def post(self, work: Callable[[], None] | None) -> None:
        """Queue work for the time between two steps."""
        self.inbox.put(work)

    async def call(self, work: Callable[[], Any], undo: Callable[[], None]) -> Any:
        """Run work() between two steps, and return its result or raise its error.

        If the caller is cancelled before that, work() is left out. If later, undo() runs after it.
        """
        future: concurrent.futures.Future = concurrent.futures.Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        def undo_what_was_done() -> None:
            if not future.cancelled() and not future.exception():
                undo()

        self.post(run)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            self.post(undo_what_was_done)
            raise

    async def submit(self, requests: Sequence[Request]) -> EngineJob:
        """Start a job. Raises UserError if the engine refuses one of its requests; then none of them runs."""
        job = EngineJob(self, requests)
        await self.call(lambda: self._submit(job), lambda: self.forget(job, "cancelled"))
        return job

    def _submit(self, job: EngineJob) -> None:
        if self.broken:
            raise RuntimeError(self.broken)
        try:
            for request in job.requests:
                job.answers += self.engine.submit(request)
        except BaseException:
            for answer in job.answers:
                self.engine.cancel(answer)
            raise
        for index, answer in enumerate(job.answers):
            self.followed[id(answer)] = _Followed(job, index, answer)
            self.sent[id(answer)] = 0, 0

    def forget(self, job: EngineJob, finish: str, error: str = "") -> None:
        """End the rest of a job, in the worker's thread."""
        ended = []
        for index, answer in enumerate(job.answers):
            if self.followed.pop(id(answer), None):
                self.sent.pop(id(answer))
                self.engine.cancel(answer)
                ended.append(Piece(index, "", 0, (), finish, error, 0))
        self._deliver(job, ended)

    def _run(self) -> None:
        while True:
            wait = self.engine.idle or bool(self.broken)
            try:
                work = self.inbox.get(block=wait)
            except queue.Empty:
                work = self._step
            if work is None:
                return
            try:
                work()
            except Exception as error:  # a bug, or memory ran out: no client may wait for ever
                self._fail(error)

    def _step(self) -> None:
        changed = self.engine.step()
        self.steps += 1
        # a first token says that prompts can be read, and not yet that rows can go on
        self.went_well |= any(len(one.tokens) > 1 or one.finish in ("stop", "length") for one in changed)
        by_job: dict[int, tuple[EngineJob, list[Piece]]] = {}
        for answer in changed:
            followed = self.followed.get(id(answer))
            if followed:
                by_job.setdefault(id(followed.job), (followed.job, []))[1].append(self._piece(followed))
        for job, pieces in by_job.values():
            self._deliver(job, pieces)

    def _piece(self, followed: _Followed) -> Piece:
        answer, key = followed.answer, id(followed.answer)
        characters, tokens = self.sent[key]
        finish, error = answer.finish, str(answer.error or "")
        piece = Piece(
            followed.index,
            answer.text[characters:],
            len(answer.tokens) - tokens,
            tuple(answer.logprobs[tokens:]) if answer.logprobs else (),
            finish,
            error,
            answer.cached_tokens,
            () if tokens else answer.prompt_logprobs,
            answer.stop,
            state=answer.state if answer.request.keep_state else None,
            status=400 if isinstance(answer.error, TooSlow) else 500,
        )
        self.sent[key] = len(answer.text), len(answer.tokens)
        if finish:
            del self.followed[key], self.sent[key]
        return piece

    def _fail(self, error: Exception) -> None:
        """End all requests of the engine with an error, and make it ready for the next ones.

        It is fatal if a file of the model changed, if nothing went well since the last failure, or if the
        engine can't be made ready.
        """
        self.failures += 1
        if isinstance(error, ChangedFile):
            # only the server's operator is told which file
            self.fatal, self.broken = error, "the server ends, because a file of its model was overwritten"
        else:
            traceback.print_exc()
            if not self.went_well or not self._is_reset():
                self.fatal = error
                self.broken = f"the engine failed again: {type(error).__name__}; the server ends"
        self.went_well = False
        failed = f"the engine failed: {type(error).__name__}; this ended all requests that it had, try again"
        message = self.broken or failed
        for job in {id(one.job): one.job for one in self.followed.values()}.values():
            pieces = [
                Piece(index, "", 0, (), "error", message, 0)
                for index, answer in enumerate(job.answers)
                if id(answer) in self.followed
            ]
            self._deliver(job, pieces)
        self.followed.clear()
        self.sent.clear()

    def _is_reset(self) -> bool:
        """Make the engine drop what it had; returns False if it can't."""
        try:
            self.engine.reset()
        except Exception:
            traceback.print_exc()
            return False
        return True

    @staticmethod
    def _deliver(job: EngineJob, pieces: list[Piece]) -> None:
        if not pieces:
            return
        try:
            job.loop.call_soon_threadsafe(job.arrived.put_nowait, pieces)
        except RuntimeError:  # the loop is closed: nobody listens any more
            pass
