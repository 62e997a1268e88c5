"""Damage data files of every format at random, and read them.

Reading must soon end with rows, or with a message that names the file, and with nothing else.

    python -m benchmarks.fuzz [--inputs 10000] [--seed 0]

Each input is a valid file that was mutated one to six times: bytes changed, cut out, doubled, swapped, put
in; numbers made huge; a part of another file put in. Half of the inputs are read with --on_bad_row skip, half
with stop. Rows that are read must have one of the forms of src/data/formats, and are tokenised. The last line
is JSON. An input that fails is kept, and its number and seed are printed.
"""

import collections
import contextlib
import gzip
import json
import os
import pathlib
import random
import signal
import struct
import tempfile
import time

import numpy as np

from rwkv_miss import UserError
from src.data.encode import Encoder
from src.data.formats import Report, binidx, read_records
from src.data.tokenizer import load_tokenizer

from .common import add_integers, argument_parser, report

SECONDS = 10  # limit for one input on a busy machine; the slowest takes some milliseconds
CHAT = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": [{"type": "text", "text": "quéstion\n\n?"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"a": 1}'}}],
    },
    {"role": "tool", "content": "5", "tool_call_id": "1"},
    {"role": "assistant", "content": "答え 🙂", "reasoning_content": "hm"},
]
ROWS = [
    {"text": "Some text, 中文.\nAnother line."},
    {"messages": CHAT, "tools": [{"name": "f"}]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
    {"conversation": [{"human": "q", "assistant": "a"}]},
    {"instruction": "i", "input": "x", "output": "o", "history": [["a", "b"]]},
    {"prompt": "p", "completion": "c", "score": 1.5e10},
    {"question": "q", "answer": "#### 42", "id": 17, "n": None},
]
PAIRS = [
    {"question": f'question {i}, "quoted"\n', "answer": "à; \t" * i + "x", "id": str(i)} for i in range(6)
]
WORDS = [
    *(bytes([code]) for code in b"\"'\\\x00\xff\xc3\r\n,;\t{}[]: "),
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"null",
    b"true",
    b"\\ud800",
    b"\\u0000",
    b"\\u",
    "\ufeff".encode(),
    b"\xff\xfe",
    b'"text": ',
    b'"messages": ',
    b'{"a":' * 3000,
    b"[" * 3000,
    b"9" * 5000,
    b"\x1f\x8b",
    b"PAR1",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\x00" * 8,
    b"x" * 200_000,
]


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(rows)).encode()


def cells(rows: list[dict], mark: str) -> bytes:
    quoted = [mark.join('"' + cell.replace('"', '""') + '"' for cell in row.values()) for row in rows]
    return "\n".join([mark.join(rows[0]), *quoted, ""]).encode()


def sound_files(folder: str) -> dict[str, dict[str, bytes]]:
    """Map each format to {file name: content} of valid files; the first name is the one to read."""
    table = cells(PAIRS, ",")
    files = {
        "JSONL": {"d.jsonl": lines(ROWS)},
        "JSON": {"d.json": json.dumps(ROWS, indent=1).encode()},
        "JSON, nested": {"d": json.dumps({"version": 1, "data": PAIRS, "tags": ["x"]}).encode()},
        "JSON, one row": {"d.json": json.dumps(ROWS[1], indent=2).encode()},
        "CSV": {"d.csv": table},
        "TSV": {"d.tsv": cells(PAIRS, "\t")},
        "CSV with ;": {"d": cells(PAIRS, ";")},
        "text": {"d.txt": "Line one.\r\n\r\n第二行 🙂\n".encode() * 9},
        "gzip": {"d.jsonl.gz": gzip.compress(lines(ROWS), mtime=0)},
        "UTF-16": {"d.jsonl": lines(ROWS).decode().encode("utf-16")},
    }
    writer = binidx.BinidxWriter(os.path.join(folder, "d"), 256)
    for i in range(1, 8):
        writer.add([*range(1, 1 + i), 0])
    writer.close()
    files["binidx"] = {name: pathlib.Path(folder, name).read_bytes() for name in ("d.idx", "d.bin")}
    with contextlib.suppress(ImportError):
        import pyarrow.parquet

        names = dict.fromkeys(name for row in (*PAIRS, *ROWS) for name in row)
        del names["history"]  # this format holds no list of pairs
        rows = [{name: row.get(name) for name in names} for row in (*PAIRS, ROWS[0], ROWS[2], ROWS[5])]
        for name, compression in (("parquet", "snappy"), ("parquet, plain", "none")):
            pyarrow.parquet.write_table(
                pyarrow.Table.from_pylist(rows), os.path.join(folder, "d"), compression=compression
            )
            files[name] = {"d.parquet": pathlib.Path(folder, "d").read_bytes()}
    return files


def mutate(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Make one random change of the content."""
    data = bytearray(content)
    at = rng.randrange(len(data) + 1)
    length = min(1 << rng.randrange(10), len(data))
    kind = rng.randrange(11)
    if kind == 0 and data:
        data[at % len(data)] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[at : at + 1] = bytes([rng.randrange(256)])
    elif kind == 2:
        del data[at : at + length]
    elif kind == 3:
        data[at:at] = data[at : at + length] * rng.choice([1, 1, 1, 20])
    elif kind == 4:
        to = rng.randrange(len(data) + 1)
        data[to:to] = data[at : at + length]
        del data[at : at + length]
    elif kind == 5:
        data[at : at + rng.randrange(2)] = rng.choice(WORDS)
    elif kind == 6:
        other = rng.choice(others)
        begin = rng.randrange(len(other) + 1)
        data[at : at + length] = other[begin : begin + length]
    elif kind == 7:
        del data[at:]
    elif kind == 8:
        number = struct.pack(
            rng.choice(["<i", "<q", ">i"]), rng.choice([-1, 0, 1, 2**31 - 1, -(2**31), rng.randrange(2**20)])
        )
        data[at : at + len(number)] = number
    else:  # the change that most often leaves a file valid, so that several changes can add up
        data[at : at + 1] = rng.choice(b"aeiou0123456789 ").to_bytes(1, "little")
    return bytes(data)


def check(row: dict) -> None:
    """Assert that a row has one of the forms of src/data/formats."""
    if "ids" in row:
        assert (
            row["ids"].dtype == np.int32
            and row["ids"].ndim == 1
            and len(row["ids"])
            and row["ids"].min() >= 0
        )
        texts = []
    elif "messages" in row:
        assert row["messages"] and row["messages"][-1]["role"] == "assistant"
        assert all(turn["role"] in ("system", "user", "assistant", "tool") for turn in row["messages"])
        texts = [turn["content"] for turn in row["messages"]]
    else:
        assert set(row) in ({"text"}, {"prompt", "completion"}) and all(row.values())
        texts = row.values()
    for text in texts:
        assert isinstance(text, str) and "\0" not in text
        text.encode()


class TooSlow(Exception):
    pass


@contextlib.contextmanager
def limit(seconds: float):
    """Raise TooSlow if the block takes more than this many seconds."""

    def stop(signum, frame):
        raise TooSlow(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fuzz(folder: str, seed: int, numbers: range) -> collections.Counter:
    """Count the results of the inputs with these numbers: (format, "rows" | "some rows" | "message") ->
    inputs. Raises AssertionError for any other result.
    """
    encoder = Encoder(load_tokenizer("bytes", 256))
    sound = sound_files(folder)
    others = [content for files in sound.values() for content in files.values()]
    ends: collections.Counter = collections.Counter()
    for number in numbers:
        rng = random.Random(f"{seed} {number}")
        kind = list(sound)[number % len(sound)]
        files = dict(sound[kind])
        for _ in range(rng.choice([1, 1, 1, 2, 3, 6])):
            name = rng.choice(list(files))
            files[name] = mutate(files[name], others, rng)
        for name, content in files.items():
            pathlib.Path(folder, name).write_bytes(content)
        path = os.path.join(folder, next(iter(files)))
        found = Report(rng.choice(["stop", "skip"]))
        try:
            with limit(SECONDS):
                for where, row in read_records(path, found):
                    assert where.startswith(folder), where
                    check(row)
                    try:
                        encoder.encode(row)
                    except UserError as error:
                        found.refuse(path, where, error)
            ends[kind, "some rows" if found.bad else "rows"] += 1
        except UserError as error:
            assert os.path.join(folder, "d") in str(error) and len(str(error)) < 2000, (
                f"input {number} of seed {seed}, {kind}: {str(error)[:2000]}"
            )
            ends[kind, "message"] += 1
        except BaseException as error:
            shown = f"{type(error).__name__}: {error}"
            raise AssertionError(
                f"input {number} of seed {seed}, {kind}, {found.on_bad_row}: {shown}; kept: {path}"
            ) from error
        for name in files:
            os.remove(os.path.join(folder, name))
    return ends


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--inputs", type=int, default=10_000)
    add_integers(parser, seed=0)
    args = parser.parse_args()
    start = time.perf_counter()
    ends = fuzz(tempfile.mkdtemp(prefix="fuzz-"), args.seed, range(args.inputs))
    seconds = time.perf_counter() - start
    for kind in dict.fromkeys(kind for kind, _ in ends):
        print(
            f"{kind:<16}"
            + "".join(f"{ends[kind, end]:6} {end:<10}" for end in ("rows", "some rows", "message"))
        )
    print(f"{args.inputs} inputs: no crash, no hang, {seconds:.0f} s")
    counted = {f"{kind}: {end}": count for (kind, end), count in sorted(ends.items())}
    report("fuzz", inputs=args.inputs, seed=args.seed, seconds=round(seconds, 1), ends=counted)


if __name__ == "__main__":
    main()
