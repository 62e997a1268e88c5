"""Numbers and lists as people read them."""

import pytest

from rwkv_miss.errors import listed
from rwkv_miss.progress import duration_text
from src.common.formatting import counted, size_text


def test_one_is_singular():
    assert [counted(n, "text") for n in (0, 1, 2, 1234567)] == [
        "0 texts",
        "1 text",
        "2 texts",
        "1,234,567 texts",
    ]
    assert [counted(n, "pass", "passes") for n in (1, 2)] == ["1 pass", "2 passes"]


def test_of_a_long_list_the_first_are_named():
    names = ["a", "b", "c"]
    assert [listed(names, most) for most in (1, 2, 3, 4)] == [
        "a and 2 more",
        "a, b and 1 more",
        "a, b, c",
        "a, b, c",
    ]


@pytest.mark.parametrize(
    "size, text",
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (999, "999 bytes"),
        (1000, "0.98 KiB"),
        (31104 * 4, "122 KiB"),
        (9.994 * 2**20, "9.99 MiB"),
        (9.996 * 2**20, "10.0 MiB"),
        (99.96 * 2**20, "100 MiB"),
        (999.4 * 2**20, "999 MiB"),
        (999.6 * 2**20, "0.98 GiB"),
        (24 * 2**30, "24.0 GiB"),
        (2000 * 2**40, "2,000 TiB"),
    ],
)
def test_sizes_have_three_digits(size, text):
    assert size_text(size) == text


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.04, "0.0 s"),
        (0.26, "0.3 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (119.4, "119 s"),
        (119.6, "2 min"),
        (7169, "119 min"),
        (7171, "2 h 0 min"),
        (86_399, "24 h 0 min"),
        (172_700, "47 h 58 min"),
        (172_800, "2 days 0 h"),
        (277_200, "3 days 5 h"),
        (604_799, "7 days 0 h"),
    ],
)
def test_durations_short_and_long(seconds, text):
    assert duration_text(seconds) == text
