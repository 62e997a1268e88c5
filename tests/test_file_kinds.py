"""An output replaces only a model or adapter of the kind that it writes; a wrong kind of input is named."""

import pytest
import torch

from rwkv_miss import UserError, merge_file
from rwkv_miss.convert import convert
from rwkv_miss.files.checkpoint import read_checkpoint, write_checkpoint
from rwkv_miss.files.file_kinds import CHECKPOINT, GGUF, OTHER, SAFETENSORS, kind_of, may_replace
from rwkv_miss.files.safetensors_io import write_safetensors
from rwkv_miss.merging.diff import diff_files
from src.export import export

from .conftest import make_arch, random_tensors
from .test_convert import saved

TENSORS = {"a": torch.ones(3)}


@pytest.fixture
def files(tmp_path):
    """A base and an adapter of it, and one file of every kind."""
    write_checkpoint(tmp_path / "base.pth", random_tensors(make_arch(7)).items())
    saved(tmp_path / "adapter.pth", rank=8)
    merge_file(tmp_path / "base.pth", tmp_path / "adapter.pth", tmp_path / "merged.pth")
    write_safetensors(tmp_path / "a.safetensors", TENSORS, {})
    write_safetensors(tmp_path / "own.safetensors", TENSORS, {"rwkv_miss": '{"format": "rwkv-miss adapter"}'})
    torch.save(TENSORS, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(60))
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "empty").touch()
    return tmp_path


def test_every_kind_is_known(files):
    want = {
        "base.pth": CHECKPOINT,
        "legacy.pth": CHECKPOINT,
        "adapter.pth": "rwkv-miss adapter",
        "merged.pth": "rwkv-miss merged",
        "a.safetensors": SAFETENSORS,
        "own.safetensors": "rwkv-miss adapter",
        "a.gguf": GGUF,
        "notes.txt": OTHER,
    }
    assert {name: kind_of(files / name) for name in want} == want
    for name in ("notes.txt", "empty", "absent"):
        may_replace(files / name)
    may_replace(files / "a.gguf", GGUF)
    with pytest.raises(UserError, match="is there already, a GGUF file, and would be lost"):
        may_replace(files / "a.gguf", SAFETENSORS)


def test_a_model_is_not_lost_under_the_name_of_an_output(files):
    base, adapter, other, kept = files / "base.pth", files / "adapter.pth", files / "other.pth", {}
    other.write_bytes(base.read_bytes())
    for name in ("other.pth", "adapter.pth", "merged.pth"):
        kept[name] = (files / name).read_bytes()
    works = {
        "merge": lambda out: merge_file(base, adapter, out),
        "native": lambda out: convert(adapter, out, "native"),
        "rwkv-peft": lambda out: convert(adapter, out, "rwkv-peft"),
        "safetensors": lambda out: convert(adapter, out, "safetensors"),
        "diff": lambda out: diff_files(base, files / "merged.pth", out, 8),
        "model": lambda out: export(base, out, "safetensors"),
        "pth": lambda out: export(files / "m.safetensors", out, "pth"),
    }
    export(base, files / "m.safetensors", "safetensors")
    for name, work in works.items():
        with pytest.raises(UserError, match="other.pth is there already, a checkpoint, and would be lost"):
            work(other)
        if name != "merge":
            with pytest.raises(UserError, match="merged"):
                work(files / "merged.pth")
        if name not in ("native", "diff", "rwkv-peft", "safetensors"):
            with pytest.raises(UserError, match="adapter"):
                work(adapter)
    assert all((files / name).read_bytes() == content for name, content in kept.items())
    merge_file(base, adapter, files / "merged.pth")  # as by a second run of the demo


@pytest.mark.parametrize("name,form", [("a.gguf", "GGUF"), ("a.safetensors", "safetensors")])
def test_another_form_in_the_place_of_a_checkpoint_is_named(files, name, form):
    with pytest.raises(
        UserError,
        match=f"is a {form} file, expected a .pth; python -m scripts.export --to pth makes one of a model",
    ):
        read_checkpoint(files / name)


@pytest.mark.parametrize("name", ["m.safetensors", "m.gguf"])
def test_a_checkpoint_is_not_written_under_the_name_of_another_form(files, name):
    with pytest.raises(UserError, match="name it .pth"):
        merge_file(files / "base.pth", files / "adapter.pth", files / name)
    assert not (files / name).exists()


@pytest.mark.parametrize("dtype", ["base", "fp16", "bf16", "auto"])
@pytest.mark.parametrize("weight", [1e29, 1e25])
def test_a_change_beyond_all_numbers_is_no_merge(files, dtype, weight):
    with pytest.raises(UserError, match="infinite, or beyond 1e19|beyond fp16"):
        merge_file(files / "base.pth", files / "adapter.pth", files / "m.pth", dtype, weights=[weight])
    assert not (files / "m.pth").exists()
    with pytest.raises(UserError, match="no number to multiply with; expected is one below 1e[+]30"):
        merge_file(files / "base.pth", files / "adapter.pth", files / "m.pth", dtype, weights=[1e31])
