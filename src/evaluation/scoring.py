"""Scoring of an answer: as it stands, by its final number (GSM8K), or by its result (MATH)."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Hashable, Sequence
from fractions import Fraction
from typing import NamedTuple

from rwkv_miss.errors import UserError

from ..data.questions import Question
from .mathematics import mathematics, reference_mathematics, same_mathematics

CONCLUSION = re.compile(r"####|answer is:?", re.IGNORECASE)  # GSM8K's solutions, MetaMathQA's
# whole part, numerator, denominator; without braces these are one digit
LATEX_FRACTION = re.compile(
    r"(?:(?<![\d.,])(\d{1,300})\s*)?\\[dt]?frac\s*(?:\{\s*(-?\d{1,300})\s*\}|(\d))\s*(?:\{\s*(\d{1,300})\s*\}|(\d))"
)
MINUS = "\u2212"  # the sign that typeset mathematics has for a hyphen
NUMBER = re.compile(r"(?:(?<![\w.)])(-)\s?)?\$?(\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(\.\d+)?(?:/(\d+))?")

LONGEST = 1000  # characters of a number: a model that repeats itself writes more digits than Python converts


def concluded(text: str) -> str | None:
    """Return the text after the last `####` or `answer is`. None without either."""
    matches = list(CONCLUSION.finditer(text))
    return text[matches[-1].end() :] if matches else None


def numbers(text: str) -> list[Fraction]:
    r"""Find the numbers in a text, in their order.

    "-$1,234.50 of 3/4" -> [-1234.5, 0.75], `1\frac{3}{4}` -> [1.75]
    """
    text = LATEX_FRACTION.sub(_plain_fraction, text.replace(MINUS, "-"))
    found = []
    for match in NUMBER.finditer(text):
        sign, whole, decimals, denominator = match.groups()
        if not (whole or decimals) or len(match[0]) >= LONGEST:
            continue
        number = Fraction(f"{sign or ''}{(whole or '0').replace(',', '')}{decimals or ''}")
        divisor = int(denominator or 1) or 1  # 5/0 is read as 5
        found.append(number / divisor)
    return found


def _plain_fraction(match: re.Match[str]) -> str:
    r"""Convert `\frac{3}{4}` to 3/4, `1\frac34` to 7/4."""
    whole = int(match[1] or 0)
    numerator, denominator = int(match[2] or match[3]), int(match[4] or match[5])
    return f" {whole * denominator + numerator}/{denominator}"


def final_number(text: str) -> Fraction | None:
    """Find the first number after the last `####` or `answer is`. Without either it is the last number."""
    conclusion = concluded(text)
    if conclusion is None:
        found = numbers(text)
        return found[-1] if found else None
    found = numbers(conclusion)
    return found[0] if found else None


def same_number(answer: str, right: str) -> bool:
    """Tell for GSM8K whether both end in the same number."""
    return (number := final_number(answer)) is not None and number == final_number(right)


def result(text: str) -> str | None:
    r"""Return the content of the last \boxed{...} of a text.

    Without one, it is the rest of the line after the last `answer is` or `####`.
    """
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return _concluded_line(text)
    rest = re.sub(r"^\\(?:boxed|fbox)", "", text[start:]).lstrip()
    if rest.startswith("{"):
        return _in_braces(rest)
    # `\boxed 5`, up to the end of the mathematics
    parts = rest.split("$")[0].split()
    return parts[0] if parts else None


def _concluded_line(text: str) -> str | None:
    conclusion = concluded(text)
    if conclusion is None:
        return None
    lines = conclusion.strip().splitlines()
    return lines[0].strip() if lines else ""


def _in_braces(text: str) -> str | None:
    """Return `a{b}` of `{a{b}}c`. None if the first brace is not closed."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if not depth:
            return text[1:place]
    return None


# sizes of brackets, spaces, and signs of money, percent and degrees: they do not change a result
DROPPED = re.compile(r"\\left|\\right|\\[!,;: ]|\\?\$|\\?%|\^\{?\\circ\}?|\s")
WRAPPED = re.compile(r"\\(?:text|textbf|mbox|mathrm)\{([^{}]*)\}")
UNIT = re.compile(r"(?<=[\d}])(?:\s|\\[!,;: ])*\\(?:text|mbox|mathrm)\{[^{}]*\}(?:\^\d)?$")
FRACTION = re.compile(r"(-?)\\frac\{(-?\d+)\}\{(\d+)\}")


def normalised(answer: str) -> str:
    r"""Normalise a result of MATH.

    `\dfrac12` and `1/2` -> `\frac{1}{2}`, `x = 5\text{ cm}.` -> `5`, `\left( 1, 2 \right)` -> `(1,2)`
    """
    text = UNIT.sub("", answer.strip().rstrip(".").replace("\n", "").replace(MINUS, "-"))
    text = re.sub(r"^\$?[a-zA-Z]\s*=\s*", "", text)
    text = DROPPED.sub("", WRAPPED.sub(r"\1", text))
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac(\{[^{}]*\})(\d)", r"\\frac\1{\2}", text)
    text = re.sub(r"\\frac(\d)\{", r"\\frac{\1}{", text)
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text)
    return re.sub(r"^(-?\d+)/(\d+)$", r"\\frac{\1}{\2}", text)


def value(text: str) -> Fraction | None:
    """Return the number that a normalised result is, if it is one."""
    if len(text) >= LONGEST:
        return None
    if match := FRACTION.fullmatch(text):
        sign, numerator, denominator = int(f"{match[1]}1"), int(match[2]), int(match[3])
        return sign * Fraction(numerator, denominator) if denominator else None
    if re.fullmatch(r"-?(\d{1,3}(,\d{3})+|\d*)(\.\d+)?", text) and re.search(r"\d", text):
        return Fraction(text.replace(",", ""))
    return None


def canonical(text: str) -> Fraction | str | None:
    """Return the result of a text, equal for equal results: a number, or else its normalised text."""
    found = result(text)
    if found is None:
        return None
    found = normalised(found)
    number = value(found)
    return found if number is None else number


def same_result(answer: str, right: str) -> bool:
    """Tell for MATH whether the normalised results are the same text, or equal numbers."""
    return (found := canonical(answer)) is not None and found == canonical(right)


class Score(NamedTuple):
    """Score: decides when an answer is right."""

    agree: Callable[[str, str], bool]  # whether (answer, reference answer) agree
    result: Callable[[str], Hashable | None]  # result of an answer, equal for equal results; None without one
    result_of_reference: Callable[[str], object | None]  # result of a reference answer
    wanted: str  # the name of the part that a reference answer must have, for errors


SCORES = {
    "exact": Score(operator.eq, str, str, "text"),
    "number": Score(same_number, final_number, final_number, "a number"),
    "boxed": Score(same_result, canonical, canonical, "a \\boxed{...} or `answer is`"),
    "math_verify": Score(same_mathematics, mathematics, reference_mathematics, "mathematics"),
}


def require_readable(name: str, questions: Sequence[Question], flag: str) -> None:
    """Raise UserError for a reference answer that this score can't read. `flag` asked for the score."""
    score = SCORES[name]
    for question in questions:
        if score.result_of_reference(question.answer) is None:
            raise UserError(
                f"{flag}: a reference answer has no {score.wanted.removeprefix('a ')}: "
                f"{question.answer[-200:]!r} (of {question.prompt[:80]!r})"
            )
