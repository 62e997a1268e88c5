"""Folders of the training page: the paths that may be named, the models and data in them, and uploads."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import pathlib
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from starlette.requests import ClientDisconnect, Request

from rwkv_miss.errors import UserError
from rwkv_miss.files.checkpoint import Arch
from rwkv_miss.files.hub_names import is_hub_name

from ..data.formats.sources import SUFFIXES, files_in, may_have_records, weighted_paths
from ..model import read_model_file
from ..serving.errors import Refused, wrong
from ..training.run_folder import CONFIG, RUNNING

ROOT = str(pathlib.Path(__file__).resolve().parents[2])  # the folder of train.py
STARTED = "studio.json"  # a file in the folder of a run that the page has started
DATA, RUNS = "data", "runs"
DEPTH, MOST_FOLDERS, MOST = 3, 10_000, 1000  # folders below each other and in all, files in a list
UPLOADS, FORGOTTEN = ".upload-", 3600  # files on their way, and after how many seconds one is left over
SLOWEST = 16 << 10  # bytes a second of a file on its way, on average
TO_DROP = tuple(suffix for suffix in SUFFIXES if suffix != ".bin")  # a .bin needs its .idx, too
NAME = re.compile(r"\w[\w.-]{0,79}")
NAME_BYTES = 200  # bytes of a new file's or folder's name: systems allow 255, and a suffix may be added


class Folders:
    """The work folder, which is written to, and other folders, which are only read."""

    def __init__(self, work: str, others: Sequence[str] = ()):
        for folder in others:
            if not os.path.isdir(folder):
                raise UserError(f"--models {folder} is no folder; make it, or give another one")
        try:
            os.makedirs(work, exist_ok=True)
        except OSError as error:
            raise UserError(f"--train {work}: no folder can be made there ({error.strerror})") from None
        self.work, *self.others = map(os.path.realpath, (work, *others))
        self.seen: dict[tuple, str] = {}  # (path, time, size) of a model -> what it is
        for leftover in pathlib.Path(self.work, DATA).glob(f"{UPLOADS}*"):  # a killed server leaves these
            with contextlib.suppress(OSError):
                if time.time() - leftover.stat().st_mtime > FORGOTTEN:
                    leftover.unlink()

    def allowed(self, path: str) -> str | None:
        """Return the path without links if it is there and in one of the folders, else None."""
        try:
            # .. goes first: after a link it leads elsewhere, which would tell of links outside
            real = os.path.realpath(os.path.normpath(path))
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
        if path := next(filter(None, paths), None):
            if out := next((file for file in files_in(path) if not self.allowed(file)), None):
                raise wrong(setting, f"{out} is a link that leads out of {path}; copy the file there")
            return path
        is_word = setting in ("tokenizer", "template") and re.fullmatch(r"[\w-]+", text)
        if is_word and not os.path.exists(os.path.join(ROOT, text)):
            return text  # such as world
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
        if not folder.startswith(self.work + os.sep) or not self._is_run(folder):
            raise Refused(404, f"there is no run {name[:80]!r}", code="not_found")
        return folder

    def new_run(self, name: str) -> tuple[str, str]:
        """Return (name, folder) of a run to be, which is in runs/."""
        name = name.removeprefix(f"{RUNS}/")
        folder = os.path.join(self.work, RUNS, name)
        fits = NAME.fullmatch(name) and len(name.encode()) <= NAME_BYTES
        if not fits or os.path.realpath(folder) != folder:
            expected = f"expected up to 80 letters, digits, - and _, of {NAME_BYTES} bytes, such as first-try"
            raise wrong("name", f"got {name[:80]!r}, {expected}")
        return f"{RUNS}/{name}", folder

    def _is_run(self, folder: str) -> bool:
        is_data = os.path.relpath(folder, self.work).split(os.sep)[0] == DATA
        names = () if is_data or folder in self.roots else (CONFIG, RUNNING, STARTED)
        return any(os.path.isfile(os.path.join(folder, name)) for name in names)

    def runs(self) -> list[str]:
        """Name all runs in the work folder."""
        names = []
        for folder, folders, _ in walk(self.work):
            if self._is_run(folder):
                folders.clear()
                names.append(os.path.relpath(folder, self.work).replace(os.sep, "/"))
        return names

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
        paths = []
        for root in self.roots:
            for folder, folders, files in walk(root):
                if self._is_run(folder):
                    folders.clear()  # do not walk through a run's checkpoints
                paths += [os.path.join(folder, file) for file in sorted(files) if file.endswith(".pth")]
                if "config.json" in files:
                    paths.append(folder)
        return self._listed(paths, self._model)

    def model(self, text: str) -> dict:
        """Describe a model that somebody names. Raises Refused or UserError with what is wrong with it."""
        real = self.named("load_model", text)
        if is_hub_name(real):
            return {"path": real}
        try:
            Arch.detect(read_model_file(real))
        except OSError as error:
            raise Refused(400, f"{real} can't be read: {error.strerror}", "name", "invalid_value") from None
        return {"path": real}

    def _listed(self, paths: Iterable[str], described: Callable[[str], dict | None]) -> list[dict]:
        """Describe each file once, under whatever names it was found."""
        files = []
        for real in dict.fromkeys(filter(None, map(self.allowed, paths))):
            with contextlib.suppress(OSError):  # the file is gone, or may not be read
                files.append(described(real))
        return list(filter(None, files))[:MOST]

    def _model(self, real: str) -> dict | None:
        """Describe a model file or folder; None for anything else."""
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
        paths: list[str] = []
        for root in self.roots:
            for folder, folders, files in walk(root):
                if self._is_run(folder):
                    folders.clear()
                elif "config.json" not in files or not any(name.endswith(".safetensors") for name in files):
                    paths += filter(may_have_records, (os.path.join(folder, name) for name in sorted(files)))
        return self._listed(paths, self._file)

    def _file(self, real: str) -> dict:
        return {"path": real, "name": self.shown(real), "bytes": os.path.getsize(real)}

    def shown(self, path: str) -> str:
        """Return a path without its folder's."""
        root = next(root for root in self.roots if os.path.commonpath([path, root]) == root)
        return os.path.relpath(path, root)

    # uploads

    async def receive(self, request: Request, name: str, most: int, patience: float) -> dict:
        """Write a request's body into a new file of the data. A failure raises Refused and leaves nothing."""
        base, suffix = os.path.splitext(os.path.basename(name.replace("\\", "/")))
        base = re.sub(r"[^\w-]+", "-", base).strip("-")[:80].encode()[:NAME_BYTES].decode(errors="ignore")
        if suffix.lower() not in TO_DROP or not base or not may_have_records(base + suffix.lower()):
            expected = f"{name[:80]!r} is no file of data, which ends with {', '.join(TO_DROP)}"
            raise Refused(400, expected, "name", "invalid_value")
        close = {"Connection": "close"}
        too_large = f"the file is larger than the {most:,} bytes that --limit_upload allows"
        refused = Refused(413, too_large, code="request_too_large", headers=close)
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > most:
            raise refused
        folder, size = os.path.join(self.work, DATA), 0
        os.makedirs(folder, exist_ok=True)
        if declared.isdecimal() and int(declared) > shutil.disk_usage(folder).free:
            raise Refused(507, "the disk has no room for the file", code="no_room", headers=close)
        parts, loop = request.stream(), asyncio.get_running_loop()
        until = loop.time() + patience
        with temporary(folder) as (file, path):
            try:
                while part := await asyncio.wait_for(anext(parts, b""), until - loop.time()):
                    size += len(part)
                    # a burst earns no more than `patience`: a client can't save up time to hold its place
                    until = min(loop.time() + patience, until + len(part) / SLOWEST)
                    if size > most:
                        raise refused
                    file.write(part)
                file.close()
            except asyncio.TimeoutError:
                least = f"at least {SLOWEST >> 10} KiB a second after {patience:g} seconds"
                late = f"the file comes too slowly: {least}; send it anew over a faster line"
                raise Refused(408, late, code="request_timeout", headers=close) from None
            except ClientDisconnect:
                raise Refused(400, "the client left before its file was complete") from None
            except OSError as error:
                said = f"the file could not be written: {error.strerror}"
                raise Refused(507, said, code="no_room", headers=close) from None
            if not size:
                raise Refused(400, "the file is empty", "body", "invalid_value")
            target = place_in(folder, path, base, suffix.lower())
        return self._file(target)


def walk(root: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walk through a folder and those below it as os.walk does, to a depth and without hidden ones."""
    looked = 0
    for folder, folders, files in os.walk(root):
        depth = os.path.relpath(folder, root).count(os.sep) + (folder != root)
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if depth < DEPTH else []
        yield folder, folders, files
        looked += 1
        if looked == MOST_FOLDERS:
            warn(f"{root} has more folders than {looked:,}; what is in the others is not shown")
            return


@functools.cache  # said once
def warn(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def temporary(folder: str):
    """Open a new file with a name of its own, which is removed at the end."""
    number, path = tempfile.mkstemp(".tmp", UPLOADS, folder)
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
