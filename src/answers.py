"""Whether an answer is right: as it stands, by its final number (GSM8K), or by its boxed result (MATH)."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from fractions import Fraction

CONCLUSION = re.compile(r"####|answer is:?", re.IGNORECASE)  # GSM8K's solutions, MetaMathQA's
# whole part, numerator, denominator; without braces these are one digit
LATEX_FRACTION = re.compile(
    r"(?:(?<![\d.,])(\d{1,300})\s*)?\\[dt]?frac\s*(?:\{\s*(-?\d{1,300})\s*\}|(\d))\s*(?:\{\s*(\d{1,300})\s*\}|(\d))"
)
MINUS = "\u2212"  # the sign that typeset mathematics has for a hyphen
NUMBER = re.compile(r"(?:(?<![\w.)])(-)\s?)?\$?(\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(\.\d+)?(?:/(\d+))?")

LONGEST = 1000  # characters of a number: a model that repeats itself writes more digits than Python converts


def concluded(text: str) -> str | None:
    """What follows the last `####` or `answer is` of a text."""
    found = list(CONCLUSION.finditer(text))
    return text[found[-1].end() :] if found else None


def numbers(text: str) -> list[Fraction]:
    r"""The numbers in a text, in their order: "-$1,234.50 of 3/4" -> [-1234.5, 0.75], `1\frac{3}{4}` ->
    [1.75].
    """
    text = LATEX_FRACTION.sub(_plain_fraction, text.replace(MINUS, "-"))
    found = [match for match in NUMBER.finditer(text) if (match[2] or match[3]) and len(match[0]) < LONGEST]
    return [
        Fraction(f"{match[1] or ''}{(match[2] or '0').replace(',', '')}{match[3] or ''}")
        / (int(match[4] or 1) or 1)
        for match in found
    ]


def _plain_fraction(found: re.Match[str]) -> str:
    r"""`\frac{3}{4}` -> 3/4, `1\frac34` -> 7/4."""
    over, under = int(found[2] or found[3]), int(found[4] or found[5])
    return f" {int(found[1] or 0) * under + over}/{under}"


def final_number(text: str) -> Fraction | None:
    """The first number after the last `####` or `answer is`; the last number of a text that has neither."""
    end = concluded(text)
    found = numbers(text if end is None else end)
    return found[-1 if end is None else 0] if found else None


def same_number(answer: str, right: str) -> bool:
    """GSM8K: both end in the same number."""
    return (number := final_number(answer)) is not None and number == final_number(right)


def result(text: str) -> str | None:
    r"""What the last \boxed{...} of a text holds; without one, the rest of the line after the last `answer
    is` or `####`.
    """
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        end = concluded(text)
        return None if end is None else (end.strip().splitlines() or [""])[0].strip()
    rest = re.sub(r"^\\(?:boxed|fbox)", "", text[start:]).lstrip()
    if not rest.startswith("{"):
        return rest.split("$")[0].split()[0] if rest.split("$")[0].split() else None
    depth = 0
    for place, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if not depth:
            return rest[1:place]
    return None


# what two ways of writing one result differ in: spaces, sizes of brackets, units, signs of money, percent and
# degrees
DROPPED = re.compile(r"\\left|\\right|\\[!,;: ]|\\?\$|\\?%|\^\{?\\circ\}?|\s")
WRAPPED = re.compile(r"\\(?:text|textbf|mbox|mathrm)\{([^{}]*)\}")
UNIT = re.compile(r"(?<=[\d}])(?:\s|\\[!,;: ])*\\(?:text|mbox|mathrm)\{[^{}]*\}(?:\^\d)?$")
FRACTION = re.compile(r"(-?)\\frac\{(-?\d+)\}\{(\d+)\}")


def normalised(answer: str) -> str:
    r"""A result of MATH in one way of writing: `\dfrac12` and `1/2` -> `\frac{1}{2}`, `x = 5\text{ cm}.` ->
    `5`, `\left( 1, 2 \right)` -> `(1,2)`.
    """
    text = UNIT.sub("", answer.strip().rstrip(".").replace("\n", "").replace(MINUS, "-"))
    text = re.sub(r"^\$?[a-zA-Z]\s*=\s*", "", text)
    text = DROPPED.sub("", WRAPPED.sub(r"\1", text))
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac(\d)\{", r"\\frac{\1}{", re.sub(r"\\frac(\{[^{}]*\})(\d)", r"\\frac\1{\2}", text))
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text)
    return re.sub(r"^(-?\d+)/(\d+)$", r"\\frac{\1}{\2}", text)


def value(text: str) -> Fraction | None:
    """The number that a normalised result is, if it is one."""
    if len(text) >= LONGEST:
        return None
    if match := FRACTION.fullmatch(text):
        return int(f"{match[1]}1") * Fraction(int(match[2]), int(match[3])) if int(match[3]) else None
    if re.fullmatch(r"-?(\d{1,3}(,\d{3})+|\d*)(\.\d+)?", text) and re.search(r"\d", text):
        return Fraction(text.replace(",", ""))
    return None


def same_result(answer: str, right: str) -> bool:
    r"""MATH: the results are written alike, but for how LaTeX can be written, or are equal numbers."""
    found, wanted = result(answer), result(right)
    if found is None or wanted is None:
        return False
    found, wanted = normalised(found), normalised(wanted)
    number = value(found)
    return found == wanted or number is not None and number == value(wanted)


# name -> whether (answer, right) agree, and what a right answer must have
SCORES: dict[str, tuple[Callable[[str, str], bool], Callable[[str], object | None], str]] = {
    "exact": (operator.eq, str, "text"),
    "number": (same_number, final_number, "a number"),
    "boxed": (same_result, result, "a \\boxed{...} or `answer is`"),
}
