"""Tokens are made once: the cache gives back what was put in, is another one for anything that matters, and
is never half there.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
import tracemalloc

import numpy as np
import pytest

from rwkv_miss import UserError
from src.config import Config
from src.data import batches, dataset, parallel
from src.data import token_cache as module
from src.data.dataset import FileDocuments, load_documents
from src.data.encode import Encoder, Tokens
from src.data.formats import BINIDX, BY_NAME, DataSource, Reading, Report, WrongSetting, binidx, sources
from src.data.formats.text import Position
from src.data.parallel import TokenConverter, in_parallel
from src.data.templates import load_template
from src.data.tokenizer import load_tokenizer

from .conftest import write_rows
from .test_data import assistant, user
from .test_templates import CHATML


def tokenise(path, encoder, cache="none"):
    return module.tokenise(sources(path)[0], encoder, Report(), cache=cache)


def fingerprint(path, encoder, reading=BY_NAME, on_bad_row="stop"):
    return module.fingerprint(sources(path)[0], encoder, reading, on_bad_row)


def fit(tokens, ctx_len):
    return dataset.fit([tokens], [np.arange(len(tokens.ends))], ctx_len)


NAMES = ("ids", "weights", "ends", "texts", "begins")


@pytest.fixture
def encoder():
    return Encoder(load_tokenizer("bytes", 256))


def make_rows(count, seed=0):
    rng = random.Random(seed)
    words = ["a", "é", "你", "🙂\n\n", " b "]
    text = lambda: "".join(rng.choices(words, k=rng.randint(1, 40)))  # noqa: E731
    kinds = [
        lambda: {"text": text()},
        lambda: {"messages": [user(text()), assistant(text()), user(text()), assistant(text())]},
    ]
    return [rng.choice(kinds)() for _ in range(count)]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "data.jsonl"
    write_rows(path, make_rows(700))
    return str(path)


@pytest.fixture
def cached(monkeypatch, tmp_path):
    """The cache folder, used for data of any size."""
    monkeypatch.setattr(module, "SMALL", 0)
    return tmp_path / "cache"


def entries(folder):
    return sorted(entry for entry in folder.iterdir() if entry.is_dir())


def equal(a, b):
    return all(
        np.array_equal(getattr(a, name), getattr(b, name))
        and getattr(a, name).dtype == getattr(b, name).dtype
        for name in NAMES
    )


def test_the_arrays_are_the_documents_one_after_another(path, encoder):
    tokens = tokenise(path, encoder)
    rows = make_rows(700)
    assert len(tokens.ends) == 700 and tokens.texts.tolist() == ["text" in row for row in rows]
    for row, start, end in zip(rows, [0, *tokens.ends], tokens.ends):
        [(ids, weights)] = encoder.encode(row)
        assert tokens.ids[start:end].tolist() == ids.tolist()
        assert tokens.weights[start:end].tolist() == weights.tolist()
        assert weights[-1] and ids[-1] == 0


def test_a_second_start_maps_the_same_tokens_and_reads_no_row(path, encoder, cached, monkeypatch, capfd):
    whole, first = tokenise(path, encoder), tokenise(path, encoder, str(cached))
    assert f"tokenised {path} in" in (said := capfd.readouterr().err)
    assert f"kept in {entries(cached)[0]}" in said
    monkeypatch.setattr("src.data.parallel.read_record", None)
    second = tokenise(path, encoder, str(cached))
    assert equal(whole, first) and equal(whole, second) and isinstance(second.ids.base, np.memmap)
    assert not second.ids.flags.writeable
    assert capfd.readouterr().err == "" and len(entries(cached)) == 1
    documents = load_documents(path, encoder.tokenizer, 50, cache=str(cached))
    monkeypatch.undo()
    plain = load_documents(path, encoder.tokenizer, 50)
    assert [row.ids.tolist() for row in documents] == [row.ids.tolist() for row in plain] and len(plain) > 700
    assert [row.weights.tolist() for row in documents] == [row.weights.tolist() for row in plain]


def test_much_text_is_shared_among_processes_and_ids_are_not(path, encoder, monkeypatch, tmp_path):
    whole, asked = tokenise(path, encoder), []
    monkeypatch.setattr(parallel, "LARGE", 1)
    monkeypatch.setattr(parallel, "available_cores", lambda: 5)

    def in_parallel(convert, chunks, processes):
        asked.append(processes)
        yield from map(convert, chunks)

    monkeypatch.setattr(parallel, "in_parallel", in_parallel)
    assert equal(tokenise(path, encoder), whole) and asked == [5]
    writer = binidx.BinidxWriter(str(tmp_path / "ids"), 256)
    writer.add([1, 2, 0])
    writer.close()
    assert tokenise(str(tmp_path / "ids"), encoder).ids.tolist() == [1, 2, 0] and asked == [5]


def test_small_data_is_not_kept(path, encoder, tmp_path):
    tokenise(path, encoder, str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_everything_that_decides_the_tokens_is_in_the_name(path, encoder, tmp_path, monkeypatch):
    vocabulary = tmp_path / "vocabulary.txt"
    vocabulary.write_text("1 'a' 1\n2 'b' 1\n")
    names = [fingerprint(path, encoder)]
    assert fingerprint(path, Encoder(load_tokenizer("bytes", 256))) == names[0]
    for other in (
        Encoder(load_tokenizer("utf16", 256)),
        Encoder(encoder.tokenizer, load_template("think")),
        Encoder(load_tokenizer(str(vocabulary), 9)),
        Encoder(load_tokenizer(str(vocabulary), 9, "b")),
        Encoder(encoder.tokenizer, load_template(CHATML)),
        Encoder(encoder.tokenizer, load_template(CHATML + " ")),
        Encoder(encoder.tokenizer, loss_mask="all"),
        Encoder(encoder.tokenizer, loss_mask="Assistant:"),
        Encoder(encoder.tokenizer, bos=(0,)),
        Encoder(encoder.tokenizer, think_weight=0.5),
        Encoder(encoder.tokenizer, prompt_weight=0.5),
    ):
        names.append(fingerprint(path, other))
    names += [fingerprint(path, encoder, reading) for reading in (Reading(("text",)), Reading(split="test"))]
    names.append(fingerprint(path, encoder, on_bad_row="skip"))
    tokenizer = load_tokenizer(str(vocabulary), 9)
    vocabulary.write_text("1 'a' 1\n2 'c' 1\n")
    names.append(fingerprint(path, Encoder(tokenizer)))
    with open(path, "a") as file:
        file.write("\n")
    names.append(fingerprint(path, encoder))
    for package in ("numpy", "rwkv", "tokenizers", "jinja2"):
        monkeypatch.setattr(
            module.importlib.metadata, "version", lambda name, package=package: str(name == package)
        )
        names.append(fingerprint(path, encoder))
    assert len(set(names)) == len(names)
    same = tmp_path / "renamed.jsonl"
    os.rename(path, same)
    assert fingerprint(str(same), encoder) != names[-1]


def test_a_changed_file_is_read_again(path, encoder, cached):
    tokenise(path, encoder, str(cached))
    with open(path, "a") as file:
        file.write('{"text": "more"}\n')
    assert len(tokenise(path, encoder, str(cached)).ends) == 701 and len(entries(cached)) == 2


@pytest.mark.parametrize("damage", ["ids", "weights", "ends", "texts", "found.json"])
def test_an_entry_that_is_not_whole_is_made_again(path, encoder, cached, damage):
    whole = tokenise(path, encoder)
    assert equal(tokenise(path, encoder, str(cached)), whole)
    file = entries(cached)[0] / damage
    file.write_bytes(file.read_bytes()[:-8])
    assert equal(tokenise(path, encoder, str(cached)), whole)
    file.unlink()
    assert equal(tokenise(path, encoder, str(cached)), whole) and len(entries(cached)) == 1


def test_a_broken_row_leaves_nothing(path, encoder, cached):
    with open(path, "a") as file:
        file.write('{"text": "\\ud800"}\n')
    with pytest.raises(UserError, match="data.jsonl, line 701: text: half a surrogate pair"):
        tokenise(path, encoder, str(cached))
    assert entries(cached) == []


def test_old_entries_and_what_a_killed_process_left_are_removed(path, encoder, cached):
    old, recent = "0" * 24, "1" * 24
    folders = {"photos": 99, ".git": 99, "2" * 23: 99}
    for name, days in {old: 31, recent: 29, ".making-a": 2, ".making-b": 0.5, **folders}.items():
        (cached / name).mkdir(parents=True)
        os.utime(cached / name, (time.time() - days * 86400,) * 2)
    tokenise(path, encoder, str(cached))
    first = fingerprint(path, encoder)
    left = {entry.name for entry in entries(cached)}
    assert left == {recent, ".making-b", first, *folders}, "the user's own folders stay"
    os.utime(cached / first, (time.time() - 31 * 86400,) * 2)
    tokenise(path, encoder, str(cached))  # an entry that is used again is young again
    tokenise(path, Encoder(encoder.tokenizer, loss_mask="all"), str(cached))
    assert first in {entry.name for entry in entries(cached)}


def test_processes_that_start_together_do_the_work_once(path, encoder, cached, monkeypatch):
    """Each holds the lock by a file of its own, which is how another process would hold it."""
    started, found = [], []
    encode = module._encoded

    def slow(*args):
        started.append(1)
        time.sleep(0.3)
        return encode(*args)

    monkeypatch.setattr(module, "_encoded", slow)
    threads = [
        threading.Thread(target=lambda: found.append(tokenise(path, encoder, str(cached)))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(started) == 1 and len(found) == 3 and all(equal(found[0], other) for other in found)


def test_a_folder_that_cannot_be_used(path, encoder, cached, capfd):
    cached.write_text("a file")
    tokens = module.tokenise(sources(path)[0], encoder, report := Report(), cache=str(cached))
    assert equal(tokens, tokenise(path, encoder)) and report.files[path].kinds.total() == 700
    note = capfd.readouterr().err
    assert f"note: the cache for tokens, {cached}, cannot be used (" in note
    assert "--data_cache takes another folder" in note


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert module.cache_folder("auto") == tmp_path / "rwkv-miss" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert module.cache_folder("auto") == tmp_path / ".cache" / "rwkv-miss" / "data"
    assert module.cache_folder("~/x") == tmp_path / "x"


def test_other_processes_make_the_same_tokens_and_say_where_a_row_is_broken():
    encoder = Encoder(load_tokenizer("bytes", 256), load_template(CHATML))
    convert = TokenConverter(DataSource("rows", "JSONL", 1.0, None, (), parse=json.loads), BY_NAME, encoder)
    rows = [(f"row {i}", json.dumps(row)) for i, row in enumerate(make_rows(90))]
    chunks = [rows[i : i + 7] for i in range(0, 90, 7)]
    parts = in_parallel(convert, [*chunks, [("row 90", '{"text": "\\ud800"}')]], 2)
    for expected in map(convert, chunks):
        part = next(parts)
        assert equal(part.made, expected.made) and part.kinds == expected.kinds and part.bad == []
    [(where, reason)], tokens = (part := next(parts)).bad, part.made
    assert (where, str(reason)[:28]) == ("row 90", "text: half a surrogate pair,")
    assert not isinstance(reason, WrongSetting)
    assert len(tokens.ids) == len(tokens.ends) == 0
    ids = dataclasses.replace(convert, source=DataSource("ids", BINIDX, 1.0, None, ()))
    [part] = in_parallel(ids, [[("row 91", {"ids": [256]})]], 2)
    assert isinstance(part.bad[0][1], WrongSetting) and part.bad[0][0] == "row 91"


def test_a_fresh_process_can_be_sent_the_work(path, encoder):
    """As where there is no fork."""
    [source] = sources(path)
    rows = list(itertools.islice(source.read((0,), Position()), 9))
    convert = TokenConverter(source, BY_NAME, encoder)
    assert equal(pickle.loads(pickle.dumps(convert))(rows).made, convert(rows).made)


def test_a_worker_that_is_killed_is_named():
    def work(chunk):
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(
        UserError, match="a process that reads data was killed, perhaps because memory ran out"
    ):
        list(in_parallel(work, [[1]], 2))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupt_leaves_no_process_and_no_half_an_entry(path, tmp_path, number):
    """Ctrl-C goes to all processes of the terminal, a kill to one."""
    script = """if True:
        import sys, time
        from rwkv_miss.errors import one_line_errors
        from src.data import token_cache as module
        from src.data.formats import Report, sources
        from src.data.tokenizer import load_tokenizer
        module.SMALL = module.LARGE = module.CHARACTERS_AT_ONCE = 0
        module.available_cores = lambda: 3
        encode = module.Encoder.encode
        def slow(*args):
            print("works", flush=True)
            time.sleep(0.02)
            return encode(*args)
        module.Encoder.encode = slow
        with one_line_errors():
            encoder = module.Encoder(load_tokenizer("bytes", 256))
            module.tokenise(sources(sys.argv[1])[0], encoder, Report(), cache=sys.argv[2])
    """
    cache = tmp_path / "cache"
    process = subprocess.Popen(
        [sys.executable, "-c", script, path, str(cache)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    process.stdout.readline()
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.kill()
    _, said = process.communicate(timeout=60)  # until no process holds the pipe any more
    if number == signal.SIGINT:
        assert process.returncode == 130 and said.strip() == "interrupted"
        assert sorted(os.listdir(cache)) == ["lock"]


def test_what_is_kept_of_a_document_is_little(encoder):
    """Beside its tokens: 13 bytes for where it is, 4 for its targets, and in the schedule 12 to 16 more, and
    4 for the order of a pass.
    """
    count = 100_000
    lengths = np.random.default_rng(0).integers(20, 40, count)
    ids = np.zeros(int(lengths.sum()), np.int32)
    tokens = Tokens(
        ids,
        np.ones(len(ids), bool),
        np.cumsum(lengths),
        np.zeros(count, bool),
        np.ones(count, bool),
        np.zeros(count, np.int8),
        np.zeros(count, np.int32),
    )
    tracemalloc.start()
    try:
        documents = fit(tokens, 64)
        schedules = [
            batches.make_schedule(documents, Config(ctx_len=64, packing=packing, micro_bsz=1), 1)
            for packing in (False, True)
        ]
        steps = [schedule.step_rows(0) for schedule in schedules]
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert documents.targets == documents.tokens - count and len(steps) == 2
    assert kept / count < 50


# documents of ctx_len


@pytest.mark.parametrize("ctx_len", [1, 2, 3, 7, 16])
def test_every_token_of_a_text_is_a_target_once(ctx_len):
    lengths = [1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 33, 50, 1, 1]
    texts = np.array([i % 3 != 1 for i in range(len(lengths))])
    ids = np.arange(sum(lengths), dtype=np.int32)
    tokens = Tokens(ids, ids % 3 > 0, np.cumsum(lengths), texts, *[np.ones(len(texts), bool)] * 3)
    documents = fit(tokens, ctx_len)
    seen = list(itertools.chain.from_iterable(row.ids[1:].tolist() for row in documents))
    wanted, cut, lost = [], 0, 0
    for start, length, text in zip(np.cumsum([0, *lengths]).tolist(), lengths, texts):
        kept = length if text else min(length, ctx_len + 1)
        cut, lost = cut + (kept < length), lost + length - kept
        wanted += range(start + 1, start + kept)
    assert seen == wanted and (documents.cut, documents.cut_tokens) == (cut, lost)
    assert documents.split == sum(n > ctx_len + 1 for n, text in zip(lengths, texts) if text)
    assert documents.lengths.tolist() == [len(row.ids) for row in documents]
    assert documents.lengths.max() <= ctx_len + 1
    assert documents.target_counts.tolist() == [row.targets for row in documents]
    assert documents.targets == sum(1 for token in seen if token % 3 > 0)


def test_rows_of_several_files_in_any_order():
    files = [
        Tokens(
            np.arange(9, dtype=np.int32) + 10 * i,
            np.arange(9) % 2 == i,
            *[np.array([n]) for n in (9, True, True, 0, 1)],
        )
        for i in range(2)
    ]
    rows = FileDocuments(
        files, np.array([1, 0, 1, 1, 0]), np.array([0, 8, 4, 8, 2]), np.array([9, 1, 2, 1, 1])
    )
    assert [row.ids.tolist() for row in rows] == [[*range(10, 19)], [8], [14, 15], [18], [2]]
    assert dataset.Documents(rows).target_counts.tolist() == [row.targets for row in rows]
    assert rows[-1].ids.tolist() == [2]


@pytest.mark.parametrize("share", [0, 0.25])
def test_masks_are_counted_and_hashed_as_documents_one_by_one(monkeypatch, share):
    """As documents would take 20 s of the start with 400,000 short ones."""
    generator = np.random.default_rng(0)
    weights = generator.choice(np.array([0, 1, share], np.float32), 60)
    weights[9] = 1
    ends = np.array([1, 9, 9, 30, 60])  # one is empty
    tokens = Tokens(np.arange(60, dtype=np.int32), weights, ends, *[np.zeros(5, np.int8)] * 4)
    rows = dataset.joined([tokens], [np.array([3, 0, 1, 4, 2])])
    one_by_one = dataset.Documents([rows[i] for i in range(5)])
    assert [row.ids.tolist() for row in rows] == [row.ids.tolist() for row in one_by_one]
    if not share:
        monkeypatch.setattr(dataset, "Document", None)
        monkeypatch.setattr("src.data.file_documents.Document", None)
    found = dataset.Documents(rows)
    for name in ("target_counts", "weight_sums"):
        got, want = getattr(found, name), getattr(one_by_one, name)
        assert got.dtype == want.dtype and got.tolist() == want.tolist()
    assert found.digest == one_by_one.digest and (found.weight_sums.dtype == np.int32) is (not share)


@pytest.mark.parametrize("name", ["longest_match.py", "tokenizer_cpu.cpp"])
def test_another_matcher_gives_another_fingerprint(path, encoder, monkeypatch, tmp_path, name):
    """Both forms of the World tokenizer's matcher, which lie outside of src/data."""
    before = fingerprint(path, encoder)
    changed = tmp_path / name
    if name.endswith(".py"):
        changed.write_bytes(pathlib.Path(module.longest_match.__file__).read_bytes() + b"# another\n")
        monkeypatch.setattr(module.longest_match, "__file__", str(changed))
    else:
        changed.write_bytes((module.build.CUDA / name).read_bytes() + b"// another\n")
        monkeypatch.setattr(module.build, "CUDA", tmp_path)
    assert fingerprint(path, encoder) != before
