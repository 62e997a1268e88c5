"""An adapter as one safetensors file: every bit of every tensor and all metadata, there and back."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import rwkv_miss
from rwkv_miss.convert import convert
from rwkv_miss.files.checkpoint import read_checkpoint, read_metadata, write_checkpoint

from .test_adapters import CASES
from .test_convert_peft import saved

pytestmark = pytest.mark.usefixtures("in_its_folder")


@pytest.mark.parametrize(
    "method,options",
    [case for case in CASES if case[0] in ("miss", "bat", "mos", "vera", "pissa", "adalora")],
)
def test_there_and_back_is_a_copy(method, options, tmp_path):
    saved(7, method, options, train_parts="time,ln")
    convert(tmp_path / "a.pth", tmp_path / "a.safetensors", "safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b.pth", "native")
    before, after = read_checkpoint(tmp_path / "a.pth"), read_checkpoint(tmp_path / "b.pth")
    assert before.keys() == after.keys()
    assert all(
        torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before
    )
    assert read_metadata(tmp_path / "a.pth") == read_metadata(tmp_path / "b.pth")
    convert(tmp_path / "b.pth", tmp_path / "b.safetensors", "safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_dtypes_and_shared_memory(tmp_path):
    """Views of one storage are tensors of their own, and half precision stays what it is."""
    storage = torch.arange(64.0).view(8, 8)
    tensors = {
        "blocks.0.att.key.miss": storage[:3].bfloat16(),
        "a": storage[:2],
        "b": storage[1:3],
        "c": storage.t(),
        "d": torch.zeros(0),
        "e": torch.tensor(3),
        "f": storage.half(),
    }
    saved(7, "miss", {})
    metadata = read_metadata(tmp_path / "a.pth")
    write_checkpoint(tmp_path / "b.pth", tensors.items(), metadata)
    convert(tmp_path / "b.pth", tmp_path / "b.safetensors", "safetensors")
    found = load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(found[name], t) and found[name].dtype == t.dtype for name, t in tensors.items())
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert json.loads(file.metadata()["rwkv_miss"]) == metadata


@pytest.mark.parametrize(
    "header,message",
    [
        ({"rwkv_miss": "{"}, "JSON can't be read"),
        ({"rwkv_miss": "[]"}, "holds a list"),
        ({"rwkv_miss": '{"method": 3}'}, "method is '3'"),
        ({"rwkv_miss": '{"method": "spiral", "options": {}, "linears": []}'}, "made with method 'spiral'"),
        ({}, "no adapter of a known layout; its first tensors are x"),
    ],
)
def test_foreign_headers(header, message, tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "a.safetensors", header or None)
    with pytest.raises(rwkv_miss.UserError, match=message):
        convert(tmp_path / "a.safetensors", tmp_path / "b.pth", "native")
    assert not (tmp_path / "b.pth").exists()


def test_a_damaged_file_is_refused(tmp_path):
    saved(7, "miss", {})
    convert(tmp_path / "a.pth", tmp_path / "a.safetensors", "safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    for content in (whole[:-1], whole[:40], b"\xff" * 8 + whole[8:]):
        (tmp_path / "b.safetensors").write_bytes(content)
        with pytest.raises(rwkv_miss.UserError):
            convert(tmp_path / "b.safetensors", tmp_path / "b.pth", "native")
        assert not (tmp_path / "b.pth").exists()
