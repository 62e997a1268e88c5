"""Whether two texts have equal mathematics, as the package math_verify judges: the extra `math`."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator
from types import ModuleType

LOGGERS = ("math_verify.parser", "math_verify.grader")


def require_math_verify() -> ModuleType:
    """The package. UserError where it is absent."""
    try:
        return importlib.import_module("math_verify")
    except ImportError as error:
        # here, as guarded_mathematics.py runs without it: rwkv_miss imports torch
        from rwkv_miss.errors import UserError

        raise UserError(
            f"math_verify needs the package math-verify ({error}): pip install 'math-verify>=0.9'; "
            "boxed needs none"
        ) from None


def same_mathematics(answer: str, right: str) -> bool:
    """Whether the last result in an answer equals the right one.

    Equal are numbers, expressions, sets, intervals and equations, in LaTeX or plain. What takes more than
    five seconds is not equal.
    """
    package = require_math_verify()
    with _silent():
        return package.verify(package.parse(_marked(right)), package.parse(answer))


def mathematics(text: str) -> str | None:
    """The last result in a text, in SymPy's words. None without one."""
    with _silent():
        parsed = require_math_verify().parse(text)
    return str(parsed[0]) if parsed else None


def right_mathematics(text: str) -> str | None:
    r"""The same of a right answer, which may be bare LaTeX, such as `\frac{1}{2}`."""
    return mathematics(_marked(text))


def _marked(right: str) -> str:
    r"""A right answer with its mathematics marked as such.

    MATH-500 has bare LaTeX in `answer`, and a text with \boxed{} in `solution`.
    """
    return right if "\\boxed" in right else f"\\boxed{{{right}}}"


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without a warning for each text that takes too long, which is as long as the text."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
