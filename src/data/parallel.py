"""Reading in several processes: chunks of records go out, and the results come back in order."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from rwkv_miss.errors import UserError

from .encode import Encoder, Tokens, tokens_of
from .encode_answers import labels_of
from .formats import BINIDX, DataSource, LeftOut, Reading, Report, place_of, read_record
from .formats.report import RecordKind

LARGE = 8 << 20  # bytes from which several processes read
PROCESSES = 16  # at most, because one process reads for all of them
RECORDS_AT_ONCE = 256  # records that a process gets at a time
CHARACTERS_AT_ONCE = 1 << 20  # characters after which a process gets no more records at a time


@dataclasses.dataclass
class Part:
    """Results from a chunk of records."""

    made: Any  # by Converter.together(), of the records that are neither bad nor left out
    kinds: collections.Counter[RecordKind]  # how many records of each kind
    bad: list[tuple[str, UserError]]  # the place and the error of each bad record
    left_out: list[tuple[str, LeftOut]]  # the place and reason of each record that teaches nothing
    place: str  # the beginning of the records' places


@dataclasses.dataclass(frozen=True)
class Converter:
    """Work on a chunk of records (where, an item of source.read()); a subclass converts one record."""

    source: DataSource
    reading: Reading
    encoder: Encoder

    def __getstate__(self) -> dict:
        # only the first process calls read(), and it may be a function that can't be pickled
        return self.__dict__ | {"source": dataclasses.replace(self.source, read=None)}

    def __call__(self, records: list[tuple[str, Any]]) -> Part:
        made: list = []
        bad: list[tuple[str, UserError]] = []
        left_out: list[tuple[str, LeftOut]] = []
        kinds: collections.Counter[RecordKind] = collections.Counter()
        for where, raw in records:
            try:
                kind, record = read_record(raw, self.source, self.reading)
                kinds[kind] += 1
                made.append(self.made_of(record, where))
            except LeftOut as reason:
                left_out.append((where, reason))
            except UserError as error:
                bad.append((where, error))
        return Part(self.together(made), kinds, bad, left_out, place_of(records[0][0])[0])

    def made_of(self, record: dict[str, Any], where: str) -> Any:
        """Convert a record. Raises UserError, or LeftOut, for one that can't be used."""
        raise NotImplementedError

    def together(self, made: list) -> Any:
        """Join the results of a chunk's records."""
        return made


class TokenConverter(Converter):
    """Conversion of records to Tokens."""

    def made_of(self, record: dict[str, Any], where: str) -> tuple[list, bool, list[int], int]:
        documents = self.encoder.encode(record)
        labels = labels_of(record, len(documents))
        return documents, self.encoder.is_text(record), labels, place_of(where)[1]

    def together(self, made: list) -> Tokens:
        encoded: list[tuple[np.ndarray, np.ndarray]] = []
        texts: list[bool] = []
        begins: list[bool] = []
        labels: list[int] = []
        places: list[int] = []
        for documents, is_text, of_record, place in made:
            encoded += documents
            texts += [is_text] * len(documents)
            begins += [True] + [False] * (len(documents) - 1)
            labels += of_record
            places += [place] * len(documents)
        return tokens_of(encoded, texts, begins, labels, places)


def parts_of(convert: Converter, report: Report, doing: str) -> Iterator[Part]:
    """Convert the records of a source, a chunk at a time; large data in several processes.

    The report gets what was found, and each record that cannot be used. Raises UserError for a source
    without records.
    """
    source = convert.source
    found = report.begin(source)
    chunks = _chunks(source.watched(convert.encoder.tokenizer.eod, doing, found.join))
    is_large = source.size >= LARGE and source.format != BINIDX
    processes = min(available_cores(), PROCESSES) if is_large else 1
    with contextlib.ExitStack() as stack:
        parts: Iterable[Part] = map(convert, chunks)
        if processes > 1:
            parts = stack.enter_context(contextlib.closing(in_parallel(convert, chunks, processes)))
        for part in parts:
            for where, reason in part.bad:
                report.refuse(source.path, where, reason)
            for where, left_out in part.left_out:
                found.leave_out(where, left_out)
            found.place = found.place or part.place
            found.kinds.update(part.kinds)
            yield part
    report.require_records(source)


def _chunks(records: Iterable[tuple[str, Any]]) -> Iterator[list[tuple[str, Any]]]:
    """Yield the records in lists, which end at RECORDS_AT_ONCE records or CHARACTERS_AT_ONCE characters."""
    chunk, length = [], 0
    for where, record in records:
        chunk.append((where, record))
        length += len(record) if isinstance(record, str) else 0
        if len(chunk) == RECORDS_AT_ONCE or length >= CHARACTERS_AT_ONCE:
            yield chunk
            chunk, length = [], 0
    if chunk:
        yield chunk


def available_cores() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def in_parallel(work: Callable[[list], Part], chunks: Iterable[list], processes: int) -> Iterator[Part]:
    """Yield work() of each chunk in order; only a few chunks are worked on in advance.

    On Linux the processes are forks, as those of torch's DataLoader. They begin at once, while a fresh one
    would import torch for 3 s. Forking is safe here, because they run nothing that has threads.
    """
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, context, _begin, (work, os.getpid())) as pool:
        waiting: collections.deque[concurrent.futures.Future] = collections.deque()
        try:
            for chunk in chunks:
                # a new process would answer Ctrl-C with a traceback of its own
                with _no_interrupt():
                    waiting.append(pool.submit(_work, chunk))
                if len(waiting) > 4 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError(
                "a process that reads data was killed, perhaps because memory ran out; free some and start"
                " again"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """Hold Ctrl-C back inside the block. A process that starts in it never sees Ctrl-C."""
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # only the first process handles Ctrl-C
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process when the first one is gone, however the first one ended."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _work(chunk: list) -> Part:
    return _convert(chunk)
