"""A file that is written into while its tensors are in use ends the program in words."""

import os
import re
import shutil
import signal

import pytest
import torch

from rwkv_miss import read_checkpoint, write_checkpoint
from rwkv_miss.files import mapped
from rwkv_miss.files.mapped import ChangedFile, check_mapped, naming_changed_files
from rwkv_miss.files.model_files import read_tensors

from .program import CONTEXT, logged


def tensors(seed, rows=300):
    torch.manual_seed(seed)
    x = torch.randn(rows, 100)
    return {"matrix": x, "other": x.bfloat16()}


@pytest.fixture
def folder(tmp_path, all_mapped):
    """A folder with base.pth, other.pth of the same size and short.pth; none is small."""
    for name, content in (("base", tensors(1)), ("other", tensors(2)), ("short", tensors(2, rows=9))):
        write_checkpoint(tmp_path / f"{name}.pth", content.items())
    return tmp_path


def copied(folder, name):
    """cp: the file stays the same one, with another content."""
    with open(folder / f"{name}.pth", "rb") as source, open(folder / "base.pth", "wb") as target:
        shutil.copyfileobj(source, target)


CHANGES = {
    "another of its size": (lambda folder: copied(folder, "other"), r"pth was overwritten .* in use, so"),
    "a shorter one": (lambda folder: copied(folder, "short"), r"in use \(18.,... bytes, now .,...\), so"),
    "renamed over": (lambda folder: os.replace(folder / "other.pth", folder / "base.pth"), ""),
    "deleted": (lambda folder: os.remove(folder / "base.pth"), ""),
    "other rights": (lambda folder: os.chmod(folder / "base.pth", 0o400), ""),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_written_into_a_file_in_use_is_seen(folder, change):
    change, words = CHANGES[change]
    matrix = torch.nn.Parameter(read_checkpoint(folder / "base.pth")["matrix"].view(100, 300))
    matrix.itself = [matrix]
    check_mapped()
    change(folder)
    if words:
        with pytest.raises(ChangedFile, match=words):
            check_mapped()
        del matrix
    else:
        check_mapped()
        assert torch.equal(matrix.flatten(), tensors(1)["matrix"].flatten())
    check_mapped()  # whose tensors are gone may change


def test_small_files_are_copied_with_what_they_share(tmp_path):
    x = torch.randn(3, 4)
    torch.save({"a": x, "b": x[1:], "c": x.to(torch.float8_e4m3fn)}, tmp_path / "base.pth")
    a, b, c = read_checkpoint(tmp_path / "base.pth").values()
    os.truncate(tmp_path / "base.pth", 1)
    check_mapped()
    assert torch.equal(a, x) and torch.equal(b, x[1:]) and torch.equal(c.float(), x.to(c.dtype).float())
    assert b.data_ptr() == a[1:].data_ptr()


def test_safetensors_are_watched_too(folder):
    save_file = pytest.importorskip("safetensors.torch", reason="the extra convert is absent").save_file
    save_file(tensors(1), folder / "base.safetensors")
    kept = read_tensors(folder / "base.safetensors")
    os.utime(folder / "base.safetensors", ns=(1, 1))
    with pytest.raises(ChangedFile, match="base.safetensors was overwritten"):
        check_mapped()
    del kept


def touch_behind_the_end(path, threads, truncated):
    torch.set_num_threads(threads)
    mapped.SMALL = 0
    kept = read_checkpoint(path)
    with naming_changed_files():
        if truncated:
            os.truncate(path, 100)
            kept["matrix"].sum()
        os.kill(os.getpid(), signal.SIGBUS)


@pytest.mark.skipif(not hasattr(signal, "SIGBUS"), reason="NO SIGBUS: a mapped file can't get shorter")
@pytest.mark.parametrize("threads, truncated", [(1, True), (2, True), (1, False)])
def test_a_read_behind_the_end_of_a_file_says_which(folder, threads, truncated):
    write_checkpoint(folder / "base.pth", tensors(1, rows=5000).items())
    log = folder / "log"
    words = touch_behind_the_end, folder / "base.pth", threads, truncated
    process = CONTEXT.Process(target=logged, args=(log, *words))
    process.start()
    process.join(60)
    said = re.findall("error: .*base.pth was overwritten while it is in use", log.read_text())
    assert (process.exitcode, len(said)) == ((2, 1) if truncated else (-signal.SIGBUS, 0)), log.read_text()
