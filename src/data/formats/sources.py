"""Sources: --data_file -> the files to read, each with its format and weight."""

from __future__ import annotations

import csv
import dataclasses
import fnmatch
import functools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from rwkv_miss.errors import UserError, similar_path
from rwkv_miss.files.hub_names import of_address
from rwkv_miss.progress import Progress

from ...common.first_process import is_first_process
from ...config.schema import FIELDS
from ...losses import LOSSES
from . import binidx, json_text, tables, text
from .layouts import LABELS, PAIRS, SFT, has_layout, is_pair
from .text import MB

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".bin")
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "config.json")  # about a data set, without records
MAPPED = "cache-*.arrow"  # rows that Dataset.map() made of the other files in the folder
JSONL_SUFFIXES = (".jsonl", ".ndjson")
BINIDX = "binidx"  # the format whose records are tokens already
DELIMITERS = {",": "CSV", "\t": "TSV", ";": "CSV with ;"}
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)?")
SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)(?![a-z])")
HEADER = 1 << 16  # characters of a header, at most
WATCHED = 16  # records between two updates of the progress
SAMPLE = 1 << 20  # characters of a file that its format is told from


ROWS_OF = {"pairs": PAIRS, "labels": LABELS}  # data of a loss -> the kind of its rows; else SFT


@dataclasses.dataclass(frozen=True)
class Reading:
    """Settings about how data are read."""

    fields: tuple[str, ...] = ()  # --sft_field: the columns to use where their names do not tell
    split: str = "train"  # --sft_split: of data sets that have several
    rows: str = SFT  # the kind of the rows, one of ROWS
    row_bytes: int = FIELDS["largest_row"].default * MB  # --largest_row

    @classmethod
    def of(cls, config) -> Reading:
        names = [name.strip() for name in config.sft_field.split(",")]
        # questions are rows of supervised training, whose answer is the reference answer
        rows = ROWS_OF.get(LOSSES[getattr(config, "loss", "sft")].data, SFT)
        return cls(tuple(filter(None, names)), config.sft_split, rows, config.largest_row * MB)


BY_NAME = Reading()


def _as_it_is(record: Any) -> Any:
    return record


class TextFormat(NamedTuple):
    """Format of a file of text."""

    name: str
    read: Callable[[str, text.Position], Iterator[tuple[str, Any]]]  # path -> (place, item)
    parse: Callable[[Any], Any] = _as_it_is  # item -> record, perhaps in another process


JSONL = TextFormat("JSONL", json_text.jsonl, json_text.parse_line)
JSON = TextFormat("JSON", json_text.json_file)


@dataclasses.dataclass(frozen=True)
class DataSource:
    """Source of records: a file, folder or data set.

    `read` and `parse` are a Format's, but `read` takes the ids that end a document instead of the path.
    """

    path: str
    format: str
    weight: float  # how often its records are seen in one pass over the data
    read: Callable[[Sequence[int], text.Position], Iterator[tuple[str, Any]]]
    files: tuple[str, ...]  # the files that hold its content; () for a data set of the hub
    parse: Callable[[Any], Any] = _as_it_is

    @property
    def size(self) -> int:
        """Bytes; 0 for a data set of the hub."""
        return sum(os.path.getsize(file) for file in self.files)

    def watched(
        self, eod: Sequence[int], doing: str, join: Callable[[str, int], None] | None = None
    ) -> Iterator[tuple[str, Any]]:
        """Read with a bar that says what is being done. `join` gets the place of a CSV row that holds others,
        and their number."""
        mark = next((mark for mark, name in DELIMITERS.items() if name == self.format), "")
        position = text.Position()
        total, unit = (self.size / 1e6, "MB") if self.size else (100, "%")
        with Progress(f"{doing} {self.path}", total, unit, is_first_process()) as bar:
            for number, found in enumerate(self.read(eod, position)):
                yield found
                where, record = found
                if join and mark and isinstance(record, dict) and (rows := text.rows_within(record, mark)):
                    join(where, rows)
                if number % WATCHED == 0:
                    bar.update(total * position.share() - bar.done)

    def records(self, eod: Sequence[int] = ()) -> Iterator[text.Record]:
        """Yield (place, record) of everything in the source, as in text.py."""
        for where, found in self.watched(eod, "reading"):
            yield where, self.parse(found)


def sources(data_file: str, reading: Reading = BY_NAME, notes: list[str] | None = None) -> list[DataSource]:
    """Find the sources of --data_file: a file, all data files of a folder, a data set of the hub, or several.

    A data set of the hub is OWNER/NAME, if there is no such path. Several names have commas between them,
    each with a weight after a colon if it is not 1: a.jsonl:2,b.jsonl:0.5. `notes` gets lines for the plan.
    Raises UserError for a source that does not exist or is not recognised.
    """
    notes = [] if notes is None else notes
    found: list[DataSource] = []
    for path, weight in weighted_paths(data_file):
        found += [dataclasses.replace(source, weight=weight) for source in _find(path, reading, notes)]
    return found


def weighted_paths(data_file: str) -> list[tuple[str, float]]:
    """Split into (path, weight); a path that exists is taken as it is, with its commas and colons."""
    if _exists(data_file):
        return [(data_file, 1.0)]
    return [_weighted(part.strip(), data_file) for part in data_file.split(",")]


def _weighted(part: str, data_file: str) -> tuple[str, float]:
    path, colon, number = part.rpartition(":")
    if not part:
        raise UserError(f"--data_file {data_file}: a name is missing between the commas")
    is_number = re.fullmatch(r"[+-]?[\d.]+(e[+-]?\d+)?|nan|inf", number, re.IGNORECASE)
    if _exists(part) or not colon or not is_number:
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


def _find(path: str, reading: Reading, notes: list[str]) -> list[DataSource]:
    split = reading.split
    if os.path.isdir(path) and not tables.is_saved_dataset(path):
        return [detect(file, reading) for file in _folder(path, split, notes)]
    if os.path.isdir(path):
        described = f"Hugging Face data set, split {split}"
        files = tuple(files_in(path))
        return [
            DataSource(path, described, 1.0, lambda eod, at: tables.saved_dataset(path, split, at), files)
        ]
    if names_dataset(path):
        described = f"data set of the Hugging Face hub, split {split}"
        return [DataSource(path, described, 1.0, lambda eod, at: tables.named_dataset(path, split, at), ())]
    return [detect(path, reading)]


def names_dataset(path: str) -> bool:
    """Tell whether a text can be OWNER/NAME of a data set of the hub, and is no mistyped path."""
    if not HUB_NAME.fullmatch(path) or path.endswith(SUFFIXES):
        return False
    return not _exists(path) and not os.path.exists(path.split("/")[0])


def files_in(path: str) -> list[str]:
    """List all files of a folder and of the folders in it, sorted."""
    return sorted(os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)


def _folder(path: str, split: str, notes: list[str]) -> list[str]:
    """List the data files of a folder, in order of their names, without those of splits but `split`."""
    files = [file for file in files_in(path) if not _hidden(os.path.relpath(file, path))]
    data = [file for file in files if may_have_records(file)]
    splits = {file: _split_of(os.path.relpath(file, path)) for file in data}
    chosen = [file for file in data if splits[file] in (None, split)]
    if not chosen:
        expected = f"expected {', '.join(SUFFIXES)}"
        if others := sorted({name for name in splits.values() if name}):
            expected = f"has none for the split {split}, but for {', '.join(others)}: choose with --sft_split"
        raise UserError(f"folder {path} has no data file; {expected}")
    rest = [file for file in files if file not in chosen and not file.endswith(".idx")]
    shown = ""
    if rest:
        named = ", ".join(os.path.relpath(file, path) for file in rest[:5])
        shown = f"; left out: {named}{' ...' if len(rest) > 5 else ''}"
    notes.append(f"folder     {path}: {len(chosen)} data files{shown}")
    return chosen


def _hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split(os.sep))


def may_have_records(file: str) -> bool:
    """Tell whether a file's name is that of a data file."""
    name = os.path.basename(file)
    if name in DESCRIPTIONS or fnmatch.fnmatch(name, MAPPED):
        return False
    suffix = _suffix(file)
    return suffix in SUFFIXES and (suffix != ".bin" or binidx.prefix_of(file) is not None)


def _split_of(path: str) -> str | None:
    """Return the split that a file's name, or else its folder's, begins with."""
    parts = path.lower().split(os.sep)[-2:]
    return next((match[1] for part in reversed(parts) if (match := SPLIT.match(part))), None)


def _suffix(path: str) -> str:
    return os.path.splitext(path.lower().removesuffix(".gz"))[1]


def detect(path: str, reading: Reading = BY_NAME) -> DataSource:
    """Find the format of a file by its content, and by its suffix if the content does not tell."""
    prefix = binidx.prefix_of(path)
    if prefix and (not os.path.isfile(path) or path.endswith((".bin", ".idx"))):
        files = (f"{prefix}.bin", f"{prefix}.idx")
        return DataSource(path, BINIDX, 1.0, functools.partial(binidx.documents, prefix), files)
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
            begin = file.read(6)
    except OSError as error:
        raise UserError(f"data file {path} can't be read: {error.strerror}{similar_path(path)}") from None
    if begin.startswith(b"PAR1") or suffix == ".parquet":
        return DataSource(path, "parquet", 1.0, lambda eod, at: tables.parquet(path, at), (path,))
    if begin.startswith((tables.ARROW_STREAM, tables.ARROW_FILE)) or suffix == ".arrow":
        return DataSource(path, "Arrow", 1.0, lambda eod, at: tables.arrow(path, at), (path,))
    with text.open_text(path) as file:
        sample = file.read(SAMPLE)
    found = _text_format(path, suffix, sample, reading.fields)
    read = found.read
    if found.name in (JSONL.name, *DELIMITERS.values()):  # the others are read whole
        read = functools.partial(read, largest=reading.row_bytes)
    return DataSource(path, found.name, 1.0, lambda eod, at: read(path, at), (path,), found.parse)


def _no_file(path: str) -> str:
    """Say why a path can't be a data file, for some common mistakes; else ""."""
    if os.path.isfile(path):
        return ""
    if os.path.exists(path):
        return "it is no regular file; data are read more than once, so save them as one"
    if name := of_address(path):
        return f"no address is downloaded from; give {name}"
    if "://" in path:
        return (
            "no address is downloaded from; fetch it first, or give OWNER/NAME of a data set of the Hugging"
            " Face hub, or hf://OWNER/NAME/FILE of a file there"
        )
    if re.search(r"[*?]|\[.*\]", path):
        return "no pattern is expanded; give the folder, or files with commas between them"
    return ""


def _text_format(path: str, suffix: str, sample: str, fields: tuple[str, ...]) -> TextFormat:
    """Find the format of a file, by its beginning `sample`, and by its suffix if that does not tell."""
    lines = [line for line in sample.lstrip(text.BOM).split("\n", 1000) if line.strip()]
    first = lines[0].strip() if lines else ""
    if found := _json_format(first, len(lines), suffix, len(sample) == SAMPLE, fields):
        return found
    if delimiter := _delimiter(first, suffix, fields):
        return TextFormat(DELIMITERS[delimiter], functools.partial(text.delimited, delimiter=delimiter))
    if suffix == ".txt":
        return TextFormat(text.PLAIN, text.plain)
    if suffix == ".json":
        return JSON
    if suffix in JSONL_SUFFIXES or not first:
        return JSONL
    raise UserError(
        f"{path} is of no known format; it begins with {first[:60]!r}. Expected JSONL, JSON, CSV or TSV with"
        " a header, parquet, Arrow, binidx, or plain text in a file named .txt"
    )


def _json_format(
    first: str, lines: int, suffix: str, goes_on: bool, fields: tuple[str, ...]
) -> TextFormat | None:
    """Choose JSONL or JSON by the first line of the file; None for neither.

    `lines`: the number of lines in the sample, which is the whole file unless it `goes_on`.
    """
    record = json_text.parse_json(first) if first.startswith("{") else None
    is_object = isinstance(record, dict)
    is_known = is_object and bool(fields or has_layout(record) or is_pair(record))
    if suffix == ".txt" and not is_known:  # a text may begin with a bracket
        return None
    if is_object:
        return JSONL if lines > 1 or is_known else JSON
    if first.startswith("["):
        return JSON
    if first.startswith("{"):
        # an object over several lines, or a line that is broken or longer than the sample
        is_line = first.endswith("}") or lines == 1 and goes_on
        return JSONL if suffix in JSONL_SUFFIXES or suffix != ".json" and is_line else JSON
    return None


def _delimiter(header: str, suffix: str, fields: tuple[str, ...]) -> str | None:
    """Return the separator of columns in a file with the first line `header`; None if it has none."""
    split = {mark: _names(header, mark) for mark in DELIMITERS}

    def is_known(names: list[str]) -> bool:
        return set(fields) <= set(names) if fields else has_layout(names) or is_pair(names)

    with_names = [mark for mark, names in split.items() if is_known(names)]
    if suffix in (".csv", ".tsv"):
        if not header:
            return ","
        # the mark that gives the most columns; of several, the tab for a .tsv
        marks = with_names or list(DELIMITERS)
        return max(marks, key=lambda mark: (len(split[mark]), suffix == ".tsv" and mark == "\t"))
    with_names = [mark for mark in with_names if len(split[mark]) > 1 and (mark == "\t" or suffix != ".txt")]
    return with_names[0] if with_names else None


def _names(header: str, mark: str) -> list[str]:
    try:
        return [name.strip() for name in next(csv.reader([header[:HEADER]], delimiter=mark), [])]
    except csv.Error:
        return []  # the reader of the file says what is wrong


def sample(count: int, weight: float, seed: int, number: int) -> np.ndarray:
    """Choose from a source's `count` records those of one pass over the data: each `weight` times on average.

    They are ascending, and some come several times. For the fraction of a weight, records are drawn without
    repetition, by `seed` and the source's `number`. At least one record is chosen.
    """
    whole = int(weight)
    more = max(round((weight - whole) * count), 0 if whole else 1)
    drawn = np.random.default_rng([seed, number]).permutation(count)[:more]
    return np.sort(np.concatenate([np.tile(np.arange(count), whole), drawn]))
