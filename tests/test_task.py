"""The data of the demo: right answers, and no string that is in both files."""

import pytest

from demo import task

from .conftest import read_rows


@pytest.mark.parametrize("flags, lengths", [([], {3, 4, 5, 6, 7}), (["--letters", "10"], {10})])
def test_strings_of_the_length_asked_for_and_no_question_twice(tmp_path, monkeypatch, flags, lengths):
    files = [tmp_path / "new" / name for name in ("rows.jsonl", "rows-heldout.jsonl")]
    sizes = ["--rows", "300", "--out", str(files[0]), "--heldout", "70"]
    monkeypatch.setattr("sys.argv", ["task", "reverse", *sizes, *flags])
    task.main()
    asked = []
    for file, count in zip(files, (300, 70)):
        rows = [line["messages"] for line in read_rows(file)]
        assert len(rows) == count
        turns = [row[i : i + 2] for row in rows for i in range(0, len(row), 2)]
        words = {
            question["content"].removeprefix("reverse "): answer["content"] for question, answer in turns
        }
        assert all(answer == "".join(reversed(word)) for word, answer in words.items())
        assert {len(word) for word in words} == lengths
        asked.append(words.keys())
    assert not asked[0] & asked[1]


def test_strings_too_short_to_differ_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", "task sort --letters 2 --rows 9 --out a --heldout_out b".split())
    with pytest.raises(SystemExit):
        task.main()
    said = capsys.readouterr().err
    assert "error: --letters 2: expected 3 or more" in said and said.count("\n") == 1
