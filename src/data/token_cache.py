"""Token cache: records are tokenised once and kept in files that all processes map into memory.

Large data are tokenised in parallel. A cache entry is a folder of flat arrays. Its name is a hash of all that
decides the tokens: the data's bytes, tokenizer, template, loss mask, BOS and the code. So a changed
file is another entry. It appears in one rename, and one process makes it while the others wait.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from rwkv_miss.errors import UserError
from rwkv_miss.files.output import user_cache
from rwkv_miss.progress import Progress

from ..common.first_process import is_first_process
from ..ops import build, longest_match
from ..ops.build import announce, locked
from .encode import DTYPES, Encoder, Tokens
from .formats import BY_NAME, DataSource, Reading, Report, SourceFindings
from .parallel import TokenConverter, parts_of

SMALL = 1 << 20  # fewer bytes of data get no cache entry: tokenising them is quick
UNUSED_DAYS = 30
MAKING = ".making-"  # beginning of an unfinished entry's name
ENTRY = re.compile(r"[0-9a-f]{24}")


def tokenise(
    source: DataSource, encoder: Encoder, report: Report, reading: Reading = BY_NAME, cache: str = "none"
) -> Tokens:
    """Return the documents of a source, from the cache folder if it has them.

    `cache` is a folder, "none" for no cache, or "auto" for the user's own cache folder. If the folder cannot
    be used, a note says so, and there is no cache. Findings and records that cannot be used go to the report.
    Raises UserError for a source without records.
    """
    chunks = functools.partial(_encoded, source, encoder, report, reading)
    if cache == "none" or source.size < SMALL:
        return _joined(list(chunks()))
    folder = cache_folder(cache)
    entry = folder / fingerprint(source, encoder, reading, report.on_bad_row)
    if (tokens := _open(entry, source, report)) is not None:
        return tokens
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "lock", "the tokens"):
            # another process may have made the entry meanwhile
            if (tokens := _open(entry, source, report)) is not None:
                return tokens
            remove_old(folder)
            begun = time.perf_counter()
            _make(entry, chunks, source, report)
            tokens = _open(entry, source, report)
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
        f"tokenised {source.path} in {seconds:.1f} s: {len(tokens.ids):,} tokens; "
        f"kept in {entry} ({size / 1e6:.1f} MB) for later runs"
    )
    return tokens


def _make(
    entry: pathlib.Path, chunks: Callable[[], Iterator[Tokens]], source: DataSource, report: Report
) -> None:
    """Write the cache entry in a temporary folder, then rename that."""
    with tempfile.TemporaryDirectory(dir=entry.parent, prefix=MAKING, ignore_cleanup_errors=True) as work:
        whole = pathlib.Path(work, "whole")
        with contextlib.closing(chunks()) as parts:
            _write(parts, whole)
        (whole / "found.json").write_text(json.dumps(report.files[source.path].to_json()))
        shutil.rmtree(entry, ignore_errors=True)  # one that could not be opened
        os.rename(whole, entry)


def cache_folder(cache: str) -> pathlib.Path:
    return user_cache("data") if cache == "auto" else pathlib.Path(cache).expanduser()


def fingerprint(source: DataSource, encoder: Encoder, reading: Reading, on_bad_row: str) -> str:
    """Hash everything that decides the tokens."""
    matchers = pathlib.Path(longest_match.__file__), build.CUDA / "tokenizer_cpu.cpp"
    code = [*sorted(pathlib.Path(__file__).parent.rglob("*.py")), *matchers]
    tokenizer = [encoder.tokenizer.name] if os.path.isfile(encoder.tokenizer.name) else []
    versions = [(name, _version(name)) for name in ("numpy", "rwkv", "tokenizers", "jinja2")]
    described = (
        source.format,
        reading,
        on_bad_row,
        versions,
        encoder.tokenizer.name,
        encoder.tokenizer.eod,
        encoder.template.record,
        encoder.loss_mask,
        encoder.bos,
        encoder.think_weight,
        encoder.prompt_weight,
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


def _encoded(source: DataSource, encoder: Encoder, report: Report, reading: Reading) -> Iterator[Tokens]:
    """Yield the tokens of a source's records, a chunk of records at a time."""
    documents = 0
    for part in parts_of(TokenConverter(source, reading, encoder), report, "tokenising"):
        documents += len(part.made.ends)
        yield part.made
    if not documents:
        raise UserError(f"{source.path}: {report.files[source.path].unusable()}")


def _joined(parts: list[Tokens]) -> Tokens:
    starts = np.cumsum([0, *(len(part.ids) for part in parts)])
    parts = [dataclasses.replace(part, ends=part.ends + start) for part, start in zip(parts, starts)]
    return Tokens(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in DTYPES})


def _write(parts: Iterable[Tokens], folder: pathlib.Path) -> None:
    """Write the arrays of a cache entry; no more than one part is in memory at a time."""
    folder.mkdir()
    length = 0
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / name, "wb")) for name in DTYPES}
        for part in parts:
            for name, file in files.items():
                array = getattr(part, name)
                file.write((array + length if name == "ends" else array).tobytes())
            length += len(part.ids)


def _open(entry: pathlib.Path, source: DataSource, report: Report) -> Tokens | None:
    """Map the arrays of a cache entry into memory; the findings of reading go to the report.

    Returns None if the entry is absent, or incomplete because the machine went down.
    """
    try:
        # mapped as plain arrays, which are sliced in a tenth of a memmap's time
        mapped = {name: np.memmap(entry / name, dtype, "r") for name, dtype in DTYPES.items()}
        tokens = Tokens(**{name: values.view(np.ndarray) for name, values in mapped.items()})
        if not len(tokens.ids) == len(tokens.weights) == tokens.ends[-1]:
            return None
        per_document = (tokens.texts, tokens.begins, tokens.labels, tokens.places)
        if any(len(array) != len(tokens.ends) for array in per_document):
            return None
        with contextlib.suppress(OSError):
            os.utime(entry)  # time of its last use
        report.files[source.path] = SourceFindings.from_json(json.loads((entry / "found.json").read_text()))
        return tokens
    except (OSError, ValueError):
        return None


def remove_old(folder: pathlib.Path) -> None:
    """Delete entries that have not been used for UNUSED_DAYS, and what a killed process left. The values of
    a reference (sources/reference_pass.py) are entries, too.

    Other things in the folder are not ours.
    """
    for entry in folder.iterdir():
        if ENTRY.fullmatch(entry.name):
            days = UNUSED_DAYS
        elif entry.name.startswith(MAKING):
            days = 1
        else:
            continue
        with contextlib.suppress(OSError):
            if entry.is_dir() and time.time() - entry.stat().st_mtime > days * 86400:
                shutil.rmtree(entry, ignore_errors=True)
