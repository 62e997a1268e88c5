"""The readers against damaged files of every format: rows or a UserError, never anything else, and no
hang.
"""

import pathlib

import pytest

from benchmarks import fuzz
from src.data.formats import read_records


@pytest.mark.rare
def test_damaged_files_end_in_rows_or_a_message(tmp_path):
    ends = fuzz.fuzz(str(tmp_path), 1, range(10_000))
    assert ends.total() == 10_000 and {end for _, end in ends} == {"rows", "some rows", "message"}
    assert all(ends[kind, "rows"] and ends[kind, "message"] > 100 for kind, _ in ends), (
        "some damage is harmless, most is not"
    )


def test_the_files_are_sound_before(tmp_path):
    for files in fuzz.sound_files(str(tmp_path)).values():
        for name, content in files.items():
            pathlib.Path(tmp_path, name).write_bytes(content)
        rows = [row for _, row in read_records(tmp_path / next(iter(files)))]
        assert rows
        for row in rows:
            fuzz.check(row)


def test_the_fuzzer_sees_a_crash_and_a_hang(tmp_path, monkeypatch):
    for bug, words in (
        (lambda *_: 1 // 0, "ZeroDivisionError"),
        (lambda *_: all(n == 0 for n in iter(int, 1)), "TooSlow"),
    ):
        monkeypatch.setattr(fuzz, "read_records", bug)
        monkeypatch.setattr(fuzz, "SECONDS", 0.1)
        with pytest.raises(AssertionError, match=f"input 0 of seed 0, JSONL, .*{words}.*kept: "):
            fuzz.fuzz(str(tmp_path), 0, range(1))
