"""Rows -> tokens: once, in parallel where there is much of it, and kept in a cache that all processes map
into memory.

A cache entry is a folder of flat arrays. Its name is a hash of all that decides the tokens: the data's bytes,
tokenizer, template, loss mask and the code, so a changed file is another entry. It appears in one rename, and
one process makes it while the others wait.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from rwkv_miss.errors import UserError
from rwkv_miss.progress import Progress

from .config.launcher import is_first_process
from .formats import BINIDX, BY_NAME, Found, Reading, Report, Source, WrongSetting, read_record
from .formats.report import Kind
from .ops.build import announce, locked
from .template import DEFAULT, Segment, Template, marked_spans, row_segments, trains_by_marker
from .tokenizer import Tokenizer

SMALL = 1 << 20  # bytes of data that are tokenised faster than a cache entry is worth
LARGE = 8 << 20  # bytes from which other processes help
PROCESSES = 16  # at most: one reads for all of them
CHUNK = 256  # rows that a process gets at a time
CHUNK_TEXT = 1 << 20  # characters of rows after which it gets no more of them
UNUSED_DAYS = 30
MAKING = ".making-"  # how a folder's name begins that becomes an entry
ENTRY = re.compile(r"[0-9a-f]{24}")


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Documents one after another: ids (N,) int32, trained (N,) bool, ends (n,) int64, and texts (n,) bool,
    whether a document is running text, of which any part makes sense by itself, and not a conversation.
    """

    ids: np.ndarray
    trained: np.ndarray
    ends: np.ndarray
    texts: np.ndarray


@dataclasses.dataclass(frozen=True)
class Encoder:
    """How a row becomes tokens. `loss_mask` is that of template.row_segments."""

    tokenizer: Tokenizer
    template: Template = DEFAULT
    loss_mask: str = "assistant"

    def encode(self, row: dict) -> tuple[np.ndarray, np.ndarray]:
        """(ids (n,) int32, trained (n,) bool) with the end of document, always trained, at the end. Raises
        UserError for a row that the template or the tokenizer cannot express.
        """
        if "ids" in row:
            ids = np.asarray(row["ids"], dtype=np.int32)
            if ids.max(initial=0) >= self.tokenizer.vocab_size:
                raise WrongSetting(
                    f"id {ids.max()} is not in the vocabulary of tokenizer {self.tokenizer.name}, whose size"
                    f" is {self.tokenizer.vocab_size}: another one made these data; give it as --tokenizer if"
                    " the model was trained with it (world has ids up to 65529), else make the data again,"
                    " from text"
                )
            trained = self._marked(ids) if trains_by_marker(self.loss_mask) else np.ones(len(ids), dtype=bool)
            return self._ended(ids, trained)
        return self.encode_segments(row_segments(row, self.template, self.loss_mask))

    def is_text(self, row: dict) -> bool:
        """Whether the row is running text, of which any part makes sense by itself, and not a
        conversation.
        """
        return ("text" in row or "ids" in row) and not trains_by_marker(self.loss_mask)

    def encode_segments(self, segments: list[Segment]) -> tuple[np.ndarray, np.ndarray]:
        """encode() of pieces that are tokenised one by one."""
        pieces = [self.tokenizer.encode(text) for text, _ in segments]
        ids = np.array(list(itertools.chain.from_iterable(pieces)), dtype=np.int32)
        trained = np.repeat(
            np.array([trained for _, trained in segments], dtype=bool), [len(piece) for piece in pieces]
        )
        return self._ended(ids, trained)

    def _ended(self, ids: np.ndarray, trained: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        end = np.array(self.tokenizer.eod, dtype=np.int32)
        if not np.array_equal(
            ids[-len(end) :], end
        ):  # files of tokens, and templates that write it, have it already
            ids, trained = (
                np.concatenate([ids, end]),
                np.concatenate([trained, np.zeros(len(end), dtype=bool)]),
            )
        trained[-len(end) :] = True
        return ids, trained

    def _marked(self, ids: np.ndarray) -> np.ndarray:
        """The mask of a marker on tokens as they are: those that begin in what it trains."""
        if self.tokenizer.encoding != "utf-8" or not hasattr(self.tokenizer, "table"):
            raise UserError(
                f"--loss_mask {self.loss_mask!r} is looked for in text, and tokenizer {self.tokenizer.name}"
                " does not tell which text a token stands for; give the data as text, or --loss_mask all"
            )
        pieces = [self.tokenizer.table.get(token, b"") for token in ids.tolist()]
        begins = np.cumsum([0, *map(len, pieces)])[:-1]
        trained = np.zeros(len(ids), dtype=bool)
        # in latin-1 a character is a byte
        for begin, end in marked_spans(
            b"".join(pieces).decode("latin-1"), self.loss_mask.encode().decode("latin-1")
        ):
            trained |= (begins >= begin) & (begins < end)
        return trained


@dataclasses.dataclass
class Part:
    """What a chunk of records became: tokens, the kinds of its rows, and the bad ones, (where, reason)."""

    tokens: Tokens
    kinds: collections.Counter[Kind]
    bad: list[tuple[str, UserError]]


@dataclasses.dataclass(frozen=True)
class Converter:
    """Records (where, what source.read() gives) -> tokens."""

    source: Source
    reading: Reading
    encoder: Encoder

    def __getstate__(self) -> dict:
        # read() is the first process's, and may be one that does not travel
        return self.__dict__ | {"source": dataclasses.replace(self.source, read=None)}

    def __call__(self, records: list[tuple[str, Any]]) -> Part:
        encoded, texts, bad = [], [], []
        kinds: collections.Counter[Kind] = collections.Counter()
        for where, record in records:
            try:
                kind, row = read_record(record, self.source, self.reading)
                kinds[kind] += 1
                encoded.append(self.encoder.encode(row))
            except UserError as error:
                bad.append((where, error))
            else:
                texts.append(self.encoder.is_text(row))
        ends = np.cumsum([len(ids) for ids, _ in encoded], dtype=np.int64)
        ids = np.concatenate([np.zeros(0, np.int32), *(ids for ids, _ in encoded)])
        trained = np.concatenate([np.zeros(0, bool), *(trained for _, trained in encoded)])
        return Part(Tokens(ids, trained, ends, np.array(texts, dtype=bool)), kinds, bad)


def tokenise(
    source: Source, encoder: Encoder, report: Report, reading: Reading = BY_NAME, cache: str = "none"
) -> Tokens:
    """The documents of a source, from the cache folder where they are in it ("none": never; "auto": in the
    user's own cache folder). Where the folder cannot be used, a note says so, and there is no cache.

    What was found goes to the report, and a row that cannot be read or expressed. Raises UserError for a
    source without rows.
    """
    chunks = functools.partial(_encoded, source, encoder, report, reading)
    if cache == "none" or source.size < SMALL:
        return _joined(list(chunks()))
    folder = cache_folder(cache)
    entry = folder / fingerprint(source, encoder, reading, report.on_bad_row)
    if (found := _open(entry, source, report)) is not None:
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "lock", "the tokens") if os.name == "posix" else contextlib.nullcontext():
            if (found := _open(entry, source, report)) is not None:
                return found
            _remove_old(folder)
            begun = time.perf_counter()
            with tempfile.TemporaryDirectory(dir=folder, prefix=MAKING, ignore_cleanup_errors=True) as work:
                whole = pathlib.Path(work, "whole")
                with contextlib.closing(chunks()) as parts:
                    _write(parts, whole)
                (whole / "found.json").write_text(json.dumps(report.files[source.path].to_json()))
                shutil.rmtree(entry, ignore_errors=True)  # one that could not be opened
                os.rename(whole, entry)
            found = _open(entry, source, report)
    except OSError as error:
        if is_first_process():
            announce(
                f"note: the cache for tokens, {folder}, cannot be used ({error}); this run makes them for"
                " itself alone. --data_cache takes another folder"
            )
        return _joined(list(chunks()))
    size = sum(file.stat().st_size for file in entry.iterdir())
    seconds = time.perf_counter() - begun
    announce(
        f"tokenised {source.path} in {seconds:.1f} s: {len(found.ids):,} tokens; "
        f"kept in {entry} ({size / 1e6:.1f} MB) for later runs"
    )
    return found


def cache_folder(cache: str) -> pathlib.Path:
    if cache != "auto":
        return pathlib.Path(cache).expanduser()
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rwkv-miss" / "data"


def fingerprint(source: Source, encoder: Encoder, reading: Reading, on_bad_row: str) -> str:
    """A hash of everything that decides the tokens."""
    here = pathlib.Path(__file__).parent
    code = [
        *(here / f"{name}.py" for name in ("tokenise", "template", "jinja_template", "tokenizer")),
        *sorted((here / "formats").glob("*.py")),
    ]
    tokenizer = [encoder.tokenizer.name] if os.path.isfile(encoder.tokenizer.name) else []
    versions = [(name, _version(name)) for name in ("numpy", "pyrwkv-tokenizer", "tokenizers", "jinja2")]
    described = (
        source.format,
        reading,
        on_bad_row,
        versions,
        encoder.tokenizer.name,
        encoder.tokenizer.eod,
        encoder.template.record,
        encoder.loss_mask,
    )
    digest = hashlib.sha256(repr(described).encode())
    with Progress(f"hashing {source.path}", source.size / 1e6, "MB", is_first_process()) as bar:
        for file in (*code, *tokenizer, *source.files):
            with open(file, "rb") as content:
                digest.update(f"{os.path.basename(file)} {os.path.getsize(file)} ".encode())
                while block := content.read(1 << 20):
                    digest.update(block)
                    bar.update(len(block) / 1e6)
    return digest.hexdigest()[:24]  # as ENTRY


def _version(package: str) -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return ""


def _encoded(source: Source, encoder: Encoder, report: Report, reading: Reading) -> Iterator[Tokens]:
    """The tokens of a source's rows, a chunk of rows at a time."""
    found = report.begin(source)
    chunks = _chunks(source.watched(encoder.tokenizer.eod, "tokenising"))
    convert = Converter(source, reading, encoder)
    processes = min(available_cores(), PROCESSES) if source.size >= LARGE and source.format != BINIDX else 1
    documents = 0
    with contextlib.ExitStack() as stack:
        parts: Iterable[Part] = map(convert, chunks)
        if processes > 1:
            parts = stack.enter_context(contextlib.closing(in_parallel(convert, chunks, processes)))
        for part in parts:
            for where, reason in part.bad:
                report.refuse(source.path, where, reason)
            found.kinds.update(part.kinds)
            documents += len(part.tokens.ends)
            yield part.tokens
    report.require_rows(source)
    if not documents:
        raise UserError(f"{source.path}: no row can be used, such as {found.reasons[0]}")


def _chunks(records: Iterable[tuple[str, Any]]) -> Iterator[list[tuple[str, Any]]]:
    """The records in lists of at most CHUNK, and of little more than CHUNK_TEXT characters."""
    chunk, length = [], 0
    for where, record in records:
        chunk.append((where, record))
        length += len(record) if isinstance(record, str) else 0
        if len(chunk) == CHUNK or length >= CHUNK_TEXT:
            yield chunk
            chunk, length = [], 0
    if chunk:
        yield chunk


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_parallel(work: Callable[[list], Part], chunks: Iterable[list], processes: int) -> Iterator[Part]:
    """work() of each chunk in order; few chunks are ahead of what is asked for.

    The processes are forks where Linux is, as those of torch's DataLoader: they begin at once, where a fresh
    one imports torch for 3 s, and they run nothing that has threads.
    """
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, context, _begin, (work, os.getpid())) as pool:
        waiting: collections.deque[concurrent.futures.Future] = collections.deque()
        try:
            for chunk in chunks:
                with _no_interrupt():  # which a new process would answer with a traceback of its own
                    waiting.append(pool.submit(_work, chunk))
                if len(waiting) > 4 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError(
                "a process that tokenises was killed, perhaps because memory ran out; free some and start"
                " again"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """Context in which Ctrl-C waits; a process that starts in it keeps it out for good."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(work: Callable[[list], Part], parent: int) -> None:
    global _convert
    _convert = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's to answer
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process when the first one is gone, however that ended."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _work(chunk: list) -> Part:
    return _convert(chunk)


def _joined(parts: list[Tokens]) -> Tokens:
    starts = np.cumsum([0, *(len(part.ids) for part in parts)])
    parts = [dataclasses.replace(part, ends=part.ends + start) for part, start in zip(parts, starts)]
    return Tokens(
        *(
            np.concatenate([getattr(part, field.name) for part in parts])
            for field in dataclasses.fields(Tokens)
        )
    )


def _write(parts: Iterable[Tokens], folder: pathlib.Path) -> None:
    """A cache entry; no more than one part is in memory at a time."""
    folder.mkdir()
    length = 0
    with contextlib.ExitStack() as stack:
        names = [field.name for field in dataclasses.fields(Tokens)]
        files = {name: stack.enter_context(open(folder / name, "wb")) for name in names}
        for part in parts:
            for name, file in files.items():
                array = getattr(part, name)
                file.write((array + length if name == "ends" else array).tobytes())
            length += len(part.ids)


def _open(entry: pathlib.Path, source: Source, report: Report) -> Tokens | None:
    """The arrays of a cache entry, mapped into memory, and what reading found, for the report; None where the
    entry is absent, or not whole because the machine went down.
    """
    try:
        kinds = {"ids": np.int32, "trained": np.bool_, "ends": np.int64, "texts": np.bool_}
        # as plain arrays, which are sliced in a tenth of the time
        arrays = {name: np.memmap(entry / name, kind, "r").view(np.ndarray) for name, kind in kinds.items()}
        found = Tokens(**arrays)
        if not len(found.ids) == len(found.trained) == found.ends[-1] or len(found.ends) != len(found.texts):
            return None
        with contextlib.suppress(OSError):
            os.utime(entry)  # when it was last used
        report.files[source.path] = Found.from_json(json.loads((entry / "found.json").read_text()))
        return found
    except (OSError, ValueError):
        return None


def _remove_old(folder: pathlib.Path) -> None:
    """Delete entries that have not been used for UNUSED_DAYS, and what a killed process left; other things in
    the folder are not ours.
    """
    for entry in folder.iterdir():
        days = UNUSED_DAYS if ENTRY.fullmatch(entry.name) else 1 if entry.name.startswith(MAKING) else None
        with contextlib.suppress(OSError):
            if days and entry.is_dir() and time.time() - entry.stat().st_mtime > days * 86400:
                shutil.rmtree(entry, ignore_errors=True)
