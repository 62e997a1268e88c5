"""Equality of the mathematics in two texts, as the package math_verify judges: the extra `math`."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator
from types import ModuleType

LOGGERS = ("math_verify.parser", "math_verify.grader")


def require_math_verify() -> ModuleType:
    """Import the package. Raises UserError if it is absent."""
    try:
        return importlib.import_module("math_verify")
    except ImportError as error:
        # imported here, as guarded_mathematics.py runs without it: rwkv_miss imports torch
        from rwkv_miss.errors import UserError

        raise UserError(
            f"math_verify needs the package math-verify ({error}): pip install 'math-verify>=0.9'; "
            "boxed needs none"
        ) from None


def same_mathematics(answer: str, right: str) -> bool:
    """Tell whether the last result in an answer equals the reference answer's.

    It compares numbers, expressions, sets, intervals and equations, in LaTeX or plain. A comparison of more
    than five seconds counts as unequal.
    """
    package = require_math_verify()
    with _silent():
        return package.verify(package.parse(_marked(right)), package.parse(answer))


def mathematics(text: str) -> str | None:
    """Return the last result in a text, in SymPy's form. None without one."""
    with _silent():
        parsed = require_math_verify().parse(text)
    return str(parsed[0]) if parsed else None


def reference_mathematics(text: str) -> str | None:
    r"""Return the result of a reference answer, which may be bare LaTeX, such as `\frac{1}{2}`."""
    return mathematics(_marked(text))


def _marked(right: str) -> str:
    r"""Mark the mathematics in a reference answer.

    MATH-500 has bare LaTeX in `answer`, and a text with \boxed{} in `solution`.
    """
    return right if "\\boxed" in right else f"\\boxed{{{right}}}"


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Suppress the warning for each text that takes too long, which is as long as the text."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
