"""scripts/binidx: what is written holds the tokens that a run would have, and comes back as the same text."""

import json

import pytest
import tokenizers

from scripts.binidx import main
from src.formats import read_rows


@pytest.mark.parametrize("tokenizer", ["world", "bytes", "utf16"])
def test_there_and_back(tmp_path, capsys, tokenizer):
    texts = ["Hello, world.", "Zwei Zeilen,\n\nund eine Lücke", "三 个 字 🙂", "x"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:3]))
    (tmp_path / "b.csv").write_text("question,answer\nwhat?,this\n")
    main([str(tmp_path / "out"), str(tmp_path / "a.jsonl"), str(tmp_path / "b.csv"), "--tokenizer", tokenizer])
    assert "4 documents" in capsys.readouterr().out
    main([str(tmp_path / "back.jsonl"), str(tmp_path / "out.bin"), "--to_jsonl", "--tokenizer", tokenizer])
    back = [json.loads(line)["text"] for line in (tmp_path / "back.jsonl").read_text().splitlines()]
    assert back == [*texts[:3], "User: what?\n\nAssistant: this"]
    assert len(list(read_rows(tmp_path / "out.idx", eod=(0, 0) if tokenizer == "utf16" else (0,)))) == 4


def test_a_bad_row_leaves_nothing_behind(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
    for out, data, words in (("out", "a.jsonl:2", "drop the weight here"), ("none/out", "a.jsonl", "none/out could not be written (No such file or")):
        for flags in (["--to_jsonl"], []):
            with pytest.raises(SystemExit):
                main([str(tmp_path / out), str(tmp_path / data), *flags])
            assert words in capsys.readouterr().err
    for flags in (["--to_jsonl"], []):
        with pytest.raises(SystemExit):
            main([str(tmp_path / "out"), str(tmp_path / "a.jsonl"), *flags])
        assert "a.jsonl, line 2" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_tokens_beyond_uint16_and_columns_by_name(tmp_path):
    """A tokenizer.json of 70,000 words, of which the last is in the data."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(70_000)} | {"<end>": 70_000}, "w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.add_special_tokens(["<end>"])
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a,b.csv").write_text("this,that\nw3 w69999,w5\n")
    main([str(tmp_path / "out"), str(tmp_path / "a,b.csv"), "--tokenizer", str(tmp_path / "tokenizer.json"), "--sft_field", "this"])
    [(_, row)] = read_rows(tmp_path / "out.bin", eod=(70_000,))
    assert row["ids"].tolist() == [3, 69_999]
