"""Tokenised data in RWKV-LM's two files: read as the specification has them, whole or not at all, and written
by scripts/binidx.
"""

import os
import struct

import numpy as np
import pytest
import tokenizers

from rwkv_miss import UserError
from scripts.binidx import main
from src.data.formats import Report, binidx, read_records

from .conftest import read_rows, write_rows


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Messages begin with a file's name alone."""
    monkeypatch.chdir(tmp_path)


def write_binidx(prefix, pieces, boundaries, code=8, version=1, magic=b"MMIDIDX\x00\x00"):
    """By the specification, with struct alone."""
    kind = {8: "H", 4: "i", 5: "q"}[code]
    data = b"".join(struct.pack(f"<{len(piece)}{kind}", *piece) for piece in pieces)
    sizes = [len(piece) for piece in pieces]
    places = [sum(sizes[:i]) * struct.calcsize(kind) for i in range(len(sizes))]
    with open(f"{prefix}.bin", "wb") as file:
        file.write(data)
    with open(f"{prefix}.idx", "wb") as file:
        file.write(magic + struct.pack("<QBQQ", version, code, len(sizes), len(boundaries)))
        file.write(struct.pack(f"<{len(sizes)}i", *sizes) + struct.pack(f"<{len(sizes)}q", *places))
        file.write(struct.pack(f"<{len(boundaries)}q", *boundaries))


def ids(rows):
    assert all(row["ids"].dtype == np.int32 and list(row) == ["ids"] for row in rows)
    return [row["ids"].tolist() for row in rows]


@pytest.mark.parametrize(
    "pieces, boundaries, eod, documents",
    [
        (
            [[5, 6, 0], [7, 0], [65535, 8, 0]],
            [0, 1, 2, 3],
            (0,),
            [[5, 6], [7], [65535, 8]],
        ),  # as json2binidx --append-eod writes it
        ([[5, 6], [7], [8]], [0, 1, 2, 3], (0,), [[5, 6], [7], [8]]),
        ([[5, 6], [7], [8]], [0], (0,), [[5, 6], [7], [8]]),
        ([[5, 6], [7], [8]], [0, 2, 3], (0,), [[5, 6, 7], [8]]),
        ([[5, 6], [7], [8]], [1, 2], (0,), [[5, 6], [7], [8]]),
        ([[5, 6], [7], [8]], [1, 3], (0,), [[5, 6], [7, 8]]),
        ([[5, 6], [7], [8]], [0, 2], (0,), [[5, 6, 7], [8]]),
        ([[5, 0, 6, 0, 0, 7]], [0, 1], (0,), [[5], [6], [7]]),
        ([[0, 5, 0]], [0, 1], (0,), [[5]]),
        ([[0], [], [5]], [0, 1, 2, 3], (0,), [[5]]),
        ([[5, 0, 6]], [0, 1], (9,), [[5, 0, 6]]),
        ([[1, 0, 0, 2, 0, 0, 3, 4, 0, 0]], [0, 1], (0, 0), [[1, 0, 0, 2], [3, 4]]),
    ],
    ids=str,
)
@pytest.mark.parametrize("code", [8, 4])
def test_binidx(monkeypatch, code, pieces, boundaries, eod, documents):
    write_binidx("data", pieces, boundaries, code)
    for name in ("data", "data.bin", "data.idx"):
        report = Report()
        assert ids([row for _, row in read_records(name, report, eod=eod)]) == documents
        assert report.lines() == [
            f"format     {name}: binidx, {len(documents)} row{'s' * (len(documents) > 1)}"
        ]
    monkeypatch.setattr(binidx, "IDS_AT_ONCE", 2)
    assert ids([row for _, row in read_records("data", eod=eod)]) == documents


@pytest.mark.parametrize("vocab_size, code", [(256, 8), (65536, 8), (65537, 4)])
def test_binidx_is_written_as_the_specification_has_it(vocab_size, code):
    documents = [[5, 6, 0], [vocab_size - 1, 0], [7] * 1000]
    writer = binidx.BinidxWriter("ours", vocab_size)
    for document in documents:
        writer.add(document)
    assert not os.path.exists("ours.bin") and not os.path.exists("ours.idx"), "nothing half-written"
    writer.close()
    write_binidx("theirs", documents, [0, 1, 2, 3], code)
    for suffix in ("bin", "idx"):
        assert open(f"ours.{suffix}", "rb").read() == open(f"theirs.{suffix}", "rb").read()
    writer = binidx.BinidxWriter("ours", vocab_size)
    writer.add([1])
    writer.discard()
    assert sorted(os.listdir()) == ["ours.bin", "ours.idx", "theirs.bin", "theirs.idx"]
    assert ids([row for _, row in read_records("ours")]) == [[5, 6], [vocab_size - 1], [7] * 1000]


@pytest.mark.parametrize(
    "damage, words",
    [
        (
            lambda b, i: (b, i[:-1]),
            "data.idx has 81 bytes, expected 82 for 2 pieces and 3 boundaries; is it truncated?",
        ),
        (lambda b, i: (b, i[:20]), "data.idx is no index of RWKV-LM's binidx data"),
        (lambda b, i: (b, b""), "data.idx is no index"),
        (lambda b, i: (b, b"PK" + i[2:]), "it begins with b'PKIDIDX"),
        (lambda b, i: (b[:-1], i), "points outside of data.bin, which has 7 bytes"),
        (lambda b, i: (b"", i), "which has 0 bytes"),
        (lambda b, i: (b, i[:9] + b"\x02" + i[10:]), "has version 2 and type code 8"),
        (
            lambda b, i: (b, i[:17] + b"\x07" + i[18:]),
            "type code 7; expected version 1 and code 8 (uint16) or 4 (int32)",
        ),
        (lambda b, i: (b, i[:18] + b"\xff" * 8 + i[26:]), "for 18446744073709551615 pieces"),
        (lambda b, i: (b, i[:34] + b"\xff" * 4 + i[38:]), "points outside of"),
        (lambda b, i: (b, i[:42] + b"\x01" + i[43:]), "points outside of"),
        (lambda b, i: (b, i[:49] + b"\x7f" + i[50:]), "points outside of"),
        (
            lambda b, i: (b, i[:-8] + b"\x09" + i[-7:]),
            "document boundaries are not ascending numbers of pieces, up to 2",
        ),
        (lambda b, i: (b, i[:-1] + b"\xff"), "document boundaries are not ascending"),
    ],
)
def test_damaged_binidx(tmp_path, damage, words):
    write_binidx("data", [[5, 6], [7, 8]], [0, 1, 2])
    files = [tmp_path / "data.bin", tmp_path / "data.idx"]
    for file, content in zip(files, damage(*[file.read_bytes() for file in files])):
        file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(read_records("data"))
    assert words in str(caught.value)


def test_negative_ids_are_a_bad_row():
    write_binidx("data", [[5, -6], [7]], [0, 1, 2], code=4)
    report = Report("skip")
    assert ids([row for _, row in read_records("data", report)]) == [[7]]
    assert report.files["data"].reasons == ["data.bin, document 1: an id is negative, -6"]


# the program


@pytest.mark.parametrize("tokenizer", ["world", "bytes", "utf16"])
def test_there_and_back(tmp_path, capsys, tokenizer):
    texts = ["Hello, world.", "Zwei Zeilen,\n\nund eine Lücke", "三 个 字 🙂", "x"]
    write_rows(tmp_path / "a.jsonl", ({"text": text} for text in texts[:3]))
    (tmp_path / "b.csv").write_text("question,answer\nwhat?,this\n")
    main(
        [str(tmp_path / "out"), str(tmp_path / "a.jsonl"), str(tmp_path / "b.csv"), "--tokenizer", tokenizer]
    )
    assert "4 documents" in capsys.readouterr().out
    main([str(tmp_path / "back.jsonl"), str(tmp_path / "out.bin"), "--to_jsonl", "--tokenizer", tokenizer])
    back = [line["text"] for line in read_rows(tmp_path / "back.jsonl")]
    assert back == [*texts[:3], "User: what?\n\nAssistant: this"]
    assert len(list(read_records(tmp_path / "out.idx", eod=(0, 0) if tokenizer == "utf16" else (0,)))) == 4


def test_a_bad_row_leaves_nothing_behind(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
    for out, data, words in (
        ("out", "a.jsonl:2", "drop the weight here"),
        ("none/out", "a.jsonl", "none/out could not be written (No such file or"),
    ):
        for flags in (["--to_jsonl"], []):
            with pytest.raises(SystemExit):
                main([str(tmp_path / out), str(tmp_path / data), *flags])
            assert words in capsys.readouterr().err
    for flags in (["--to_jsonl"], []):
        with pytest.raises(SystemExit):
            main([str(tmp_path / "out"), str(tmp_path / "a.jsonl"), *flags])
        assert "a.jsonl, line 2" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_tokens_that_make_a_row_which_would_be_bad_are_not_written(tmp_path, capsys):
    """World's token 1 is NUL."""
    write_binidx("p", [[66, 67, 0], [66, 1, 67, 0]], [0, 1, 2])
    with pytest.raises(SystemExit):
        main(["out.jsonl", "p.bin", "--to_jsonl"])
    assert "p.bin, document 2: as text: NUL is no text (character 2); give" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"p.bin", "p.idx"}
    main(["again", "p.bin"])
    assert ids([row for _, row in read_records("again.bin", eod=(0,))]) == [[66, 67], [66, 1, 67]]


def test_tokens_beyond_uint16_and_columns_by_name(tmp_path):
    """A tokenizer.json of 70,000 words, of which the last is in the data."""
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"w{i}": i for i in range(70_000)} | {"<end>": 70_000}, "w0")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.add_special_tokens(["<end>"])
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a,b.csv").write_text("this,that\nw3 w69999,w5\n")
    main(f"{tmp_path}/out {tmp_path}/a,b.csv --tokenizer {tmp_path}/tokenizer.json --sft_field this".split())
    [(_, row)] = read_records(tmp_path / "out.bin", eod=(70_000,))
    assert row["ids"].tolist() == [3, 69_999]
