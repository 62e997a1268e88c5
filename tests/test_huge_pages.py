"""Regions of 2 MB pages: what is copied into them, and what is said about them."""

import copy
import gc
import re

import pytest
import torch
from torch import nn

import rwkv_miss
from rwkv_miss import UserError
from src.common.formatting import size_text
from src.inference import huge_pages
from src.inference.adapters import Adapters
from src.inference.decoders import fastest
from src.inference.huge_pages import PAGE, Region, move, move_weights
from src.model import RWKV

from .conftest import make_arch, random_tensors


def test_tensors_of_a_region_do_not_overlap_and_begin_at_cache_lines():
    region = Region(1000)
    parts = [region.take(size) for size in (1, 64, 65, 700)]
    for i, part in enumerate(parts):
        part.fill_(i)
    assert all((part == i).all() and part.data_ptr() % 64 == 0 for i, part in enumerate(parts))
    assert parts[0].data_ptr() % PAGE == 0
    with pytest.raises(ValueError, match="has 1000 bytes, 1024 are asked for"):
        region.take(10)


def test_moved_parameters_are_the_same_numbers_in_the_same_objects():
    odd, half = nn.Parameter(torch.randn(7, 33).t()), nn.Parameter(torch.randn(5, 3).bfloat16(), False)
    empty = nn.Parameter(torch.empty(0, 4))
    before = [p.detach().clone() for p in (odd, half, empty)]
    old = half.data_ptr()
    region = move([odd, half, empty])
    gc.collect()
    for parameter, old_one in zip((odd, half, empty), before):
        assert torch.equal(parameter, old_one) and parameter.dtype == old_one.dtype
        assert parameter.is_contiguous()
    assert odd.data_ptr() - region.memory.data_ptr() - region.start == 0 and half.data_ptr() != old
    del region
    gc.collect()
    assert torch.equal(odd, before[0]), "tensors keep their region"


def test_a_decoder_says_the_same_from_moved_weights(tmp_path):
    """Also where an adapter that stands in for weights is dropped after they moved."""
    arch = make_arch(7)
    model = RWKV(arch, "cpu").eval().requires_grad_(False)
    model.load_state_dict(random_tensors(arch))
    trained = copy.deepcopy(model)
    rwkv_miss.inject(trained, "dora", rank=4)
    for parameter in (p for p in trained.parameters() if p.requires_grad):
        parameter.data += 0.1 * torch.randn_like(parameter)
    rwkv_miss.save_adapter(trained, tmp_path / "dora.pth")
    adapters = Adapters(model, {"dora": tmp_path / "dora.pth"})
    embedding = model.emb.weight.data_ptr()

    def logits(names):
        adapters.use(names)
        decoder.refresh()
        return decoder.read(torch.tensor([[3, 1, 4]]), None)[0]

    decoder, _ = fastest(model, adapters)
    want, adapted = logits([]), logits(["dora"])
    decoder, how = fastest(model, adapters, huge_pages="yes")
    assert torch.equal(logits(["dora"]), adapted) and torch.equal(logits([]), want)
    matrices = [p for p in model.parameters() if p.dim() > 1 and p.data_ptr() != embedding]
    assert len({p.untyped_storage().data_ptr() for p in matrices}) == 1 and "copied" in how
    assert model.emb.weight.data_ptr() == embedding, "of the embedding a token reads one row"


def test_no_and_auto_are_as_the_words_say(monkeypatch):
    model = RWKV(make_arch(7), "cpu")
    assert move_weights(dict(model.named_parameters()), "no") == ""
    monkeypatch.setattr(huge_pages, "problem", lambda: "")
    monkeypatch.setattr(huge_pages, "free_memory", lambda kind: 1 << 20)
    assert re.fullmatch(
        r"not in large memory pages \(these need a copy, [\d.]+ KiB\)",
        move_weights(dict(model.named_parameters()), "auto"),
    )
    with pytest.raises(UserError, match="--huge_pages yes is for the CPU's own decoder.*kernel is torch"):
        fastest(RWKV(make_arch(7)), huge_pages="yes")


def test_a_region_lies_in_huge_pages_where_the_system_has_them():
    if found := huge_pages.problem():
        pytest.skip(f"NOT TESTED: no 2 MB pages, {found}")
    region = Region(4 * PAGE)
    assert region.huge_bytes() == 0 and "(the system had none left)" in region.describe()
    region.take(4 * PAGE).fill_(1)
    found = region.huge_bytes()
    if not found:
        pytest.skip("NOT TESTED: the system has no 2 MB page left")
    assert found <= 4 * PAGE and found % PAGE == 0
    assert region.describe() == f"8.00 MiB copied, {size_text(found)} of it into large memory pages"


def test_a_region_may_have_ordinary_pages():
    region = Region(4 * PAGE, huge=False)
    region.take(4 * PAGE).fill_(1)
    with open(huge_pages.SWITCH) if not huge_pages.problem() else open("/dev/null") as file:
        if "[always]" in file.read():
            pytest.skip("NOT TESTED: this system gives huge pages to all")
    assert region.huge_bytes() == 0 and region.describe() == "8.00 MiB copied"


def test_a_system_without_them_is_a_line_of_words(tmp_path, monkeypatch):
    switch = tmp_path / "enabled"
    monkeypatch.setattr(huge_pages, "SWITCH", str(switch))
    assert huge_pages.problem() == "this system has none"
    switch.write_text("always madvise [never]\n")
    assert "is never" in huge_pages.problem() and not huge_pages.wanted("auto", 1)
    monkeypatch.setattr(huge_pages, "huge_bytes", lambda *_: 0)
    region = Region(PAGE)
    region.take(PAGE)
    assert region.describe() == f"2.00 MiB copied, not into large memory pages ({switch} is never)"
    switch.write_text("always [madvise] never\n")
    assert huge_pages.problem() == ""


def test_auto_copies_only_where_memory_allows_it(monkeypatch):
    monkeypatch.setattr(huge_pages, "problem", lambda: "")
    for size, free, expected in (
        (100, 1 << 31, True),
        (1 << 30, 3 << 30, True),
        (1 << 30, (3 << 30) - 1, False),
        (100, 1 << 30, False),
    ):
        monkeypatch.setattr(huge_pages, "free_memory", lambda kind, free=free: free)
        assert huge_pages.wanted("auto", size) is expected
        assert huge_pages.wanted("yes", size) and not huge_pages.wanted("no", size)


def test_huge_bytes_are_those_of_the_mappings_between_the_addresses(tmp_path):
    smaps = tmp_path / "smaps"
    smaps.write_text(
        "00400000-00600000 r--p 00000000 08:01 17 /bin/some: thing\nRss: 4 kB\nAnonHugePages: 2048 kB\n"
        "00600000-00a00000 rw-p 00000000 00:00 0\nRss: 4 kB\nAnonHugePages: 4096 kB\nVmFlags: rd wr\n"
        "00a00000-00c00000 rw-p 00000000 00:00 0\nAnonHugePages: 2048 kB\n"
    )
    assert huge_pages.huge_bytes(0x600000, 0xA00000, str(smaps)) == 4 << 20
    assert huge_pages.huge_bytes(0x700000, 0x900000, str(smaps)) == 2 << 20
    assert huge_pages.huge_bytes(0x900000, 0xB00000, str(smaps)) == 2 << 20
    assert huge_pages.huge_bytes(0x600000, 0xC00000, str(smaps)) == 6 << 20
    assert huge_pages.huge_bytes(0, 1, str(tmp_path / "absent")) == 0
