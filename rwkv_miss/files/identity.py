"""Checkpoint identity: one digest over all tensor bytes, which adapters, merged files and runs record.

fingerprint() reads all bytes, 1.3 GB/s a core. It is computed once per file and remembered in the user's
cache folder, by size, times and inode of the file, or of every file of a Hugging Face folder. Because it
hashes tensors under RWKV's names, all forms of a model with equal shapes and values have the same one.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from ..errors import UserError
from ..progress import DELAY, Progress, print_notes
from .checkpoint import memory
from .model_files import FACTS, file_facts, is_file_or_folder, read_tensors
from .output import user_cache

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

DIGEST = "blake2b:"  # twice as fast as sha256 on a CPU without instructions for sha256
REMEMBERED = 1 << 24  # bytes; the digest of a file of this size or more is remembered
ROWS = 64  # the most rows of a matrix that weights_fingerprint() reads
SETTLED = 2_000_000_000  # ns since the last change; a younger file could change again without a new time


def fingerprint(tensors: Mapping[str, Tensor], bar: Progress | None = None) -> str:
    """Hash names, shapes, dtypes and all bytes, whatever the order of names: "blake2b:" and 64 hex digits."""
    names = sorted(tensors)
    digest = hashlib.blake2b(digest_size=32)
    digests = _in_threads(_digest_of, [tensors[name] for name in names])
    for name, of_bytes in zip(names, digests, strict=True):
        tensor = tensors[name]
        digest.update(f"{name!r} {tuple(tensor.shape)} {tensor.dtype}\n".encode() + of_bytes)
        if bar:
            bar.update(tensor.nbytes / 1e6)
    return DIGEST + digest.hexdigest()


def _digest_of(tensor: Tensor) -> bytes:
    tensor = tensor.detach().cpu().contiguous()
    return hashlib.blake2b(memory(tensor), digest_size=32).digest()


def _in_threads(work: Callable[[Tensor], bytes], tensors: list[Tensor]) -> Iterable[bytes]:
    """Do the work in threads, results in order; hashlib leaves the other threads running."""
    if sum(tensor.nbytes for tensor in tensors) < REMEMBERED:
        yield from map(work, tensors)
        return
    pool = ThreadPoolExecutor(torch.get_num_threads())
    try:
        yield from pool.map(work, tensors)
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C start no further tensor


def weights_fingerprint(weights: Iterable[Tensor]) -> str | None:
    """Hash some matrices, whatever their names, order and floating-point dtype: "blake2b:" and 64 hex digits.

    weights: (..., rows, columns). Their shapes count, and up to ROWS evenly spread rows of each, rounded to
    bf16, so that a base loaded in another dtype has the same digest. None if one is quantised, sharded, or
    without values.
    """
    digests = []
    for weight in weights:
        plain = type(weight) in (Tensor, torch.nn.Parameter) and weight.is_floating_point()
        if not plain or weight.is_meta or weight.itemsize == 1 or not weight.numel():
            return None
        rows = weight.detach().flatten(0, -2)
        rows = rows[:: max(1, len(rows) // ROWS)].to(torch.bfloat16)
        digests.append(str(tuple(weight.shape)).encode() + _digest_of(rows))
    digest = hashlib.blake2b(b"".join(sorted(digests)), digest_size=32)
    return DIGEST + digest.hexdigest() if digests else None


class Identity:
    """Identity of a checkpoint's tensors. The digest is computed at its first use.

    path: the tensors' file, "" for none. Without `tensors` they are read from the file again, which must not
    have changed since. shown: show a bar, in one of several processes.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] = "",
        tensors: Mapping[str, Tensor] | None = None,
        shown: bool = True,
    ) -> None:
        self.path, self.given, self.shown = os.fspath(path), tensors, shown
        self.state = file_facts(path) if tensors is None else None

    @functools.cached_property
    def fingerprint(self) -> str:
        """Return fingerprint() of the tensors."""
        if is_file_or_folder(self.path) and sum(file_facts(self.path)[::FACTS]) >= REMEMBERED:
            return _remembered(self.path, self._compute)
        return fingerprint(self._tensors())

    def hash_small_file(self, tensors: Mapping[str, Tensor]) -> None:
        """Compute the digest of a small `path` now, from its tensors, so that nobody reads it again."""
        if sum(self.state[::FACTS]) < REMEMBERED:
            self.fingerprint = fingerprint(tensors)

    def _tensors(self) -> Mapping[str, Tensor]:
        if self.given is not None:
            return self.given
        tensors = read_tensors(self.path, any_folder=True)
        # without the last of FACTS, which also changes with the file's name and permissions
        now = file_facts(self.path)
        if any(now[i::FACTS] != self.state[i::FACTS] for i in range(FACTS - 1)):
            raise UserError(f"{self.path} is another file than the one that was read; start again")
        return tensors

    def _compute(self) -> str:
        tensors = self._tensors()
        size = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
        with Progress(f"hashing {os.path.basename(self.path)}", size, "MB", self.shown) as bar:
            return fingerprint(tensors, bar)


def _remembered(path: str, compute: Callable[[], str]) -> str:
    """Look up or compute() a fact about a file as it is now. One process computes while others wait."""
    state = file_facts(path)
    place = os.path.realpath(path)
    entry = user_cache("fingerprints") / f"{hashlib.blake2b(place.encode(), digest_size=16).hexdigest()}.json"
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        file = open(entry, "a+b", buffering=0)
    except OSError as error:
        begun = time.monotonic()
        value = compute()
        if time.monotonic() - begun > DELAY:
            print_notes(
                [
                    f"{entry.parent} can't be written ({error.strerror}), so {path} is hashed whenever it is"
                    " used"
                ]
            )
        return value
    with file:
        if fcntl:
            with contextlib.suppress(OSError):  # no locks on this file system
                fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        with contextlib.suppress(ValueError, LookupError, TypeError):
            record = json.loads(file.read())
            if record["state"] == state and record["fingerprint"].startswith(DIGEST):
                return record["fingerprint"]
        value = compute()
        changed = max(state[1::FACTS] + state[3::FACTS])
        if file_facts(path) == state and time.time_ns() - changed > SETTLED:
            # if the disk is full, the truncated text is no JSON, and the next reader ignores it
            with contextlib.suppress(OSError):
                file.truncate(0)
                file.write(json.dumps({"file": place, "state": state, "fingerprint": value}).encode())
        return value
