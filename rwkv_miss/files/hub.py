"""hf://OWNER/NAME[/FILE][@REVISION] -> a local path, by the package huggingface_hub.

A program calls local_path() on its user's arguments first, so that all other code sees local paths. Names
inside files are never downloaded.

Cache, token, endpoint and offline mode are huggingface_hub's (HF_HOME, HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE). Version 2 of huggingface_hub restarts an interrupted download from zero. So this module
downloads the bytes itself, into huggingface_hub's cache, and continues a partial file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import hashlib
import importlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from ..errors import UserError, first_line, listed
from ..flags import Options
from ..progress import Progress, print_notes
from .hub_names import COMMIT, DATA, FORM, HUB, MODEL, Fetched, HubName, is_hub_name, parse
from .weight_files import weight_map

SHA256 = re.compile(r"[0-9a-f]{64}")
DESCRIPTIONS = ("config.json", "adapter_config.json")  # configuration of a model's folder, of an adapter's
# types of the files to download for a folder; never code
READ = (".json", ".txt", ".jinja", ".model", ".safetensors")
SHOWN = 20  # files in an error
CHUNK = 1 << 20  # bytes
TIMEOUT = 10  # seconds for one question


def local_path(text: str, repo_type: str = MODEL) -> str:
    """Turn a name of the hub into a local path, downloaded if the cache lacks it; any other text stays."""
    return fetch(pin(parse(text, repo_type))) if is_hub_name(text) else text


def with_local_files(options: Options) -> Options:
    """Copy the flags of a program: those declared with file=True name local files."""
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.metadata.get("file")}
    local = {
        name: [local_path(path) for path in value] if isinstance(value, list) else value and local_path(value)
        for name, value in given.items()
    }
    return dataclasses.replace(options, **local)


def pin(name: HubName, shown: bool = True) -> HubName:
    """Complete the name with its file, and with the commit that its revision is now.

    A name stays without a file if it is a folder with config.json and safetensors. If the hub can't be
    reached, the cache answers; with `shown` a note on stderr says so.
    """
    if name.file and name.has_commit:
        return name
    hub = _package(name)
    with explained(name):
        try:
            if name.file:
                commit = _metadata(hub, name).commit_hash
            else:
                info = hub.HfApi().repo_info(
                    name.repo, repo_type=name.repo_type, revision=name.revision or None
                )
                commit, files = info.sha, [one.rfilename for one in info.siblings]
                _require_hub(hub, name, commit, *files)
                name = dataclasses.replace(name, file=_choose(name, files))
        except Exception as error:
            if not _is_unreachable(error):
                raise
            cached = _from_cache(hub, name)
            if cached is None:
                raise
            if shown:
                print_notes([f"{_why_unreachable(hub, error)}; the cache has {cached}"])
            return cached
        _keep_revision(hub, name, commit)
    return name.at(commit)


def fetch(name: HubName, shown: bool = True) -> Fetched:
    """Download a name that pin() returned, and return its local path. `shown`: with a bar, in one process."""
    hub = _package(name)
    with explained(name):
        if name.file:
            return Fetched(_file(hub, name, shown), str(name))
        folder = os.path.join(_storage(hub, name), "snapshots", name.revision)
        if not _is_whole(folder):
            info = hub.HfApi().repo_info(name.repo, repo_type=name.repo_type, revision=name.revision)
            names = [one.rfilename for one in info.siblings if "/" not in one.rfilename]
            # the weights last: if all of them are in the cache, the folder is complete
            names = [file for file in names if file.endswith(READ)]
            for file in sorted(names, key=lambda file: (file.endswith(READ[-1]), file)):
                _file(hub, name.at(name.revision, file), shown)
        return Fetched(folder, str(name))


def _package(name: HubName) -> Any:
    """Import huggingface_hub, only when a name must be looked up."""
    try:
        importlib.import_module("huggingface_hub.file_download")
        importlib.import_module("huggingface_hub.errors")
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise UserError(
            f"{name} needs the package huggingface_hub: pip install huggingface_hub ({error})"
        ) from None


def _choose(name: HubName, files: list[str]) -> str:
    """Choose the file of a repository; "" for a folder of a model. Raises UserError if it is ambiguous."""
    checkpoints = [file for file in files if file.endswith(".pth")]
    weights = [file for file in files if file.endswith(".safetensors") and "/" not in file]
    if name.repo_type == MODEL and len(checkpoints) == 1:
        return checkpoints[0]
    if name.repo_type == MODEL and not checkpoints and weights and any(d in files for d in DESCRIPTIONS):
        return ""
    shown = [file for file in files if not file.rpartition("/")[2].startswith(".")]
    shown = [file for file in shown if file != "README.md"]
    if not shown:
        raise UserError(f"{name}: the {name.kind} has no files")
    named = dataclasses.replace(name, file=(checkpoints or shown)[0])
    whole = f"; {name.repo} without hf:// reads the data set through the package datasets"
    raise UserError(
        f"{name} names no file, and it has {listed(checkpoints or shown, SHOWN)}; name one, such as {named}"
        f"{whole if name.repo_type == DATA else ''}"
    )


def _metadata(hub: Any, name: HubName) -> Any:
    """Ask the hub about a file: commit_hash, etag, location, size."""
    metadata = hub.get_hf_file_metadata(_address(hub, name))
    _require_hub(hub, name, metadata.commit_hash, metadata.etag)
    return metadata


def _require_hub(hub: Any, name: HubName, commit: str | None, *paths: str | None) -> None:
    """Raise UserError for an answer without a commit, or with a file name that leaves the cache's folder."""
    if not COMMIT.fullmatch(commit or "") or not all(
        path and ".." not in path.split("/") and re.fullmatch(r"[^/\\\0][^\\\0]*", path) for path in paths
    ):
        raise UserError(
            f"{name}: {hub.constants.ENDPOINT} answers, but not as a hub does; look at HF_ENDPOINT and at"
            " proxies"
        )


def _address(hub: Any, name: HubName) -> str:
    return hub.hf_hub_url(name.repo, name.file, repo_type=name.repo_type, revision=name.revision or None)


def _storage(hub: Any, name: HubName) -> str:
    """Return the cache's folder of a repository; huggingface_hub documents the layout."""
    folder = hub.file_download.repo_folder_name(repo_id=name.repo, repo_type=name.repo_type)
    return os.path.join(hub.constants.HF_HUB_CACHE, folder)


def _keep_revision(hub: Any, name: HubName, commit: str) -> None:
    """Record a revision's commit in the cache, for a later start without the hub."""
    if name.has_commit:
        return
    path = os.path.join(_storage(hub, name), "refs", name.revision or "main")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write(commit)


def _from_cache(hub: Any, name: HubName) -> HubName | None:
    """Complete a name as pin() does, from the cache alone; None if the cache lacks a part."""
    storage, commit = _storage(hub, name), name.revision
    if not name.has_commit:
        try:
            with open(os.path.join(storage, "refs", name.revision or "main"), encoding="utf-8") as file:
                commit = file.read().strip()
        except OSError:
            return None
    folder = os.path.join(storage, "snapshots", commit)
    if name.file:
        return name.at(commit) if os.path.isfile(os.path.join(folder, name.file)) else None
    files = [
        os.path.relpath(os.path.join(place, file), folder).replace(os.sep, "/")
        for place, _, names in os.walk(folder)
        for file in names
    ]
    if not files:
        return None
    chosen = name.at(commit, _choose(name, sorted(files)))
    return chosen if chosen.file or _is_whole(folder) else None


def _is_whole(folder: str) -> bool:
    """Tell whether the cache has all weights of a folder. Raises UserError for a broken index."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    weights = {name for name in names if name.endswith(".safetensors")}
    for index in (name for name in names if name.endswith(".safetensors.index.json")):
        if not weights.issuperset(weight_map(os.path.join(folder, index)).values()):
            return False
    return bool(weights)


def _file(hub: Any, name: HubName, shown: bool) -> str:
    """Return the path of a file at a commit, in the cache."""
    file = os.path.join(_storage(hub, name), "snapshots", name.revision, *name.file.split("/"))
    if os.path.isfile(file):
        return file
    _complete(hub, name, shown)
    # hf_hub_download() finds the bytes in the cache and links the file's name to them
    return hub.hf_hub_download(name.repo, name.file, repo_type=name.repo_type, revision=name.revision)


class _Counted:
    """File that counts the written bytes in a bar."""

    def __init__(self, file: Any, bar: Progress):
        self.file, self.bar = file, bar
        self.tell, self.seek, self.truncate = file.tell, file.seek, file.truncate

    def write(self, chunk: bytes) -> int:
        self.bar.update(len(chunk) / 1e6)
        return self.file.write(chunk)


def _complete(hub: Any, name: HubName, shown: bool) -> None:
    """Download a file's bytes into the cache, continuing a partial download.

    Other processes wait for the one that downloads.
    """
    meta, storage = _metadata(hub, name), _storage(hub, name)
    blob = os.path.join(storage, "blobs", meta.etag)
    lock = os.path.join(hub.constants.HF_HUB_CACHE, ".locks", os.path.basename(storage), f"{meta.etag}.lock")
    for path in (blob, lock):
        os.makedirs(os.path.dirname(path), exist_ok=True)
    headers = hub.utils.build_hf_headers()
    if urlsplit(meta.location).netloc != urlsplit(_address(hub, name)).netloc:
        headers.pop("authorization", None)  # the token is for the hub, not for its storage of large files
    headers["Accept-Encoding"] = "identity"  # otherwise sizes would be those of compressed bytes
    partial = f"{blob}.incomplete"  # huggingface_hub's name for a partial file before version 2
    with hub.utils.WeakFileLock(lock):
        if os.path.exists(blob):
            return
        with open(partial, "ab") as file:
            if meta.size is not None and file.tell() > meta.size:
                file.truncate(0)
            begun = file.seek(0, os.SEEK_END)
            _require_room(hub, name, (meta.size or 0) - begun)
            total = meta.size and meta.size / 1e6
            with Progress(f"downloading {name.file}", total, "MB", shown, begun / 1e6) as bar, _quiet(hub):
                hub.file_download.http_get(
                    meta.location,
                    _Counted(file, bar),
                    resume_size=begun,
                    headers=headers,
                    expected_size=meta.size,
                )
        _check_sum(name, partial, meta.etag, shown)
        os.replace(partial, blob)


@contextlib.contextmanager
def _quiet(hub: Any) -> Iterator[None]:
    """Turn huggingface_hub's own bar off inside the block."""
    hub.utils.disable_progress_bars()
    try:
        yield
    finally:
        hub.utils.enable_progress_bars()


def _require_room(hub: Any, name: HubName, size: int) -> None:
    """Raise UserError if the cache's disk has fewer than `size` bytes free."""
    cache = hub.constants.HF_HUB_CACHE
    if (free := shutil.disk_usage(cache).free) < size:
        raise UserError(
            f"{name}: {size / 1e6:,.1f} MB are to be downloaded, and {cache} has {free / 1e6:,.1f} MB left;"
            " free some, or set HF_HOME to a folder on another disk"
        )


def _check_sum(name: HubName, path: str, etag: str, shown: bool) -> None:
    """Compare a file with the hub's hash. If they differ, delete the file and raise UserError."""
    if not SHA256.fullmatch(etag):
        return
    digest = hashlib.sha256()
    with open(path, "rb") as file, Progress("checking", os.path.getsize(path) / 1e6, "MB", shown) as bar:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            bar.update(len(chunk) / 1e6)
    if digest.hexdigest() != etag:
        os.remove(path)
        raise UserError(f"{name} arrived damaged, and was removed; give the same command again")


@contextlib.contextmanager
def explained(name: HubName) -> Iterator[None]:
    """Turn exceptions of huggingface_hub inside the block into UserErrors of one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(_reason(name, error)) from None


def _reason(name: HubName, error: Exception) -> str:
    hub = _package(name)
    errors, cache = hub.errors, hub.constants.HF_HUB_CACHE
    page = f"{hub.constants.ENDPOINT}/{'datasets/' if name.repo_type == DATA else ''}{name.repo}"
    if isinstance(error, errors.GatedRepoError):
        return f"{name} is gated: accept its terms at {page}, then log in with: hf auth login"
    if isinstance(error, errors.RepositoryNotFoundError):
        other = "models/" if name.repo_type == DATA else "datasets/"
        return (
            f"{name}: the hub has no {name.kind} {name.repo}, or it is private; check the spelling, log in"
            f" with: hf auth login, or write {HUB}{other}{name.repo} if it is no {name.kind}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        near = _asked(lambda: _revisions(hub, name))
        return (
            f"{name}: {name.repo} has no revision {name.revision}"
            + (f", but {listed(near, SHOWN)}" if near else "")
            + f"; expected {FORM}"
        )
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        about = {"repo_type": name.repo_type, "revision": name.revision or None}
        files = _asked(lambda: hub.HfApi().list_repo_files(name.repo, **about))
        near = difflib.get_close_matches(name.file, files, SHOWN, 0.5) or files
        return f"{name}: {name.repo} has no file {name.file}" + (
            f"; it has {listed(near, SHOWN)}" if near else ""
        )
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if status in (401, 403):
        return f"{name}: the hub refuses it to you ({status}); log in with: hf auth login"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"{name}: the disk of {cache} is full; free some, or set HF_HOME to a folder on another disk;"
            " what has arrived is kept"
        )
    if _is_unreachable(error):
        return (
            f"{name}: {_why_unreachable(hub, error)}, and the cache {cache} has not all of it; give the same"
            " command again later, which goes on from what has arrived, or give a local path"
        )
    return f"{name}: {first_line(error)}; give the same command again, which goes on from what has arrived"


def _asked(question: Callable[[], list[str]]) -> list[str]:
    """Ask the hub for the names that an error lists; [] if it does not answer."""
    with contextlib.suppress(Exception):
        return question()
    return []


def _revisions(hub: Any, name: HubName) -> list[str]:
    refs = hub.HfApi().list_repo_refs(name.repo, repo_type=name.repo_type)
    names = [one.name for one in (*refs.branches, *refs.tags)]
    return difflib.get_close_matches(name.revision, names, SHOWN, 0.5) or names


def _is_unreachable(error: Exception) -> bool:
    """Tell whether the hub was not asked, did not answer, or can't answer now."""
    # the package that the error comes from: requests or httpx fail to connect; huggingface_hub's own errors
    # are about answers
    package = type(error).__module__.partition(".")[0]
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if package == "huggingface_hub" and not isinstance(error, ConnectionError):
        return status >= 500
    return package in ("requests", "urllib3", "httpx", "httpx2") or isinstance(
        error, (ConnectionError, TimeoutError)
    )


def why_unreachable(name: HubName) -> str:
    """Say why the hub can't be asked for a repository now, or "", after one attempt.

    Some packages try six times, seconds apart.
    """
    hub = _package(name)
    try:
        hub.HfApi().repo_info(name.repo, repo_type=name.repo_type, timeout=TIMEOUT)
    except Exception as error:
        return _why_unreachable(hub, error) if _is_unreachable(error) else ""
    return ""


def _why_unreachable(hub: Any, error: Exception) -> str:
    if hub.constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, so the hub is not asked"
    return f"the hub at {hub.constants.ENDPOINT} can't be reached ({first_line(error)})"
