"""The one exception for the user's mistakes, and the doorway that turns it into one line and exit code 2."""

import contextlib
import sys


class UserError(ValueError):
    """A mistake in the user's input: what was seen, what was expected, what to do."""


@contextlib.contextmanager
def one_line_errors():
    """Print a UserError as `error: ...` on stderr and exit with code 2; any other exception is a bug and keeps its traceback."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
