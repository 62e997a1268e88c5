"""Files of text, plain or gzipped, whatever their encoding; CSV and plain text.

Readers yield (place, record). A record is a dict, or a UserError that says why there is none; then the reader
goes on. An error that makes the rest of a file unreadable is raised. A Position says how far a reader is.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import gzip
import io
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from rwkv_miss.errors import UserError

from ...common.formatting import short

PLAIN = "plain text"  # the format of a file that is one text, without rows
Record = tuple[str, "dict[str, Any] | UserError"]
# first bytes of packed files, and their packers
PACKED = {
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf": "7z",
    b"Rar!": "rar",
}
MODELS = (".pth", ".pt", ".ckpt", ".bin")  # a checkpoint of torch is a zip file
# byte order marks; the longer ones first, because the shorter ones begin them
BOMS = {
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
BOM = "\ufeff"
LARGEST_UNPACKED = 1 << 30  # characters of a gzipped file that is of no use in part
MB = 10**6
FIELD_LIMIT = 2**31 - 1  # characters in a cell; Python's own limit is 131072
STRANGE = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8 become these characters


@dataclasses.dataclass
class Position:
    """Progress of a reader: share() of its source, from 0 to 1."""

    share: Callable[[], float] = lambda: 0.0


@contextlib.contextmanager
def open_text(path: str, position: Position | None = None) -> Iterator[io.TextIOBase]:
    """Open the file as text, with its line ends as they are.

    It is read as UTF-8, or as its byte order mark says. Bytes that are not UTF-8 become surrogates. Raises
    UserError, also while the file is read, for one that cannot be read, is damaged, or is packed by anything
    but gzip.
    """
    try:
        with contextlib.ExitStack() as stack:
            file: Any = stack.enter_context(open(path, "rb"))
            if position is not None:
                position.share = functools.partial(_share, file, os.path.getsize(path))
            if file.peek(2)[:2] == b"\x1f\x8b":
                file = stack.enter_context(io.BufferedReader(stack.enter_context(gzip.open(file))))
            head = bytes(file.peek(8)[:8])
            if head.startswith(b"GGUF") or (head.startswith(b"PK\x03\x04") and path.endswith(MODELS)):
                raise UserError(
                    f"{path} is a model or an adapter, no data; a model goes to --load_model, "
                    "--data_file takes text, such as JSONL"
                )
            for magic, name in PACKED.items():
                if head.startswith(magic):
                    raise UserError(f"{path} is packed ({name}); unpack it, or pack it with gzip")
            encoding = next((name for mark, name in BOMS.items() if head.startswith(mark)), "utf-8-sig")
            if encoding == "utf-8-sig" and len(head) > 3 and (not any(head[1::2]) or not any(head[::2])):
                raise UserError(f"{path} looks like UTF-16 without a byte order mark; save it as UTF-8")
            yield stack.enter_context(io.TextIOWrapper(file, encoding, "surrogateescape", newline="\n"))
    except OSError as error:  # a damaged gzip file has no strerror
        raise UserError(f"data file {path} can't be read: {error.strerror or error}") from None
    except (EOFError, zlib.error) as error:
        raise UserError(
            f"data file {path} can't be read: the gzip file is truncated or damaged ({error})"
        ) from None
    except UnicodeError as error:
        raise UserError(f"data file {path} can't be read: not {encoding.upper()} text ({error})") from None


def _share(file: io.BufferedReader, size: int) -> float:
    return 1.0 if file.closed else file.tell() / max(size, 1)


def undecoded(text: str) -> UserError | None:
    """Return why a text is not UTF-8, or None if it is."""
    if text.isascii() or not STRANGE.search(text):
        return None
    data = text.encode("utf-8", "surrogateescape")
    try:
        data.decode()
    except UnicodeDecodeError as error:
        place = error.start + 1
        return UserError(f"not UTF-8 text ({error.reason} at byte {place}); {_other_encoding(data)}")
    return UserError("not UTF-8 text")


def _other_encoding(data: bytes) -> str:
    try:
        data.decode("gb18030")
    except UnicodeDecodeError:
        return "if it is Latin-1 or Windows-1252: iconv -f WINDOWS-1252 -t UTF-8"
    return "if it is GBK: iconv -f GB18030 -t UTF-8; if it is Latin-1: iconv -f WINDOWS-1252 -t UTF-8"


def bytes_of(value: Any) -> int:
    """Count the bytes of the texts in a record, or of a text, in UTF-8."""
    size, rest = 0, [value]
    while rest:
        value = rest.pop()
        if isinstance(value, str):
            size += len(value if value.isascii() else value.encode("utf-8", "replace"))
        elif isinstance(value, (list, dict)):
            rest.extend(value.values() if isinstance(value, dict) else value)
    return size


def too_large(size: int, largest: int) -> UserError:
    return UserError(
        f"the row has {size:,} bytes, more than {largest:,}; split it, or give --largest_row"
        f" {math.ceil(size / MB)}"
    )


def whole_text(path: str) -> str:
    """Read a file that is of no use in part.

    Raises UserError with the line where it stops being text.
    """
    with open_text(path) as file:
        is_packed = isinstance(file.buffer.raw, gzip.GzipFile)
        content = file.read(LARGEST_UNPACKED + 1 if is_packed else -1)
    if is_packed and len(content) > LARGEST_UNPACKED:
        raise UserError(
            f"{path} unpacks to one text of more than {LARGEST_UNPACKED:,} characters; unpack it, or save"
            " rows as JSONL"
        )
    if strange := STRANGE.search(content):
        number = content.count("\n", 0, strange.start())
        problem = undecoded(content.split("\n")[number])
        raise UserError(f"{path}, line {number + 1}: {problem}")
    return content


def plain(path: str, position: Position) -> Iterator[Record]:
    """Read the whole file as one text; Windows line ends become newlines."""
    content = whole_text(path)
    if content.strip():
        yield path, {"text": content.replace("\r\n", "\n")}


def delimited(path: str, position: Position, largest: int, delimiter: str) -> Iterator[Record]:
    """Read CSV with a header line.

    A cell may hold line breaks between double quotes. An empty cell counts as absent. Nothing is read after a
    row of more than `largest` bytes, because a double quote that is never closed makes one of the whole rest.
    Rows that lie within a bad one are bad, too.
    """
    left = largest
    lines_of_row: list[str] = []

    def lines() -> Iterator[str]:
        nonlocal left
        while line := file.readline(left + 1):
            left -= bytes_of(line)
            if left < 0:
                raise UserError(
                    f"{where}: the row has more than {largest:,} bytes; close its double quotes, split it, or"
                    f" give a --largest_row above {largest // MB}"
                )
            lines_of_row.append(line)
            yield line

    csv.field_size_limit(FIELD_LIMIT)
    header: list[str] = []
    with open_text(path, position) as file:
        reader = csv.reader(lines(), delimiter=delimiter, strict=True)
        while True:
            left = largest
            lines_of_row.clear()
            begin = reader.line_num + 1
            where = f"{path}, line {begin}"
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if not header or "end of data" in str(error):
                    raise UserError(
                        f"{where}: not valid CSV ({error}); a cell that begins with a double quote must end"
                        " with one"
                    ) from None
                cells = []
                record: dict[str, Any] | UserError = UserError(f"not valid CSV ({error})")
            else:
                if not header:
                    if problem := undecoded("\n".join(cells)):
                        raise UserError(f"{where}: the header is {problem}")
                    header = [name.strip() for name in cells]
                    twice = [name for name in header if header.count(name) > 1]
                    if twice:
                        raise UserError(f"{where}: the header has the column {short(twice[0])} twice")
                    continue
                if not cells:
                    continue
                record = _cells(header, cells)
            if len(cells) == len(header) or len(lines_of_row) == 1:
                yield where, record
                continue
            yield (
                where,
                UserError(
                    f"{record}; a double quote makes lines {begin} to {reader.line_num} one row: close it, or"
                    ' write "" for a quote in a cell'
                ),
            )
            *between, last = lines_of_row[1:]
            is_row = last.count(delimiter) >= len(header) - 1 > 0
            if is_row and all(_is_row(line, len(header), delimiter) for line in between):
                for number in range(begin + 1, reader.line_num + 1):
                    yield f"{path}, line {number}", UserError(f"it was read as a part of line {begin}")


def _cells(header: list[str], cells: list[str]) -> dict[str, Any] | UserError:
    if len(cells) != len(header):
        return UserError(f"the row has {len(cells)} cells, the header {len(header)}")
    return undecoded("\n".join(cells)) or {name: cell or None for name, cell in zip(header, cells)}


def rows_within(record: dict[str, Any], delimiter: str) -> int:
    """Count the rows that a double quote, opened and not closed, has put into a cell of a CSV record.

    These are its lines where all but the first are complete rows; the last one may end within the row.
    """
    for column, cell in enumerate(record.values()):
        if cell and "\n" in cell and len(record) > 1:
            *between, last = cell.split("\n")[1:]
            is_last = _is_row(last, column + 1, delimiter)
            if (
                is_last
                and (between or column)
                and all(_is_row(line, len(record), delimiter) for line in between)
            ):
                return len(between) + 1
    return 0


def _is_row(line: str, columns: int, delimiter: str) -> bool:
    """Tell whether a line has that many columns, none of them empty or after a space, as in prose."""
    cells = line.rstrip("\r\n").split(delimiter)
    return len(cells) == columns and all(cell and not cell[0].isspace() for cell in cells)
