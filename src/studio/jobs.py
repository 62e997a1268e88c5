"""Jobs of the training page: preview, plan, download, merge and export as processes of their programs."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from typing import IO, Any

from ..serving.errors import Refused
from .folders import ROOT

AT_ONCE, KEPT = 4, 32  # running jobs, and jobs that are remembered
LINES, TAIL = 50, 1 << 16  # lines of output that are shown, and the bytes that are read for them
UNFIT = re.compile("[\0\ud800-\udfff]")  # characters that no command line can have
PROGRESS = re.compile(r"(?P<text>.+?): +\d+%, (?P<done>[\d,]+) of (?P<total>[\d,]+)")


def tail(file: IO[bytes], most: int = TAIL) -> str:
    """Read the end of a file, from the beginning of a line on."""
    size = os.fstat(file.fileno()).st_size
    text = os.pread(file.fileno(), most, max(0, size - most)).decode(errors="replace")
    return text if size <= most else text.partition("\n")[2]


def shown_lines(text: str, most: int) -> list[str]:
    """Return the last lines that a program printed, each progress bar once, as it was drawn last."""
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    return [line[:2000] for line in lines if line.strip()][-most:]


def start(words: Sequence[str], out: IO | int, err: IO | int) -> subprocess.Popen:
    """Start a program of this project, which Ctrl-C of the server does not reach."""
    process = subprocess.Popen(
        [sys.executable, *words],
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=err,
        cwd=ROOT,
        start_new_session=True,
    )
    threading.Thread(target=process.wait, daemon=True).start()  # nobody else waits for its end
    return process


class Job:
    """Job with its process, whose output goes into files without a name."""

    def __init__(self, kind: str, words: Sequence[str], result: dict[str, Any]):
        self.id, self.kind, self.when_done = secrets.token_hex(8), kind, result
        self.out, self.err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        self.process = start(["-m", "src.studio.job", *words], self.out, self.err)

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def as_object(self) -> dict[str, Any]:
        code, lines = self.process.poll(), shown_lines(tail(self.err), LINES)
        printed = shown_lines(tail(self.out, 1 << 24), LINES) if code is not None else []
        result = None
        with contextlib.suppress(ValueError, IndexError):
            result = json.loads(tail(self.out, 1 << 24).rstrip().rpartition("\n")[2])
        # a plan that does not fit has the code 1
        done = code == 0 or code == 1 and self.kind == "plan" and result is not None
        if done and self.when_done:
            result = {**self.when_done, "lines": printed}
        error = next((line for line in reversed(lines) if line.startswith("error:")), (lines or [""])[-1])
        bar = PROGRESS.match(lines[-1]) if lines and code is None else None
        numbers = {name: int(bar[name].replace(",", "")) for name in ("done", "total")} if bar else {}
        return {
            "id": self.id,
            "kind": self.kind,
            "state": "running" if code is None else "done" if done else "failed",
            "progress": {"text": bar["text"], **numbers} if bar else None,
            "lines": lines,
            "result": result if done else None,
            "error": None if code is None or done else error.removeprefix("error: ") or f"ended with {code}",
        }

    def end(self) -> None:
        if self.is_running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGTERM)


class Jobs:
    """Jobs since the server's start. They end with it, and go on unseen after a SIGKILL."""

    def __init__(self) -> None:
        self.by_id: dict[str, Job] = {}

    def start(self, kind: str, words: Sequence[str], **result: Any) -> dict[str, str]:
        """Start a job that makes `result`, or prints it as JSON. Raises Refused if too many are running."""
        if sum(job.is_running for job in self.by_id.values()) >= AT_ONCE:
            raise Refused(429, f"{AT_ONCE} jobs are running; wait for one, or end it", code="too_many_jobs")
        ended = [name for name, job in self.by_id.items() if not job.is_running]
        for name in itertools.islice(ended, max(0, len(self.by_id) + 1 - KEPT)):
            del self.by_id[name]
        if any(map(UNFIT.search, words)):
            raise Refused(400, "a name has a character that no command line can have", code="invalid_value")
        try:
            job = Job(kind, words, result)
        except OSError as error:
            raise Refused(507, f"the job could not be started: {error.strerror}", code="no_room") from None
        self.by_id[job.id] = job
        return {"id": job.id}

    def find(self, name: str) -> Job:
        if name not in self.by_id:
            raise Refused(404, "this server has started no such job, or it is long over", code="not_found")
        return self.by_id[name]

    def close(self) -> None:
        for job in self.by_id.values():
            job.end()
