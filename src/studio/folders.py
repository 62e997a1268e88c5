"""Folders of the training page: the paths that may be named, the models and data in them, and uploads."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Sequence

from starlette.requests import ClientDisconnect, Request

from rwkv_miss.errors import UserError
from rwkv_miss.files.checkpoint import Arch
from rwkv_miss.files.hub_names import is_hub_name

from ..data.formats.sources import SUFFIXES, weighted_paths
from ..model import read_model_file
from ..serving.errors import Refused, wrong
from ..training.run_folder import CHECKPOINTS, CONFIG, RUNNING

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # of train.py
STARTED = "studio.json"  # of a run that the page has started
DATA, RUNS = "data", "runs"
DEPTH, MOST = 3, 1000  # folders below each other and files that are looked at
NAME = re.compile(r"\w[\w.-]{0,79}")


class Folders:
    """The work folder, which is written to, and other folders, which are only read."""

    def __init__(self, work: str, others: Sequence[str] = ()):
        with contextlib.suppress(OSError):
            os.makedirs(work, exist_ok=True)
        for folder in (work, *others):
            if not os.path.isdir(folder):
                raise UserError(f"{folder} is no folder, and none can be made there; give another one")
        self.work, *self.others = map(os.path.realpath, (work, *others))
        self.seen: dict[tuple, str] = {}  # (path, time, size) of a model -> what it is

    def allowed(self, path: str) -> str | None:
        """Return the path without links if it is there and in one of the folders, else None."""
        try:
            real = os.path.realpath(path)
            is_inside = any(os.path.commonpath([real, root]) == root for root in (self.work, *self.others))
            return real if is_inside and os.path.exists(real) else None
        except ValueError:  # a NUL character, or another drive
            return None

    def named(self, setting: str, text: str) -> str:
        """Return what a setting that names a file says, with its path. Raises Refused for other places."""
        if not text or is_hub_name(text):
            return text
        # train.py takes a relative path from the folder that it is started in, which was this one before
        paths = (self.allowed(os.path.join(root, text)) for root in (*self.roots, ROOT))
        if found := next(filter(None, paths), None):
            return found
        if re.fullmatch(r"[\w-]+", text) and not os.path.exists(os.path.join(ROOT, text)):
            return text  # a word, such as world for a tokenizer
        raise wrong(
            setting,
            f"{text[:200]!r} is not in {', '.join(self.roots)}; choose a file there, an hf:// name, or start"
            " the server with --models FOLDER",
        )

    @property
    def roots(self) -> list[str]:
        return [self.work, *self.others]

    def named_data(self, setting: str, text: str) -> str:
        """Return named() of data, which may be several files with weights: a.jsonl:2,b.csv."""
        try:
            parts = weighted_paths(text) if "," in text or ":" in text else [(text, 1.0)]
        except UserError as error:
            raise wrong(setting, str(error)) from None
        paths = [(self.named(setting, path), weight) for path, weight in parts]
        return ",".join(path if weight == 1 else f"{path}:{weight:g}" for path, weight in paths)

    # runs

    def run(self, name: str) -> str:
        """Return the folder of a run. Raises Refused if there is none in the work folder."""
        folder = self.allowed(os.path.join(self.work, name)) or ""
        if not folder.startswith(self.work + os.sep) or not is_run(folder) or self._is_data(folder):
            raise Refused(404, f"there is no run {name[:80]!r}", code="not_found")
        return folder

    def new_run(self, name: str) -> tuple[str, str]:
        """Return (name, folder) of a run to be, which is in runs/."""
        name = name.removeprefix(f"{RUNS}/")
        folder = os.path.join(self.work, RUNS, name)
        if not NAME.fullmatch(name) or os.path.realpath(folder) != folder:
            raise wrong("name", f"got {name[:80]!r}, expected letters, digits, - and _, such as first-try")
        return f"{RUNS}/{name}", folder

    def _is_data(self, folder: str) -> bool:
        return os.path.relpath(folder, self.work).split(os.sep)[0] == DATA

    def runs(self) -> list[str]:
        """Name all runs in the work folder."""
        found = [folder for folder, _, _ in walk(self.work) if folder != self.work and is_run(folder)]
        names = [os.path.relpath(folder, self.work) for folder in found if not self._is_data(folder)]
        return [name.replace(os.sep, "/") for name in names]

    def file_of_run(self, name: str, file: str) -> str:
        """Return the path of a file right in a run's folder. Raises Refused for others."""
        folder = self.run(name)
        real = os.path.realpath(os.path.join(folder, file)) if "\0" not in file else ""
        if os.path.dirname(real) != folder or not os.path.isfile(real) or file.startswith("."):
            raise Refused(404, f"the run {name} has no file {file[:80]!r}", code="not_found")
        return real

    # models and data

    def models(self) -> list[dict]:
        """List the models in all folders."""
        found = []
        for root in self.roots:
            for folder, _, files in walk(root):
                if os.path.basename(folder) == CHECKPOINTS:
                    continue
                paths = [os.path.join(folder, file) for file in sorted(files) if file.endswith(".pth")]
                if "config.json" in files:
                    paths.append(folder)
                found += filter(None, map(self._model, paths))
        return found[:MOST]

    def _model(self, path: str) -> dict | None:
        """Describe a model file or folder; None for anything else."""
        real = self.allowed(path)
        if real is None:
            return None
        stat = os.stat(real)
        key = (real, stat.st_mtime_ns, stat.st_size)
        if key not in self.seen:
            try:
                arch = Arch.detect(read_model_file(real))
                self.seen[key] = f"RWKV-{arch.version}, {arch.n_layer} layers, width {arch.n_embd}"
            except (UserError, OSError):  # an adapter, or no model at all
                self.seen[key] = ""
        size = stat.st_size if os.path.isfile(real) else sum(e.stat().st_size for e in os.scandir(real))
        described = {"path": real, "name": self.shown(real), "bytes": size, "about": self.seen[key]}
        return described if self.seen[key] else None

    def data(self) -> list[dict]:
        """List the files of data in all folders, outside of runs."""
        found = []
        for root in self.roots:
            for folder, folders, files in walk(root):
                if is_run(folder) and not self._is_data(folder):
                    folders.clear()
                    continue
                if "config.json" in files:  # a model's folder
                    continue
                paths = [os.path.join(folder, file) for file in sorted(files) if file.endswith(SUFFIXES)]
                for real in filter(None, map(self.allowed, paths)):
                    found.append({"path": real, "name": self.shown(real), "bytes": os.path.getsize(real)})
        return found[:MOST]

    def shown(self, path: str) -> str:
        """Return a path without its folder's."""
        root = next(root for root in self.roots if os.path.commonpath([path, root]) == root)
        return os.path.relpath(path, root)

    # uploads

    async def receive(self, request: Request, name: str, most: int, patience: float) -> dict:
        """Write a request's body into a new file of the data. A failure raises Refused and leaves nothing."""
        base, suffix = os.path.splitext(os.path.basename(name.replace("\\", "/")))
        base = re.sub(r"[^\w-]+", "-", base).strip("-")[:80]
        if suffix.lower() not in SUFFIXES or not base:
            raise wrong("name", f"got {name[:80]!r}, expected a file of data: {', '.join(SUFFIXES)}")
        close = {"Connection": "close"}
        too_large = f"the file is larger than the {most:,} bytes that --limit_upload allows"
        refused = Refused(413, too_large, code="request_too_large", headers=close)
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > most:
            raise refused
        folder, size = os.path.join(self.work, DATA), 0
        os.makedirs(folder, exist_ok=True)
        parts = request.stream()
        with temporary(folder) as (file, path):
            try:
                while part := await asyncio.wait_for(anext(parts, b""), patience):
                    size += len(part)
                    if size > most:
                        raise refused
                    file.write(part)
                file.close()
            except asyncio.TimeoutError:
                late = f"nothing of the file arrived for {patience:g} seconds"
                raise Refused(408, late, code="request_timeout", headers=close) from None
            except ClientDisconnect:
                raise Refused(400, "the client left before its file was complete") from None
            except OSError as error:
                said = f"the file could not be written: {error.strerror}"
                raise Refused(507, said, code="no_room", headers=close) from None
            if not size:
                raise wrong("body", "the file is empty")
            target = place_in(folder, path, base, suffix.lower())
        return {"path": target, "name": self.shown(target), "bytes": size}


def is_run(folder: str) -> bool:
    return any(os.path.isfile(os.path.join(folder, name)) for name in (CONFIG, RUNNING, STARTED))


def walk(root: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walk through a folder and those below it as os.walk does, to a depth and without hidden ones."""
    looked = 0
    for folder, folders, files in os.walk(root):
        depth = os.path.relpath(folder, root).count(os.sep) + (folder != root)
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if depth < DEPTH else []
        yield folder, folders, files
        looked += len(files) + 1
        if looked > MOST * 10:
            return


@contextlib.contextmanager
def temporary(folder: str):
    """Open a new file with a name of its own, which is removed at the end."""
    number, path = tempfile.mkstemp(".tmp", ".upload-", folder)
    try:
        with os.fdopen(number, "wb") as file:
            yield file, path
    finally:
        with contextlib.suppress(OSError):
            os.remove(path)


def place_in(folder: str, path: str, base: str, suffix: str) -> str:
    """Give a file a name that no other has: base, base-2, base-3 and so on."""
    number = 1
    while True:
        target = os.path.join(folder, f"{base}{f'-{number}' if number > 1 else ''}{suffix}")
        try:
            os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            number += 1
            continue
        os.chmod(path, 0o644)
        os.replace(path, target)
        return target
