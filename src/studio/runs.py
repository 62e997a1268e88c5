"""Runs of the training page: a run's folder as JSON, and a run's start, stop and continuation.

Nothing is remembered but the places up to which files were read: a server that is killed and started again
finds every run as it is.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping
from typing import IO, Any

from rwkv_miss.errors import UserError
from rwkv_miss.files.hub_names import recorded

from ..common.bounded_files import NUMBER, open_regular, read_object, read_objects
from ..common.files import write_text
from ..config.parse import command as full_command
from ..config.parse import parse, recorded_settings
from ..config.schema import FIELDS, Config
from ..serving.errors import Refused
from ..training.run_folder import (
    ADAPTER,
    CHECKPOINTS,
    CONFIG,
    METRICS,
    MODEL,
    RUNNING,
    RUNNING_KINDS,
    SUMMARY,
    list_checkpoints,
    running,
)
from ..training.validation_log import VALIDATION
from . import jobs, settings
from .curves import MetricColumns
from .folders import ROOT, STARTED, Folders

LOG = "train.log"
AT_ONCE = 4  # runs that the page has started and that have not ended
LOG_LINES = 60
# fields that the page takes from a run's files, and their types
STARTED_KINDS = {"started": NUMBER, "stopped": NUMBER, "pid": int, "settings": dict, "words": list}
SUMMARY_KINDS = dict.fromkeys(("steps", "planned_steps", "best_step"), int) | {"best": str, "plan": list}
EVALUATION_KINDS = {"step": int, "loss": (*NUMBER, type(None))}
SHOWN = (".pth", ".gguf", ".safetensors", ".md", ".json", ".jsonl", ".yaml", ".png", ".log")


def read_config(path: str) -> tuple[Config, Mapping[str, str]]:
    """Read the settings that a run has recorded, and why it chose those that it did."""
    recorded = recorded_settings(path)
    return recorded.settings, recorded.chosen


def lock_log(folder: str):
    """Open a run's log for its process, and lock it until that process and its children have ended.

    Returns None if one of them is running. The lock belongs to the open file, which they inherit. Raises
    Refused if something else is in its place.
    """
    try:
        log = open_regular(os.path.join(folder, LOG), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    except OSError as error:
        reason = f"{folder}/{LOG} can't be written: {error.strerror}; remove it"
        raise Refused(409, reason, "name", "folder_in_use") from None
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        log.close()
        return None
    return log


def is_started(folder: str) -> bool:
    """Tell whether a process that the page has started has not ended yet."""
    try:
        with open_regular(os.path.join(folder, LOG)) as log:
            fcntl.flock(log, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is no log, or this user may not read it
        pass
    return False


class Run:
    """Run in a folder, as it was at the last update()."""

    def __init__(self, name: str, folder: str):
        self.name, self.folder = name, folder
        self.metrics = MetricColumns(os.path.join(folder, METRICS))
        self.files_read: dict[str, tuple[tuple, Any]] = {}  # file -> (its state, what was read, or None)
        self.updating = threading.Lock()
        self.update()

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def read(self, name: str, read: Callable[[str], Any], otherwise: Any) -> Any:
        """Read a file if it has changed; `otherwise` if it can't be read."""
        try:
            stat = os.stat(self.path(name))
        except OSError:
            return otherwise
        state = stat.st_ino, stat.st_size, stat.st_mtime_ns
        if name not in self.files_read or self.files_read[name][0] != state:
            self.files_read[name] = state, None  # a file that can't be read is not read again, either
            with contextlib.suppress(OSError, ValueError):
                self.files_read[name] = state, read(self.path(name))
        value = self.files_read[name][1]
        return otherwise if value is None else value

    def update(self) -> None:
        """Read what is new in the folder, unless a request that was given up still does so."""
        if not self.updating.acquire(blocking=False):
            return
        try:
            self._update()
        finally:
            self.updating.release()

    def _update(self) -> None:
        self.metrics.update()
        self.holder, self.started = running(self.folder), self._object(STARTED, STARTED_KINDS)
        self.running_json = self.holder or self._object(RUNNING, RUNNING_KINDS)
        self.summary = self._object(SUMMARY, SUMMARY_KINDS)
        self.is_alive = self.holder is not None or is_started(self.folder)
        self.history = self.read(VALIDATION, lambda path: [*read_objects(path, EVALUATION_KINDS)], [])
        self.config, self.chosen = self.read(CONFIG, read_config, (Config(), {}))

    def _object(self, name: str, kinds: Mapping[str, Any]) -> dict[str, Any]:
        return self.read(name, lambda path: read_object(path, kinds), {})

    def typed(self) -> dict[str, Any]:
        """Return the settings that somebody has typed, as texts."""
        if "settings" in self.started:
            return self.started["settings"]
        default = Config()
        return {
            name: value if isinstance(value, str) else json.dumps(value)
            for name in FIELDS
            if name not in (*self.chosen, "proj_dir", "resume")
            and (value := recorded(self.config.written(name))) != default.written(name)
        }

    @property
    def step(self) -> int:
        return int(self.metrics.last("step") or 0)

    @property
    def state(self) -> str:
        if self.is_alive:
            since = (self.holder or self.started).get("started", math.inf)
            if self.started.get("stopped", 0) > since:
                return "stopping"
            with contextlib.suppress(OSError):
                if self.step and os.path.getmtime(self.metrics.path) > since:
                    return "running"
            return "starting"
        if self.summary and self.summary.get("steps", 0) >= self.step:
            return "done" if "verdict" in self.summary else "stopped"
        return "stopped" if self.started.get("stopped") else "failed"

    @property
    def best_step(self) -> int | None:
        """The step of best.pth, if later steps made it no better."""
        best, steps = self.summary.get("best_step"), self.summary.get("steps", 0)
        return best if best is not None and best < steps else None

    def overview(self) -> dict[str, Any]:
        config, state, typed = self.config, self.state, self.typed()
        evaluated = [line["loss"] for line in self.history]
        return {
            "name": self.name,
            "state": state,
            "step": self.step,
            "steps": self.running_json.get("steps") or self.summary.get("planned_steps"),
            "loss": self.metrics.last("loss"),
            "reward": self.metrics.last("reward"),
            "held_out": evaluated[-1] if evaluated else None,
            "started": self.started.get("started") or self.running_json.get("started") or self._written(),
            "peft": typed.get("peft", config.peft),
            "model": typed.get("load_model", ""),
            "verdict": self.summary.get("verdict") if state == "done" else None,
            "can_stop": self.is_alive,
            "can_resume": state in ("stopped", "failed"),
        }

    def _written(self) -> float | None:
        with contextlib.suppress(OSError):
            return os.path.getmtime(self.path(CONFIG))
        return None

    def details(self, points: int, begin: float, end: float) -> dict[str, Any]:
        config, step = self.config, None if self.is_alive else self.best_step
        last = [line for line in self.history if line["step"] == step] or self.history[-1:]
        ends = {id(line) for line in (*self.history[:1], *last)}
        words = [word for word in self.started.get("words", []) if isinstance(word, str)]
        return {
            **self.overview(),
            "plan": self.running_json.get("plan") or self.summary.get("plan") or [],
            "curves": self.metrics.thinned(points, begin, end),
            "evaluations": [
                {**line, "samples": line.get("samples", []) if id(line) in ends else []}
                for line in self.history
            ],
            "best_step": step,
            "has_checkpoint": bool(list_checkpoints(self.path(CHECKPOINTS))),
            "log": self.log(),
            "command": settings.command(words) if words else full_command(config),
            "chosen": {
                name: {"value": recorded(config.written(name)), "why": why}
                for name, why in self.chosen.items()
            },
            "files": self.files(),
            "settings": self.typed(),
        }

    def log(self) -> list[str]:
        with contextlib.suppress(OSError), open_regular(self.path(LOG)) as file:
            return jobs.shown_lines(jobs.tail(file), LOG_LINES)
        return []

    def files(self) -> list[dict[str, Any]]:
        """List the files that can be downloaded, the largest ones first."""
        files = [
            {"name": entry.name, "bytes": entry.stat().st_size}
            for entry in os.scandir(self.folder)
            if entry.is_file(follow_symlinks=False) and entry.name.endswith(SHOWN)
        ]
        return sorted(files, key=lambda file: -file["bytes"])

    @property
    def leaves_models(self) -> bool:
        """Tell whether the run trains the whole model: its files, best.pth too, are models, not adapters."""
        return self.config.peft == "none"

    def trained(self) -> str:
        """Return the trained file that is worth using. Raises Refused without one."""
        best = [] if self.best_step is None else [os.path.basename(self.summary.get("best", ""))]
        for name in (*best, ADAPTER, MODEL):
            if os.path.isfile(self.path(name)):
                return self.path(name)
        raise Refused(409, f"the run {self.name} has no trained file yet", code="nothing_trained")


class Runs:
    """All runs of the work folder."""

    def __init__(self, folders: Folders, operators: Mapping[str, str]):
        self.folders, self.operators = folders, operators
        self.by_folder: dict[str, Run] = {}

    def find(self, name: str) -> Run:
        """Return a run as it is now. Raises Refused if there is none."""
        folder = self.folders.run(name)
        if folder in self.by_folder:
            self.by_folder[folder].update()
        else:
            self.by_folder[folder] = Run(name, folder)
        return self.by_folder[folder]

    def overviews(self) -> list[dict[str, Any]]:
        """List all runs, the newest ones first."""
        runs = []
        for name in self.folders.runs():
            with contextlib.suppress(Exception):  # the run was just removed, or its files hold anything
                run = self.find(name).overview()
                runs.append((-float(run["started"] or 0), name, run))
        return [run for _, _, run in sorted(runs)]

    def words(self, typed: Mapping[str, Any], folder: str) -> list[str]:
        """Return the command line of a run. Raises Refused for settings that the page may not set."""
        return [*settings.flags(typed, self.folders, self.operators), f"--proj_dir={folder}"]

    def start(self, name: str, typed: Mapping[str, Any]) -> dict[str, str]:
        """Start a run in a new folder."""
        name, folder = self.folders.new_run(name)
        words = self.words(typed, folder)
        parse(words)  # with all its rules, as train.py does
        if os.path.isdir(folder) and os.listdir(folder):
            used = running(folder) or is_started(folder)
            reason = "is in use by a run" if used else "holds files of another run"
            raise Refused(409, f"{name} {reason}; choose another name", "name", "folder_in_use")
        self._start(name, folder, words, typed)
        return {"name": name}

    def resume(self, name: str) -> dict[str, str]:
        """Go on with a run that has stopped, or start one again that came to no checkpoint."""
        run = self.find(name)
        if run.is_alive:
            raise Refused(409, f"{name} is in use by a run; stop it first", code="folder_in_use")
        if run.state == "done":
            raise Refused(409, f"{name} has ended; start a new run for more steps", code="run_ended")
        words = [*self.words(run.typed(), run.folder), "--resume=auto"]
        parse(words)
        self._start(name, run.folder, words, run.typed())
        return {"name": name}

    def _start(self, name: str, folder: str, words: list[str], typed: Mapping[str, Any]) -> None:
        work = self.folders.work
        if sum(is_started(os.path.join(work, other)) for other in self.folders.runs()) >= AT_ONCE:
            raise Refused(429, f"{AT_ONCE} runs are going; wait for one, or stop it", code="too_many_runs")
        try:
            os.makedirs(folder, exist_ok=True)
            log = lock_log(folder)
            if log is None:
                raise Refused(409, f"{name} is in use by a run; choose another name", "name", "folder_in_use")
            with log:
                self._start_locked(folder, log, words, typed)
        except (OSError, UserError) as error:
            raise Refused(
                507, f"{name} was not started: {getattr(error, 'strerror', error)}", code="no_room"
            ) from None

    def _start_locked(self, folder: str, log: IO, words: list[str], typed: Mapping[str, Any]) -> None:
        """Start a run whose log is locked. A failure to write leaves no process, and no new folder."""
        is_new, process = os.listdir(folder) == [LOG], None
        said = {"started": time.time(), "settings": dict(typed), "words": words}
        path = os.path.join(folder, STARTED)
        try:
            write_text(path, json.dumps(said))
            log.write(f"$ {settings.command(words)}\n".encode())  # lines after this one are of this start
            log.flush()
            process = jobs.start([os.path.join(ROOT, "train.py"), *words], log, log)
            write_text(path, json.dumps({**said, "pid": process.pid}))
        except BaseException:
            if process:
                with contextlib.suppress(ProcessLookupError):  # the process has ended already
                    os.killpg(process.pid, signal.SIGKILL)
            if is_new:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def stop(self, name: str) -> dict[str, str]:
        """Let a run save and end. Before its first step it ends at once."""
        run = self.find(name)
        if not run.is_alive:
            raise Refused(409, f"no process of the run {name} is going", code="not_running")
        process = (run.holder or run.started).get("pid")
        if not isinstance(process, int) or not 2 <= process < 1 << 31:
            raise Refused(409, f"no file of {name} says which process it is", code="not_running")
        # not SIGINT, which is ignored in children of a server that was started in the background
        try:
            os.kill(process, signal.SIGTERM)
        except ProcessLookupError:  # only children are left: their group still has the number of the process
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
        except PermissionError:
            raise Refused(409, f"{name} is a run of another user, who can stop it", code="not_ours") from None
        if run.started:
            write_text(run.path(STARTED), json.dumps({**run.started, "stopped": time.time()}))
        return {"name": name}
