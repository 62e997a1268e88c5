"""User errors: the one exception for them, its way to one line and exit code 2, and flags that raise it."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import os
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

from .interrupts import EXIT_CODE, answered, is_program, say_interrupted
from .progress import clear

# errors of the operating system that are no bug of the program
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.EIO)


class UserError(ValueError):
    """A mistake in the user's input: what was seen, what was expected, what to do."""


@contextlib.contextmanager
def naming_missing_torch() -> Iterator[None]:
    """Report an absent torch in one line during the first imports, where this package is the program."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "torch" or not is_program():
            raise
        print(
            f"error: the package torch is not installed for {sys.executable}; activate the environment that"
            " has it (source .venv/bin/activate), or: pip install torch",
            file=sys.stderr,
        )
        sys.exit(2)


LONGEST = 2000  # characters of a message


def printable(text: str) -> str:
    """Put a text on one line, cut if it is very long, with control characters shown as escapes.

    Names in a file could otherwise rewrite what the terminal shows.
    """
    text = " ".join(text.splitlines())
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def first_line(error: Exception) -> str:
    """Name an error of another package's: its kind, and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"


def listed(names: Sequence[str], most: int) -> str:
    """List names with commas between them; at most `most` are written out: `a, b and 3 more`."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Suggest `; did you mean NAME?` for a misspelt word, else nothing."""
    found = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {found[0]}?" if found else ""


def similar_path(path: str) -> str:
    """Suggest `; did you mean PATH?` for a path that does not exist, from the names in the last folder of it
    that exists, else nothing."""
    if os.path.exists(path):
        return ""
    absent = pathlib.Path(path)
    while absent != absent.parent and not os.path.isdir(absent.parent):
        absent = absent.parent
    try:
        # 0.85, because a common suffix alone makes short names similar
        near = difflib.get_close_matches(absent.name, os.listdir(absent.parent), 1, cutoff=0.85)
    except OSError:  # such as a drive of Windows that is not there
        return ""
    return f"; did you mean {absent.parent / near[0]}?" if near else ""


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Print a UserError as `error: ...` on stderr and exit with code 2.

    A refusal of the machine, such as no memory or disk, is reported so, too. Any other exception is a bug and
    keeps its traceback.

    If nobody reads stdout any more (`| head`), the program ends silently with exit code 141, as in shells.
    Characters that the terminal's encoding lacks are shown as escapes.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            with answered():
                yield
        except BaseException:
            clear()  # a bar may be half drawn
            raise
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # otherwise Python would print an error when it flushes stdout at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        say_interrupted()
        sys.exit(EXIT_CODE)
    except UserError as error:
        print("error:", printable(str(error)), file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        print(
            "error:",
            f"{error.filename}: {error.strerror}" if error.filename else error.strerror,
            file=sys.stderr,
        )
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        # Python's, numpy's, a GPU's, or a CPU's, which torch has no class for
        ran_out = (
            isinstance(error, MemoryError)
            or type(error).__name__ == "OutOfMemoryError"
            or "can't allocate memory" in str(error)
        )
        if not ran_out:
            raise
        said = str(error).rpartition("DefaultCPUAllocator: ")[2].splitlines()[:1]
        print(": ".join(["error: memory ran out", *said]), file=sys.stderr)
        sys.exit(2)


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are UserErrors; it answers a mistyped flag with the nearest one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        # else argparse takes the values -0.5,1 and -1e-3 for flags
        self._negative_number_matcher = re.compile(r"-[\d.][\d.,eE+-]*$")

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments"):
            message += "; a flag takes one value, between quotes where it has spaces"
        if found := re.fullmatch("argument (.*): invalid (int|float) value: (.*)", message):
            flag, kind, value = found.groups()
            message = f"{flag} {value}: expected {'a whole number' if kind == 'int' else 'a number'}"
        raise UserError(f"{message}; {self.prog} --help lists the flags")

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        given = sys.argv[1:] if args is None else args
        # before argparse parses, because it would call a misspelt required flag missing
        for token in () if self._subparsers else given:  # a subcommand checks its own flags
            name = token.partition("=")[0]
            if name.startswith("--") and " " not in name and name not in self._option_string_actions:
                begun = sorted((f for f in self._option_string_actions if f.startswith(name)), key=len)
                near = begun or difflib.get_close_matches(name, self._option_string_actions, 1)
                raise UserError(
                    f"unknown flag {name}; "
                    + (f"did you mean {near[0]}?" if near else f"{self.prog} --help lists the flags")
                )
        return super().parse_known_args(args, namespace)
