"""A digest of everything says who a base is."""

import json
import os
import re
import shutil

import pytest
import torch

from rwkv_miss import UserError, merge_file, read_checkpoint, read_metadata, write_checkpoint
from rwkv_miss.files import identity
from rwkv_miss.files.identity import Identity, fingerprint
from rwkv_miss.files.output import user_cache
from rwkv_miss.merging.unmerge import check_merge
from src.inference.load import load_with
from src.model import RWKV

from . import program
from .conftest import make_arch, random_tensors
from .program import losses, succeed
from .test_checkpoint import assorted


def test_every_byte_name_shape_and_dtype_counts(tmp_path):
    tensors = assorted()
    reference = fingerprint(tensors)
    assert re.fullmatch("blake2b:[0-9a-f]{64}", reference)
    assert fingerprint(dict(reversed(tensors.items()))) == reference
    write_checkpoint(tmp_path / "x.pth", tensors.items(), {"not": "part of it"})
    assert fingerprint(read_checkpoint(tmp_path / "x.pth")) == reference
    x = tensors["vector"]
    flipped = x.clone()
    flipped.view(torch.int32)[0, 0, 30] ^= 1
    for other in (x.squeeze(), x.double(), x.view(torch.int32), flipped, torch.cat([x, x])):
        assert fingerprint({**tensors, "vector": other}) != reference
    assert fingerprint({**tensors, "vector.": x}) != reference
    assert fingerprint({"vector2" if n == "vector" else n: t for n, t in tensors.items()}) != reference


def test_the_digest_in_threads_is_that_of_one(monkeypatch):
    tensors = assorted()
    reference = fingerprint(tensors)
    monkeypatch.setattr(identity, "REMEMBERED", 0)
    assert fingerprint(tensors) == reference


@pytest.fixture(scope="module")
def two_bases(tmp_path_factory):
    """A base, and another one with another value in one place."""
    folder = tmp_path_factory.mktemp("bases")
    tensors = random_tensors(make_arch(7, vocab_size=256, n_embd=48, head_size=16))
    changed = tensors["emb.weight"].clone()
    changed[70, 7] += 1
    other = {**tensors, "emb.weight": changed}
    assert fingerprint(tensors) != fingerprint(other)
    write_checkpoint(folder / "base.pth", tensors.items())
    write_checkpoint(folder / "other.pth", other.items())
    (folder / "rows.jsonl").write_text('{"text": "abc"}\n' * 8)
    return folder


def test_a_base_with_other_rows_is_refused(two_bases, tmp_path):
    """By merge, chat, unmerge and --resume auto."""
    base, other = two_bases / "base.pth", two_bases / "other.pth"
    shutil.copy(base, tmp_path / "model.pth")
    flags = f"""
        --load_model {tmp_path}/model.pth --data_file {two_bases}/rows.jsonl --tokenizer bytes
        --proj_dir {tmp_path}/run --accelerator cpu --peft_config r=4 --micro_bsz 2
    """.split()
    succeed(program.run([*flags, "--epoch_steps", "1"]))
    adapter = tmp_path / "run/adapter.pth"
    assert read_metadata(adapter)["base_fingerprint"] == fingerprint(read_checkpoint(base))
    with pytest.raises(UserError, match="was trained on another base"):
        merge_file(other, adapter, tmp_path / "merged.pth")
    with pytest.raises(UserError, match="was trained on another base"):
        load_with(other, {"a": adapter}, tokenizer="bytes", accelerator="cpu")
    merge_file(base, adapter, tmp_path / "merged.pth")
    assert (
        "by its own record it is a merge into another base, base.pth"
        in check_merge(other, tmp_path / "merged.pth", [adapter]).problems
    )
    shutil.copy(other, tmp_path / "model.pth")
    settings = (tmp_path / "run/config.yaml").read_text()
    code, output = program.run([*flags, "--epoch_steps", "2", "--resume", "auto"])
    assert code == 2, output
    assert "error: --resume auto: the base file is not the one that the run began with" in output, output
    assert (tmp_path / "run/config.yaml").read_text() == settings and len(losses(tmp_path / "run")) == 1


# computed once, and only where it is needed


@pytest.fixture
def count(monkeypatch, tmp_path):
    """Count the calls of fingerprint(), with an empty cache folder, and for small files, too."""
    calls = []

    def counted(*args):
        calls.append(args)
        return fingerprint(*args)

    monkeypatch.setattr(identity, "fingerprint", counted)
    monkeypatch.setattr(identity, "REMEMBERED", 1)
    monkeypatch.setattr(identity, "SETTLED", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda: len(calls)


def test_a_file_is_hashed_once_until_it_changes(two_bases, tmp_path, count):
    path = tmp_path / "base.pth"
    shutil.copy(two_bases / "base.pth", path)
    first = Identity(path).fingerprint
    assert Identity(str(path)).fingerprint == first
    assert Identity(path, read_checkpoint(path)).fingerprint == first and count() == 1
    held = path.stat()
    # into the same inode, of the same size, with the time put back
    shutil.copyfile(two_bases / "other.pth", path)
    os.utime(path, ns=(held.st_atime_ns, held.st_mtime_ns))
    assert (path.stat().st_ino, path.stat().st_size, path.stat().st_mtime_ns) == (
        held.st_ino,
        held.st_size,
        held.st_mtime_ns,
    )
    assert Identity(path).fingerprint != first and count() == 2
    [entry] = user_cache("fingerprints").iterdir()
    for damaged in ("", "[1]", '{"state": 3}', entry.read_text()[:50]):
        entry.write_text(damaged)
        assert Identity(path).fingerprint == fingerprint(read_checkpoint(path))
    assert count() == 6 and json.loads(entry.read_text())["file"] == str(path)


def test_a_file_that_has_just_changed_is_not_remembered(two_bases, tmp_path, count, monkeypatch):
    monkeypatch.setattr(identity, "SETTLED", 10**12)
    shutil.copy(two_bases / "base.pth", tmp_path / "base.pth")
    for _ in range(2):
        assert Identity(tmp_path / "base.pth").fingerprint
    assert count() == 2


def test_without_a_cache_folder_it_goes_on(two_bases, tmp_path, count, monkeypatch, capsys):
    (tmp_path / "cache").write_text("a file, where no folder can be made, not even by root")
    monkeypatch.setattr(identity, "DELAY", -1)
    assert Identity(two_bases / "base.pth").fingerprint == fingerprint(
        read_checkpoint(two_bases / "base.pth")
    )
    assert "can't be written (Not a directory), so " in capsys.readouterr().err


def test_a_chat_without_an_adapter_hashes_nothing(two_bases, count):
    adapters, _ = load_with(two_bases / "base.pth", {}, tokenizer="bytes", accelerator="cpu")
    adapters.use()
    assert count() == 0
    assert adapters.model.base_fingerprint == fingerprint(read_checkpoint(two_bases / "base.pth"))
    assert count() == 1


def test_a_file_that_was_replaced_since_is_not_taken_for_the_model(two_bases, tmp_path, monkeypatch):
    """A small one was hashed as it was read."""
    shutil.copy(two_bases / "base.pth", tmp_path / "base.pth")
    small = RWKV.load(tmp_path / "base.pth")
    monkeypatch.setattr(identity, "REMEMBERED", 1)
    model = RWKV.load(tmp_path / "base.pth")
    os.replace(shutil.copy(two_bases / "other.pth", tmp_path / "new.pth"), tmp_path / "base.pth")
    assert small.base_fingerprint == fingerprint(read_checkpoint(two_bases / "base.pth"))
    with pytest.raises(UserError, match="base.pth is another file than the one that was read"):
        assert model.base_fingerprint
