"""JSONL and JSON readers -> (place, record), as in text.py."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from typing import Any

from rwkv_miss.errors import UserError

from ...common.formatting import short
from .layouts import has_layout, is_list_of_objects, is_pair
from .text import BOM, Position, Record, bytes_of, open_text, too_large, undecoded, whole_text

BLANK = re.compile(r"[ \t\r\n]*")
TRAILING = "a trailing comma"
SKIPPED_AT_ONCE = 1 << 20  # characters of a row that is too large


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise UserError(f"the key {short(twice)} stands twice in one object")
    return made


def _constant(name: str) -> None:
    raise UserError(f"not valid JSON ({name}; write null)")


# Python's own decoder would take NaN, and the last of two equal keys
DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def jsonl(path: str, position: Position, largest: int) -> Iterator[tuple[str, str | UserError]]:
    """Yield (place, line) of a file with one JSON object a line, for parse_line(), without blank lines.

    In the place of a line with more than `largest` bytes there is the UserError that says so.
    """
    with open_text(path, position) as file:
        for number, line in enumerate(iter(functools.partial(file.readline, largest + 1), ""), 1):
            if (size := bytes_of(line)) > largest:
                while line and not line.endswith("\n"):  # skip the rest of the line
                    line = file.readline(SKIPPED_AT_ONCE)
                    size += bytes_of(line)
                yield f"{path}, line {number}", too_large(size, largest)
                continue
            # files that begin with a mark may have been joined
            line = line.rstrip().lstrip(BOM)
            if line:
                yield f"{path}, line {number}", line


def parse_line(line: str | UserError) -> Any:
    """Parse a line of jsonl() to its record."""
    if isinstance(line, UserError):
        return line
    return undecoded(line) or parse_json(line)


def parse_json(line: str) -> Any:
    """Parse a JSON text. Raises or returns the UserError that says what is wrong with it."""
    try:
        return DECODER.decode(line)
    except (ValueError, RecursionError) as error:
        return _wrong(error)


def _wrong(error: Exception) -> UserError:
    if isinstance(error, UserError):
        return error
    if isinstance(error, json.JSONDecodeError):
        error = _own_place(error)
        hint = "; take it out" if error.msg == TRAILING else ""
        return UserError(f"not valid JSON ({error.msg.removesuffix(' at')} at column {error.colno}{hint})")
    if isinstance(error, RecursionError):
        return UserError("not usable JSON: nested too deeply")
    return UserError(f"not usable JSON: {error}")  # a number of thousands of digits


def _own_place(error: json.JSONDecodeError) -> json.JSONDecodeError:
    """Move the error to a trailing comma, where the decoder names the text after it. Other errors stay."""
    text, place = error.doc, error.pos
    if text[place : place + 1] in ("}", "]"):
        comma = len(text[:place].rstrip()) - 1
    elif error.msg.startswith("Illegal trailing comma"):  # Python 3.13
        comma = place
    elif error.msg == "Extra data" and not text[place + 1 :].strip():  # {...}, as in an array
        comma = place
    else:
        return error
    is_comma = text[comma : comma + 1] == ","
    return json.JSONDecodeError(TRAILING, text, comma) if is_comma else error


def json_file(path: str, position: Position) -> Iterator[Record]:
    """Read an array of objects, an object with one such array in it, or a single record."""
    scanner = _Scanner(whole_text(path))
    position.share = lambda: scanner.place / len(scanner.text)
    try:
        for place, record in _records(scanner):
            yield f"{path}, line {scanner.line(place)}", record
        scanner.expect("")
    except (ValueError, RecursionError) as error:
        place = _own_place(error).pos if isinstance(error, json.JSONDecodeError) else scanner.place
        raise UserError(f"{path}, line {scanner.line(place)}: {_wrong(error)}") from None


def _records(scanner: _Scanner) -> Iterator[tuple[int, Any]]:
    start = scanner.place
    if scanner.next != "{":
        for _, place, record in scanner.items("[]"):
            yield place, record
        return
    members = list(scanner.items("{}"))
    end = scanner.place
    arrays = {name: place for name, place, value in members if is_list_of_objects(value)}
    names = [name for name, _, _ in members]
    if len(arrays) != 1 or has_layout(names) or is_pair(names):
        yield start, _object([(name, value) for name, _, value in members])
        return
    (scanner.place,) = arrays.values()
    for _, place, record in scanner.items("[]"):
        yield place, record
    scanner.place = end


class _Scanner:
    """Walker over the outermost level of a JSON text.

    It knows the place of each record, and builds only one record at a time.
    """

    def __init__(self, text: str):
        self.text, self.place = text, 0
        self.counted, self.lines = 0, 1  # lines up to the place `counted`
        self._skip(0)

    @property
    def next(self) -> str:
        """Return the next character, "" at the end."""
        return self.text[self.place : self.place + 1]

    def line(self, place: int) -> int:
        """Return the line number of a place, which must not be before the place of the last call."""
        self.lines += self.text.count("\n", self.counted, place)
        self.counted = place
        return self.lines

    def _skip(self, count: int) -> None:
        self.place = BLANK.match(self.text, self.place + count).end()

    def expect(self, character: str) -> None:
        if self.next != character:
            problem = f"Expecting {character!r}" if character else "Extra data"
            raise json.JSONDecodeError(problem, self.text, self.place)
        self._skip(1)

    def value(self) -> Any:
        value, after = DECODER.raw_decode(self.text, self.place)
        self._skip(after - self.place)
        return value

    def items(self, brackets: str) -> Iterator[tuple[str, int, Any]]:
        """Yield (name, place, value) of each member of the object ("{}") that starts here.

        Or of each item of the array ("[]"), whose name is "".
        """
        self.expect(brackets[0])
        name = ""
        while self.next != brackets[1]:
            if brackets == "{}":
                name = self.value()
                if not isinstance(name, str):
                    raise json.JSONDecodeError("Expecting a name in double quotes", self.text, self.place)
                self.expect(":")
            place = self.place
            yield name, place, self.value()
            if self.next != brackets[1]:
                self.expect(",")
                if self.next == brackets[1]:
                    raise json.JSONDecodeError("Expecting value", self.text, self.place)
        self._skip(1)
