"""--data_file -> the files to read, each with its format and weight."""

from __future__ import annotations

import csv
import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from rwkv_miss.errors import UserError
from rwkv_miss.progress import Progress

from ...config.launcher import is_first_process
from . import binidx, json_text, tables, text
from .layouts import has_layout

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", ".bin")
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "config.json")  # of a data set, without rows
JSONL_SUFFIXES = (".jsonl", ".ndjson")
BINIDX = "binidx"  # whose rows are tokens already
DELIMITERS = {",": "CSV", "\t": "TSV", ";": "CSV with ;"}
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)?")
SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)(?![a-z])")
HEADER = 1 << 16  # characters of a header, at most
WATCHED = 16  # records between two looks at how far the reader is
SAMPLE = 1 << 20  # characters of a file that its format is told from


@dataclasses.dataclass(frozen=True)
class Reading:
    """How data are read: the columns to use where their names do not tell (--sft_field), and the split of
    data sets that have several.
    """

    fields: tuple[str, ...] = ()
    split: str = "train"

    @classmethod
    def of(cls, config) -> Reading:
        return cls(tuple(filter(None, map(str.strip, config.sft_field.split(",")))), config.sft_split)


BY_NAME = Reading()


def _as_it_is(record: Any) -> Any:
    return record


class Format(NamedTuple):
    """How a file of text is read: path -> (place, what stands there), of which parse() makes the record, in
    another process perhaps."""

    name: str
    read: Callable[[str, text.Position], Iterator[tuple[str, Any]]]
    parse: Callable[[Any], Any] = _as_it_is


JSONL = Format("JSONL", json_text.jsonl, json_text.parse_line)
JSON = Format("JSON", json_text.json_file)


@dataclasses.dataclass(frozen=True)
class Source:
    """A file, folder or data set: `weight` is how often its rows are seen in one pass over the data. `read`
    and `parse` are a Format's, except that `read` takes the ids that end a document instead of the path.
    """

    path: str
    format: str
    weight: float
    read: Callable[[Sequence[int], text.Position], Iterator[tuple[str, Any]]]
    files: tuple[str, ...]  # what its content is in; () for a data set of the hub
    parse: Callable[[Any], Any] = _as_it_is

    @property
    def size(self) -> int:
        """Bytes; 0 for a data set of the hub."""
        return sum(os.path.getsize(file) for file in self.files)

    def watched(self, eod: Sequence[int], doing: str) -> Iterator[tuple[str, Any]]:
        """read() with a bar that says what is being done."""
        position = text.Position()
        total, unit = (self.size / 1e6, "MB") if self.size else (100, "%")
        with Progress(f"{doing} {self.path}", total, unit, is_first_process()) as bar:
            for number, found in enumerate(self.read(eod, position)):
                yield found
                if number % WATCHED == 0:
                    bar.update(total * position.share() - bar.done)

    def records(self, eod: Sequence[int] = ()) -> Iterator[text.Record]:
        """(place, record) of everything in it, as in text.py."""
        for where, found in self.watched(eod, "reading"):
            yield where, self.parse(found)


def sources(data_file: str, reading: Reading = BY_NAME, notes: list[str] | None = None) -> list[Source]:
    """What --data_file names: a file, a folder (all data files in it), a data set of the hub (OWNER/NAME, if
    there is no such path), or several of them between commas, each with a weight after a colon if it is not
    1: a.jsonl:2,b.jsonl:0.5.

    `notes` gets lines for the plan. Raises UserError for what is not there or not recognised.
    """
    found: list[Source] = []
    for path, weight in parse(data_file):
        found += [
            dataclasses.replace(source, weight=weight)
            for source in _find(path, reading, [] if notes is None else notes)
        ]
    return found


def parse(data_file: str) -> list[tuple[str, float]]:
    """(path, weight) of each part; a path that exists is taken as it is, commas and colons included."""
    if _exists(data_file):
        return [(data_file, 1.0)]
    return [_weighted(part.strip(), data_file) for part in data_file.split(",")]


def _weighted(part: str, data_file: str) -> tuple[str, float]:
    path, colon, number = part.rpartition(":")
    if not part:
        raise UserError(f"--data_file {data_file}: a name is missing between the commas")
    if (
        _exists(part)
        or not re.fullmatch(r"[+-]?[\d.]+(e[+-]?\d+)?|nan|inf", number, re.IGNORECASE)
        or not colon
    ):
        return part, 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = 0.0
    if not 0 < weight < 1e6:
        raise UserError(
            f"--data_file {part}: a weight is a number above 0, such as 2 (seen twice in a pass) or 0.5 (half"
            f" of its rows), got {number}"
        )
    return path, weight


def _exists(path: str) -> bool:
    return os.path.exists(path) or binidx.prefix_of(path) is not None


def _find(path: str, reading: Reading, notes: list[str]) -> list[Source]:
    fields, split = reading.fields, reading.split
    if os.path.isdir(path) and not tables.is_saved_dataset(path):
        return [detect(file, fields) for file in _folder(path, split, notes)]
    if os.path.isdir(path):
        files = tuple(
            sorted(os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
        )
        described = f"Hugging Face data set, split {split}"
        return [Source(path, described, 1.0, lambda eod, at: tables.saved_dataset(path, split, at), files)]
    if (
        HUB_NAME.fullmatch(path)
        and not _exists(path)
        and not os.path.exists(path.split("/")[0])
        and not path.endswith(SUFFIXES)
    ):
        described = f"data set of the Hugging Face hub, split {split}"
        return [Source(path, described, 1.0, lambda eod, at: tables.named_dataset(path, split, at), ())]
    return [detect(path, fields)]


def _folder(path: str, split: str, notes: list[str]) -> list[str]:
    """The data files of a folder, in order of their names; files that are named for another split than
    `split` are left out.
    """
    files = [
        os.path.join(folder, name)
        for folder, _, names in os.walk(path)
        for name in names
        if not _hidden(os.path.relpath(folder, path), name)
    ]
    data = [
        file
        for file in sorted(files)
        if _suffix(file) in SUFFIXES
        and os.path.basename(file) not in DESCRIPTIONS
        and (_suffix(file) != ".bin" or binidx.prefix_of(file))
    ]
    splits = {file: _split_of(os.path.relpath(file, path)) for file in data}
    chosen = [file for file in data if splits[file] in (None, split)]
    if not chosen:
        others = ", ".join(sorted({name for name in splits.values() if name}))
        expected = (
            f"has none for the split {split}, but for {others}: choose with --sft_split"
            if others
            else f"expected {', '.join(SUFFIXES)}"
        )
        raise UserError(f"folder {path} has no data file; {expected}")
    left = [
        os.path.relpath(file, path)
        for file in sorted(files)
        if file not in chosen and not file.endswith(".idx")
    ]
    shown = f"; left out: {', '.join(left[:5])}{' ...' if len(left) > 5 else ''}" if left else ""
    notes.append(f"folder     {path}: {len(chosen)} data files{shown}")
    return chosen


def _hidden(folder: str, name: str) -> bool:
    return any(part.startswith(".") and part != "." for part in (*folder.split(os.sep), name))


def _split_of(path: str) -> str | None:
    """The split that a file's name, or else its folder's, begins with."""
    parts = path.lower().split(os.sep)[-2:]
    return next((match[1] for part in reversed(parts) if (match := SPLIT.match(part))), None)


def _suffix(path: str) -> str:
    return os.path.splitext(path.lower().removesuffix(".gz"))[1]


def detect(path: str, fields: tuple[str, ...] = ()) -> Source:
    """The source that a file is: by its content, and by its suffix where the content does not tell."""
    prefix = binidx.prefix_of(path)
    if prefix and (not os.path.isfile(path) or path.endswith((".bin", ".idx"))):
        files = (f"{prefix}.bin", f"{prefix}.idx")
        return Source(path, BINIDX, 1.0, functools.partial(binidx.documents, prefix), files)
    if problem := _no_file(path):
        raise UserError(f"data file {path} can't be read: {problem}")
    suffix = _suffix(path)
    if suffix in (".bin", ".idx"):
        raise UserError(
            f"data file {path} can't be read: binidx data are two files, and"
            f" {'.idx' if suffix == '.bin' else '.bin'} or both are absent"
        )
    try:
        with open(path, "rb") as file:
            parquet = file.read(4) == b"PAR1"
    except OSError as error:
        raise UserError(f"data file {path} can't be read: {error.strerror}") from None
    if parquet or suffix == ".parquet":
        return Source(path, "parquet", 1.0, lambda eod, at: tables.parquet(path, at), (path,))
    with text.open_text(path) as file:
        sample = file.read(SAMPLE)
    found = _text_format(path, suffix, sample, fields)
    return Source(path, found.name, 1.0, lambda eod, at: found.read(path, at), (path,), found.parse)


def _no_file(path: str) -> str:
    """What a name stands for that a person takes for a file's."""
    if os.path.exists(path):
        return (
            ""
            if os.path.isfile(path)
            else "it is no regular file; data are read more than once, so save them as one"
        )
    if "://" in path:
        return (
            "no address is downloaded from; fetch it first, or give OWNER/NAME of a data set of the Hugging"
            " Face hub"
        )
    if re.search(r"[*?]|\[.*\]", path):
        return "no pattern is expanded; give the folder, or files with commas between them"
    return ""


def _text_format(path: str, suffix: str, sample: str, fields: tuple[str, ...]) -> Format:
    """By the beginning of the file, and by its suffix where that does not tell."""
    lines = [line for line in sample.lstrip(text.BOM).split("\n", 1000) if line.strip()]
    first = lines[0].strip() if lines else ""
    if found := _json_format(first, len(lines), suffix, len(sample) == SAMPLE, fields):
        return found
    if delimiter := _delimiter(first, suffix, fields):
        return Format(DELIMITERS[delimiter], functools.partial(text.delimited, delimiter=delimiter))
    if suffix == ".txt":
        return Format("plain text, one document", text.plain)
    if suffix == ".json":
        return JSON
    if suffix in JSONL_SUFFIXES or not first:
        return JSONL
    raise UserError(
        f"{path} is of no known format; it begins with {first[:60]!r}. Expected JSONL, JSON, CSV or TSV with"
        " a header, parquet, binidx, or plain text in a file named .txt"
    )


def _json_format(
    first: str, lines: int, suffix: str, goes_on: bool, fields: tuple[str, ...]
) -> Format | None:
    """JSONL or JSON, or None for neither, by the first of `lines` lines, which are all that there are unless
    the file `goes_on`.
    """
    record = json_text.parse(first) if first.startswith("{") else None
    is_row = isinstance(record, dict)
    is_known = is_row and bool(fields or has_layout(record))
    if suffix == ".txt" and not is_known:  # a text may begin with a bracket
        return None
    if is_row:
        return JSONL if lines > 1 or is_known else JSON
    if first.startswith("["):
        return JSON
    # an object over several lines, or a row that is broken or longer than what was looked at
    if first.startswith("{"):
        is_line = first.endswith("}") or lines == 1 and goes_on
        return JSONL if suffix in JSONL_SUFFIXES or suffix != ".json" and is_line else JSON
    return None


def _delimiter(header: str, suffix: str, fields: tuple[str, ...]) -> str | None:
    """What stands between the columns of a file whose first line is `header`; None if it is no such file."""
    split = {mark: _names(header, mark) for mark in DELIMITERS}
    known = [
        mark for mark, names in split.items() if (set(fields) <= set(names) if fields else has_layout(names))
    ]
    if suffix in (".csv", ".tsv"):
        return (
            max(known or DELIMITERS, key=lambda mark: (len(split[mark]), suffix == ".tsv" and mark == "\t"))
            if header
            else ","
        )
    known = [mark for mark in known if len(split[mark]) > 1 and (mark == "\t" or suffix != ".txt")]
    return known[0] if known else None


def _names(header: str, mark: str) -> list[str]:
    try:
        return [name.strip() for name in next(csv.reader([header[:HEADER]], delimiter=mark), [])]
    except csv.Error:
        return []  # whoever reads the file says what is wrong


def sample(count: int, weight: float, seed: int, number: int) -> np.ndarray:
    """Which of a source's `count` rows one pass over the data sees, ascending, some of them several times:
    each `weight` times on average.

    Of a weight's fraction the rows are drawn without repetition, by `seed` and the source's `number`; at
    least one row is seen.
    """
    whole = int(weight)
    drawn = np.random.default_rng([seed, number]).permutation(count)[
        : max(round((weight - whole) * count), 0 if whole else 1)
    ]
    return np.sort(np.concatenate([np.tile(np.arange(count), whole), drawn]))
