"""Served models that clients may name: the base, and the base with adapters, which come and go."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from rwkv_miss.errors import UserError
from rwkv_miss.files.checkpoint import read_metadata
from rwkv_miss.version import VERSION

from ..common.formatting import counted, short
from ..data.chat_template import Template
from ..inference.adapters import Adapters, Applied
from ..model import State
from .errors import Refused, wrong
from .fields import Fields
from .request_parsing import Chosen
from .worker import Worker

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# the message for every file that may not be named, whether it exists or not
OUTSIDE = "and the server's --adapter_dir has no such file; name one in that folder, such as poems.pth"


@dataclasses.dataclass
class ServedAdapter:
    """Adapter under the name that clients know."""

    name: str
    internal: str  # the name in the engine, which no other adapter ever had
    root: str  # the file's name
    digest: str  # a digest of the file's tensors
    template: Template
    bos: tuple[int, ...]
    description: dict[str, Any]
    is_operators: bool  # whether --adapter named it: clients can't delete it
    created: int  # when it was loaded, in seconds
    users: int = 0  # requests that run with it


@dataclasses.dataclass(frozen=True)
class Records:
    """Records of files that tell how to prompt a model: the adapters' files at these paths, then the base."""

    template: Callable[[list[str]], Template]
    bos: Callable[[list[str]], tuple[int, ...]]
    tokenizer: str  # the name of the tokenizer in use


class ServedModels:
    """Served models. They belong to the event loop; the worker's thread changes the engine's adapters.

    Adapters that the whole model has in use are a part of the base that clients see.
    """

    def __init__(self, name: str, adapters: Adapters, records: Records, scale: float, folder: str | None):
        self.name, self.adapters, self.records, self.scale = name, adapters, records, scale
        self.folder = os.path.realpath(folder) if folder else None
        used = [adapters.by_name[internal].path for internal in adapters.used]
        self.template, self.bos = records.template(used), records.bos(used)
        identity = adapters.identity()
        # the weights of requests without an adapter: the digest of the base's tensors, and what is merged
        self.digests = [adapters.model.base_fingerprint, *identity["adapters"]]
        self.base_scale = identity["scale"]
        self.entries: dict[str, ServedAdapter] = {}
        self.created = int(time.time())
        self.used_names: set[str] = set()
        self.coming: set[str] = set()  # names of adapters that are being loaded
        self.leaving: set[str] = set()  # internal names of dropped adapters that requests still use
        for internal, adapter in adapters.by_name.items():
            self.used_names.add(internal)
            if internal in adapters.used:
                continue
            if internal == name:
                raise UserError(f"--adapter {name}: {self._taken()}; choose another with --adapter NAME=FILE")
            try:
                adapters.check(Applied((internal,)))
            except UserError as error:
                raise UserError(f"{error}. As the only --adapter it is merged on loading") from None
            self.entries[internal] = self._entry(internal, internal, adapter.path, is_operators=True)

    def _taken(self) -> str:
        return f"{self.name} is the base model's name, and an adapter's name is a model's, too"

    def _entry(self, name: str, internal: str, path: str, is_operators: bool = False) -> ServedAdapter:
        metadata = read_metadata(path) or {}
        rank = (metadata.get("options") or {}).get("rank")
        described = {"name": name, "model": f"{self.name}:{name}", "method": metadata.get("method")}
        if rank is not None:
            described["rank"] = rank
        template, bos = self.records.template([path]), self.records.bos([path])
        root, digest = os.path.basename(path), self.adapters.by_name[internal].fingerprint
        created = int(time.time())
        return ServedAdapter(name, internal, root, digest, template, bos, described, is_operators, created)

    def models(self) -> list[str]:
        # a list of them at once: requests are read in another thread
        return [self.name, *list(self.entries)]

    def cards(self) -> list[dict[str, Any]]:
        """Describe each model as vLLM does, with the digests of what answers."""
        base = {
            "id": self.name,
            "created": self.created,
            "root": self.adapters.model.base_name,
            "parent": None,
        }
        cards = [base | {"version": self.digests[0], "system_fingerprint": self._fingerprint()}]
        for name, entry in self.entries.items():
            card = {"id": name, "created": entry.created, "root": entry.root, "parent": self.name}
            card["version"] = entry.digest
            cards.append(card | {"system_fingerprint": self._fingerprint([entry], self.scale)})
        return cards

    def _fingerprint(self, entries: Sequence[ServedAdapter] = (), scale: float = 1.0) -> str:
        """Identify what answers: the release, and the contents of the base and of its adapters."""
        facts = [VERSION, *self.digests, self.base_scale, *(entry.digest for entry in entries), scale]
        return f"fp_{hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()}"

    def find(self, fields: Fields) -> Chosen:
        """Find the model of a request, by its fields model, adapter_id and adapter_scale. Raises Refused."""
        model = fields.text("model") or self.name
        adapter_id = fields.text("adapter_id") or ""
        scale = fields.number("adapter_scale", -100, 100, self.scale)
        # the base's name may have a colon itself
        named = "" if model == self.name else model.removeprefix(f"{self.name}:")
        if not named and model != self.name:
            raise self.unknown("model", model)
        if named and adapter_id and named != adapter_id:
            raise wrong(
                "adapter_id", f"got {short(adapter_id)}, and model names {short(named)}; give one of them"
            )
        names = (named or adapter_id).split("+") if named or adapter_id else []
        entries = []
        for name in names:
            entry = self.entries.get(name)  # adapters come and go: this is another thread
            if entry is None:
                raise self.unknown("model" if named else "adapter_id", model if named else name)
            entries.append(entry)
        if len({*names}) < len(names):
            raise wrong("model" if named else "adapter_id", f"{'+'.join(names)} names one adapter twice")
        if not entries:
            if scale != self.scale:
                why = "no adapter; name one in model"
                if self.adapters.used:
                    why = f"{self.name} has its adapter at {self.scale:g} for all, by the server's --scale"
                raise wrong("adapter_scale", f"got {scale:g}, and {why}")
            return Chosen(self.name, Applied(), self.template, self.bos, self._fingerprint())
        applied = Applied(tuple(entry.internal for entry in entries), scale)
        label, first = model if named else f"{self.name}:{adapter_id}", entries[0]
        return Chosen(label, applied, first.template, first.bos, self._fingerprint(entries, scale))

    def unknown(self, param: str, name: str) -> Refused:
        models = ", ".join(self.models())
        return Refused(
            404, f"{param}: there is no {short(name)}; there are {models}", param, "model_not_found"
        )

    def held(self, applied: Applied) -> list[ServedAdapter]:
        """Hold the adapters of a request that begins to run; release() gives them back."""
        used = [self.entries[name] for name in self.entries if self.entries[name].internal in applied.names]
        if len(used) < len(applied.names):
            raise Refused(404, "the adapter was just dropped", "model", "model_not_found")
        for entry in used:
            entry.users += 1
        return used

    def release(self, entries: list[ServedAdapter], worker: Worker) -> None:
        for entry in entries:
            entry.users -= 1
            self._leave_if_unused(entry, worker)

    def _path(self, file: str) -> str:
        """Return the path of a file below --adapter_dir. Raises Refused."""
        if not self.folder:
            raise Refused(
                403,
                "this server loads no files: its operator has to start it with --adapter_dir FOLDER",
                code="no_adapter_dir",
            )
        return inside(self.folder, file)

    async def state_of(self, file: str, worker: Worker) -> State:
        """Read a state from a file while others answer. Raises Refused."""
        path = self._path(file)

        def read() -> State:
            self._check_tokenizer(path, file)
            return self.adapters.start_in(path)

        try:
            return await worker.call(read, lambda: None)
        except UserError as error:
            raise wrong("file", self._without_paths(str(error), path, file)) from None

    def check_room(self, most: int) -> None:
        """Raise Refused if clients have `most` adapters already; the operator's do not count."""
        loaded = sum(not entry.is_operators for entry in self.entries.values())
        if loaded + len(self.coming) + len(self.leaving) >= most:
            raise Refused(
                400,
                f"this server loads at most {counted(most, 'adapter')} (--limit_adapters); DELETE"
                " /v1/adapters/NAME first; one that answers use goes with the last of them",
                code="too_many_adapters",
            )

    async def add(self, name: str, file: str, worker: Worker) -> ServedAdapter:
        """Load an adapter while others answer. Raises Refused."""
        if not NAME.fullmatch(name):
            raise wrong("name", f"got {short(name)}, expected up to 64 letters, digits and . _ -")
        if name == self.name:
            raise Refused(409, f"name: {self._taken()}; choose another", "name", "name_taken")
        if name in self.entries:
            first = f"name: there is an adapter {name}; DELETE /v1/adapters/{name} first"
            raise Refused(409, first, "name", "name_taken")
        if name in self.coming:
            raise Refused(409, f"name: an adapter {name} is being loaded; wait for it", "name", "name_taken")
        path = self._path(file)
        labels = itertools.chain([name], (f"{name}@{number}" for number in itertools.count(2)))
        internal = next(label for label in labels if label not in self.used_names)

        def load() -> ServedAdapter:
            self._check_tokenizer(path, file)
            self.adapters.add(internal, path)
            try:
                entry = self._entry(name, internal, path)
                self.adapters.check(Applied((internal,)))
                worker.engine.refresh()
            except BaseException:
                self.adapters.drop(internal)
                raise
            return entry

        self.coming.add(name)
        try:
            entry = await worker.call(load, lambda: self._unload(internal, worker))
        except UserError as error:
            raise wrong("file", self._without_paths(str(error), path, file)) from None
        finally:
            self.coming.discard(name)
        self.used_names.add(internal)
        self.entries[name] = entry
        return entry

    def _without_paths(self, message: str, path: str, file: str) -> str:
        """Remove the server's folders from an error's text: they do not concern a client."""
        identity = self.adapters.model.base_identity
        base = str(identity.path) if identity and identity.path else ""
        message = message.replace(path, file)
        return message.replace(base, os.path.basename(base)) if base else message

    def _check_tokenizer(self, path: str, file: str) -> None:
        recorded = (read_metadata(path) or {}).get("tokenizer")
        if recorded and os.path.basename(str(recorded)) != os.path.basename(self.records.tokenizer):
            raise UserError(
                f"{file} was trained with the tokenizer {short(recorded)}, and this server has"
                f" {os.path.basename(self.records.tokenizer)}"
            )

    def drop(self, name: str, worker: Worker) -> None:
        """Take an adapter's name away; the adapter is unloaded when the last request with it has ended."""
        entry = self.entries.get(name)
        if entry is None:
            unknown = f"name: there is no adapter {short(name)}; GET /v1/adapters lists them"
            raise Refused(404, unknown, "name", "model_not_found")
        if entry.is_operators:
            raise Refused(
                403, f"adapter {name} is the operator's, by --adapter; it stays", "name", "not_deletable"
            )
        del self.entries[name]
        self.leaving.add(entry.internal)
        self._leave_if_unused(entry, worker)

    def _leave_if_unused(self, entry: ServedAdapter, worker: Worker) -> None:
        if entry.internal in self.leaving and not entry.users:
            self.leaving.discard(entry.internal)
            worker.post(lambda: self._unload(entry.internal, worker))

    def _unload(self, internal: str, worker: Worker) -> None:
        """Make the engine forget an adapter, in the worker's thread."""
        self.adapters.drop(internal)
        worker.engine.refresh()


def inside(folder: str, file: str) -> str:
    """Return the real path of a file below `folder`. Raises Refused, always in the same words, for others."""
    refused = wrong("file", f"got {short(file)}, {OUTSIDE}")
    if not file or "\0" in file or os.path.isabs(file) or ".." in pathlib.PurePath(file).parts:
        raise refused
    try:
        path = os.path.realpath(os.path.join(folder, file))
        if os.path.commonpath([folder, path]) != folder or not os.path.isfile(path):
            raise refused
    except (OSError, ValueError):
        raise refused from None
    return path
