"""Tokenising in several processes: chunks of records go out, their tokens come back in order."""

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
from .formats import LeftOut, Reading, Source, place_of, read_record
from .formats.report import Kind


@dataclasses.dataclass
class Part:
    """What a chunk of records became."""

    tokens: Tokens
    kinds: collections.Counter[Kind]  # how many records of each kind
    bad: list[tuple[str, UserError]]  # where a bad record stands, and why it is bad
    left_out: list[tuple[str, LeftOut]]  # where a record stands that teaches nothing, and why it does not
    place: str  # what the places of the records begin with


@dataclasses.dataclass(frozen=True)
class Converter:
    """Records (where, what source.read() gives) -> tokens."""

    source: Source
    reading: Reading
    encoder: Encoder

    def __getstate__(self) -> dict:
        # only the first process calls read(), and it may be a function that can't be pickled
        return self.__dict__ | {"source": dataclasses.replace(self.source, read=None)}

    def __call__(self, records: list[tuple[str, Any]]) -> Part:
        encoded: list[tuple[np.ndarray, np.ndarray]] = []
        texts: list[bool] = []
        begins: list[bool] = []
        labels: list[int] = []
        places: list[int] = []
        bad: list[tuple[str, UserError]] = []
        left_out: list[tuple[str, LeftOut]] = []
        kinds: collections.Counter[Kind] = collections.Counter()
        for where, raw in records:
            try:
                kind, record = read_record(raw, self.source, self.reading)
                kinds[kind] += 1
                documents = self.encoder.encode(record)
            except LeftOut as reason:
                left_out.append((where, reason))
            except UserError as error:
                bad.append((where, error))
            else:
                encoded += documents
                texts += [self.encoder.is_text(record)] * len(documents)
                begins += [True] + [False] * (len(documents) - 1)
                labels += labels_of(record, len(documents))
                places += [place_of(where)[1]] * len(documents)
        tokens = tokens_of(encoded, texts, begins, labels, places)
        return Part(tokens, kinds, bad, left_out, place_of(records[0][0])[0])


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def in_parallel(work: Callable[[list], Part], chunks: Iterable[list], processes: int) -> Iterator[Part]:
    """work() of each chunk in order; few chunks are ahead of what is asked for.

    On Linux the processes are forks, as those of torch's DataLoader. They begin at once, where a fresh one
    imports torch for 3 s. Forking is safe here, because they run nothing that has threads.
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
                "a process that tokenises was killed, perhaps because memory ran out; free some and start"
                " again"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """A context in which Ctrl-C waits. A process that starts in it never sees Ctrl-C."""
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
    """End this process when the first one is gone, however the first one ended."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _work(chunk: list) -> Part:
    return _convert(chunk)
