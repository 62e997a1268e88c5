"""Adapter files of other projects: read into ours, written from ours, the same bits there and back, and
refusals instead of guesses.
"""

import pytest
import torch

import rwkv_miss
from rwkv_miss.__main__ import main
from rwkv_miss.convert import Hints, convert
from rwkv_miss.files.checkpoint import read_checkpoint, read_metadata, write_checkpoint
from src.model import RWKV

from .conftest import make_arch, random_tensors
from .test_adapters import filled


def saved(path, method="miss", **options):
    """An adapter file of a small RWKV-7 model, with values in all its tensors."""
    model = RWKV(make_arch(7))
    model.load_state_dict(random_tensors(model.arch))
    rwkv_miss.inject(model, method, **options)
    rwkv_miss.save_adapter(filled(model), path)
    return path


def same_tensors(first, second):
    a, b = read_checkpoint(first), read_checkpoint(second)
    assert list(a) == list(b)
    assert all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a.values(), b.values()))


def test_native_to_native_is_a_copy(tmp_path, capsys):
    path = saved(tmp_path / "a.pth", rank=8)
    main(["convert", str(path), str(tmp_path / "b.pth"), "--to", "native"])
    assert "miss of 12 linears" in capsys.readouterr().out
    same_tensors(path, tmp_path / "b.pth")
    assert read_metadata(path) == read_metadata(tmp_path / "b.pth")


@pytest.mark.parametrize(
    "content,message", [({"x": torch.zeros(2)}, "no adapter of a known layout; its first tensors are x")]
)
def test_what_no_format_knows_is_refused(tmp_path, content, message):
    write_checkpoint(tmp_path / "a.pth", content.items())
    with pytest.raises(rwkv_miss.UserError, match=message):
        convert(tmp_path / "a.pth", tmp_path / "b.pth", "native")
    assert not (tmp_path / "b.pth").exists()


def test_the_input_is_never_written_over(tmp_path):
    path = saved(tmp_path / "a.pth", rank=8)
    before = path.read_bytes()
    with pytest.raises(rwkv_miss.UserError, match="is an input"):
        convert(path, path, "native")
    assert path.read_bytes() == before


def test_an_unknown_origin_is_an_error_that_lists_them(tmp_path):
    path = saved(tmp_path / "a.pth", rank=8)
    with pytest.raises(
        rwkv_miss.UserError,
        match="--origin 'bone' is unknown; choose one of: rwkv-peft, bone-v0, openmose, peft",
    ):
        convert(path, tmp_path / "b.pth", "native", Hints(origin="bone"))
    assert not (tmp_path / "b.pth").exists()
