"""A digest of everything says who a base is; what earlier versions wrote goes on being used."""

import functools
import json
import os
import pathlib
import re
import shutil

import pytest
import torch

from rwkv_miss import UserError, merge_file, progress, read_checkpoint, read_metadata, write_checkpoint
from rwkv_miss.files import identity
from rwkv_miss.files.identity import Identity, fingerprint, sampled_fingerprint
from rwkv_miss.merging.unmerge import check_merge
from src.config import settle
from src.data.templates import recorded_template
from src.data.tokenizer import load_tokenizer
from src.inference.conversation import Conversation
from src.inference.conversation_file import load_chat
from src.inference.load import load_with
from src.inference.sampling import GREEDY
from src.model import RWKV

from . import program
from .answering import engine_of
from .conftest import make_arch, random_tensors
from .program import losses, succeed
from .test_checkpoint import assorted

EARLIER = pathlib.Path(__file__).parent / "written_by_587ce99"
"""Written by that commit in an empty folder, from a random model of one layer. `train`, `merge` and the chat
are its own:

    default_arch(7, 1, 16, 256, 8) with dim_ffn 32 and ranks of 2, weights + 0.1 * randn in bf16   -> base.pth
    train.py --load_model base.pth --data_file rows.jsonl --proj_dir run --tokenizer bytes --peft_config r=2
             --epoch_steps 1 --micro_bsz 2 --ctx_len 32 --accelerator cpu --eval_split 0               -> run/
    python -m rwkv_miss merge --base base.pth --adapter run/adapter.pth --out merged.pth
    python -m demo.chat --model base.pth --adapter run/adapter.pth --temperature 0 --max_tokens 4
             /save chat.pth
"""


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


def rows_changed(tensor):
    """Another tensor with the same sampled bytes: every row is changed that the earlier rule does not
    read.
    """
    data, step = tensor.clone(), tensor.nbytes // 13
    width = tensor.shape[1] * tensor.element_size()
    read = {
        row
        for start in range(0, tensor.nbytes, step)
        for row in range(start // width, (start + 255) // width + 1)
    }
    rows = [row for row in range(len(tensor)) if row not in read]
    data[rows] = data[rows] * 1.5 + 1
    assert len(rows) > 0.7 * len(tensor)
    return data


@pytest.fixture(scope="module")
def two_bases(tmp_path_factory):
    """A base, and another one that the earlier rule takes for it."""
    folder = tmp_path_factory.mktemp("bases")
    tensors = random_tensors(make_arch(7, vocab_size=256, n_embd=48, head_size=16))
    other = {**tensors, "emb.weight": rows_changed(tensors["emb.weight"])}
    assert sampled_fingerprint(tensors) == sampled_fingerprint(other) and fingerprint(tensors) != fingerprint(
        other
    )
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
    assert (
        code == 2 and "error: --resume auto: the base file is not the one that the run began with" in output
    ), output
    assert (tmp_path / "run/config.yaml").read_text() == settings and len(losses(tmp_path / "run")) == 1


# computed once, and only where it is needed


@pytest.fixture
def count(monkeypatch, tmp_path):
    """How often fingerprint() has been computed, with a cache folder that is empty and for small files,
    too.
    """
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
    assert (
        Identity(str(path)).fingerprint == first
        and Identity(path, read_checkpoint(path)).fingerprint == first
        and count() == 1
    )
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
    [entry] = identity.cache_folder().iterdir()
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
    assert (
        adapters.model.base_fingerprint == fingerprint(read_checkpoint(two_bases / "base.pth"))
        and count() == 1
    )


def test_a_file_that_was_replaced_since_is_not_taken_for_the_model(two_bases, tmp_path):
    shutil.copy(two_bases / "base.pth", tmp_path / "base.pth")
    model = RWKV.load(tmp_path / "base.pth")
    os.replace(shutil.copy(two_bases / "other.pth", tmp_path / "new.pth"), tmp_path / "base.pth")
    with pytest.raises(UserError, match="base.pth is another file than the one that was read"):
        assert model.base_fingerprint


# what 587ce99 wrote


@pytest.fixture
def earlier(tmp_path, monkeypatch):
    """A copy of its files; a note is said again."""
    progress._print_note.cache_clear()
    return pathlib.Path(shutil.copytree(EARLIER, tmp_path / "earlier"))


def other_base(folder):
    tensors = read_checkpoint(folder / "base.pth")
    write_checkpoint(folder / "other.pth", {name: tensor * 1.5 for name, tensor in tensors.items()}.items())
    return folder / "other.pth"


def test_its_adapters_and_merged_files_are_used(earlier, capsys):
    assert not read_metadata(earlier / "run/adapter.pth")["base_fingerprint"].startswith("blake2b:")
    base, adapter = earlier / "base.pth", earlier / "run/adapter.pth"
    report = merge_file(base, adapter, earlier / "again.pth")
    assert f"note: {adapter} is of an earlier version" in capsys.readouterr().err
    theirs, ours = read_checkpoint(earlier / "merged.pth"), read_checkpoint(earlier / "again.pth")
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)
    assert report.record["base_fingerprint"] == fingerprint(read_checkpoint(base))
    assert check_merge(base, earlier / "merged.pth", [adapter]).problems == []
    assert f"note: {earlier / 'merged.pth'} is of an earlier version" in capsys.readouterr().err
    with pytest.raises(UserError, match="is already a merge of"):
        merge_file(earlier / "merged.pth", adapter, earlier / "twice.pth")
    with pytest.raises(UserError, match="was trained on another base"):
        merge_file(other_base(earlier), adapter, earlier / "wrong.pth")
    problems = check_merge(earlier / "other.pth", earlier / "merged.pth", [adapter]).problems
    assert "by its own record it is a merge into another base, base.pth" in problems


def in_folder(folder, rank):
    os.chdir(folder)


def test_its_run_goes_on(earlier):
    """The second step is that of a run of today."""
    flags = """
        --load_model base.pth --data_file rows.jsonl --tokenizer bytes --peft_config r=2 --micro_bsz 2
        --ctx_len 32 --accelerator cpu --eval_split 0 --epoch_steps 2
    """.split()

    as_it_was = ["--lr_schedule", "constant", "--lr_init", "paper"]
    here = functools.partial(in_folder, earlier)
    output = succeed(program.run([*flags, "--proj_dir", "run", "--resume", "auto"], here))
    checkpoint = "run/checkpoints/step-00000001.pth"
    assert f"note: {checkpoint} is of an earlier version" in output
    succeed(program.run([*flags, "--proj_dir", "new", *as_it_was], here))
    assert losses(earlier / "run") == pytest.approx(losses(earlier / "new"), rel=1e-5)
    inputs = read_metadata(earlier / "run/checkpoints/step-00000002.pth")["inputs"]
    assert inputs["base file"] == fingerprint(read_checkpoint(earlier / "base.pth"))


def test_its_template_has_the_meaning_that_it_had(earlier):
    """In an adapter, in a merged file and in config.yaml: then "think-short" had no parentheses."""
    hi = [{"role": "user", "content": "hi"}]
    for name in ("run/adapter.pth", "merged.pth", "run/checkpoints/step-00000001.pth"):
        path, metadata = earlier / name, read_metadata(earlier / name)
        assert recorded_template("auto", load_tokenizer("bytes", 256), path).record == "rwkv:hermes"
        write_checkpoint(path, read_checkpoint(path).items(), {**metadata, "template": "think-short"})
        found = recorded_template("auto", load_tokenizer("bytes", 256), earlier / "base.pth", path)
        assert found.segments(hi, ask=True)[0].text == "User: hi think a bit\n\nAssistant: <think"
    settings = earlier / "run/config.yaml"
    settings.write_text(settings.read_text().replace("template: auto", "template: think-short"))
    config, _ = settle({"config": str(settings)})
    assert (config.template, config.tool_style) == ("think-short-2025", "hermes")
    settings.write_text("template: think-short\n")  # as people write it today
    config, _ = settle({"config": str(settings)})
    assert (config.template, config.tool_style) == ("think-short", "auto")


def test_its_saved_chat_goes_on(earlier, capsys):
    """With its state where base and adapters are the same."""
    path = earlier / "chat.pth"

    def go_on(base, adapter=earlier / "run/adapter.pth"):
        adapters, tokenizer = load_with(base, {"a": adapter} if adapter else {}, "bytes", accelerator="cpu")
        adapters.use(list(adapters.by_name))
        conversation = Conversation(engine_of(adapters.model, tokenizer), GREEDY)
        return load_chat(conversation, adapters, path), conversation

    used, conversation = go_on(earlier / "base.pth")
    assert used and conversation.turns[0].messages[0] == {"role": "user", "content": "hello"}
    assert f"note: {path} is of an earlier version" in capsys.readouterr().err
    used, conversation = go_on(earlier / "base.pth", None)
    assert not used and conversation.turns
    with pytest.raises(UserError, match="was saved with another base"):
        go_on(other_base(earlier), None)
