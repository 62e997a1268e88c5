"""Wrong flags and wrong requests are refused: tests/refusals has the cases and the answers."""

import pytest

from .refusals import ROOMS, answers, differences


@pytest.mark.parametrize("room", ROOMS)
def test_the_answers_are_those_of_the_file(room):
    changed = differences(room)
    assert not changed, "\n".join(
        [*changed, "On purpose? python -m tests.refusals --write, and read the diff"]
    )


@pytest.mark.parametrize("room", ROOMS)
def test_no_case_is_accepted_and_each_answer_is_one_short_line(room):
    text, accepted = answers(room)
    assert not accepted
    lines = [line for line in text.splitlines() if line.startswith("  ")]
    assert all(20 < len(line) < 480 for line in lines), max(lines, key=len)
