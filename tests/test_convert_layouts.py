"""peft folders for models with the names of Hugging Face's layouts: rwkv7-hf's own model for fla, a stand-in
with the official names.
"""

import re

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import rwkv_miss
from rwkv_miss.convert import Hints, convert
from rwkv_miss.files.checkpoint import read_checkpoint, read_metadata, write_checkpoint
from src.export import TextSettings, export
from src.model import RWKV

from .conftest import close, random_tensors
from .test_adapters import filled
from .test_convert_peft import CONFIG, TENSORS, Official, config_of, load, same_folder, trained
from .test_export_gguf import arch_of

IDS = torch.arange(13)[None]
LAYOUTS = ["official", "fla"]
RATIO = 5e-6  # error of logits by two programs in fp32; the worst seen is 6e-7


@pytest.fixture
def folder(tmp_path):
    """A folder with base.pth, of heads of 64, as rwkv7-hf needs them."""
    write_checkpoint(tmp_path / "base.pth", random_tensors(arch_of(7)).items())
    return tmp_path


def foreign(folder, layout):
    """The base in a program that knows nothing of this one, where there is one."""
    if layout == "official":
        return Official(RWKV.load(folder / "base.pth"))
    rwkv7_hf = pytest.importorskip("rwkv7_hf", reason="the test extra is absent: pip install rwkv7-hf")
    if not (folder / "hf").exists():
        export(folder / "base.pth", folder / "hf", "hf", layout="fla", settings=TextSettings("none"))
    return rwkv7_hf.RWKV7ForCausalLM.from_pretrained(folder / "hf")


def logits(model):
    with torch.no_grad():
        found = model(IDS)
    return found[0] if isinstance(found, tuple) else found.logits


def native(folder, method, **options):
    """The file a.pth of an adapter with values, and the logits of its model."""
    model = RWKV.load(folder / "base.pth")
    rwkv_miss.inject(model, method, **options)
    rwkv_miss.save_adapter(filled(model, 1), folder / "a.pth")
    return logits(model.eval())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "method,options",
    [
        ("miss", {"rank": 7, "train_parts": "emb,head,ln"}),
        ("lora", {"rank": 5, "alpha": 9.0, "rank_map": {"1.ffn.key": 3}, "alpha_map": {"0.att.key": 7.0}}),
        ("vera", {"rank": 9}),
    ],
)
def test_an_adapter_gives_the_same_logits_there_and_comes_back(folder, layout, method, options):
    want = native(folder, method, **options)
    done = convert(folder / "a.pth", folder / "out", "peft", layout=layout)
    assert done.notes == []
    loader = {"official": "transformers release with Rwkv7ForCausalLM", "fla": "rwkv7-hf"}[layout]
    assert done.lines()[-1].startswith("loaded by: ") and loader in done.lines()[-1]
    close(layout, logits(load(folder / "out", foreign(folder, layout))), want, RATIO)
    convert(folder / "out", folder / "b.pth", "native")
    before, after = read_checkpoint(folder / "a.pth"), read_checkpoint(folder / "b.pth")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    parse = rwkv_miss.adapter.METHODS[method].Options.parse
    a, b = (read_metadata(folder / name) for name in ("a.pth", "b.pth"))
    for name in a["linears"]:
        assert parse(a["options"]).at(name) == parse(b["options"]).at(name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_peft_wrote_there_merges_into_the_pth_and_is_written_again(folder, layout):
    """Patterns of ranks are for peft's names; the way back keeps the folder."""
    keys, pattern = (
        (["key"], r"^rwkv7\.blocks\.0\.att\.key")
        if layout == "official"
        else (["k_proj", "r_proj", "key"], r"^model\.layers\.0\.attn\.k_proj")
    )
    config = peft.LoraConfig(r=5, lora_alpha=9, target_modules=keys, rank_pattern={pattern: 2, "ffn.key": 3})
    live = trained(foreign(folder, layout), config)
    live.save_pretrained(str(folder / "theirs"))
    convert(folder / "theirs", folder / "ours.pth", "native")
    rwkv_miss.merge_file(folder / "base.pth", folder / "ours.pth", folder / "merged.pth")
    close("merged", logits(RWKV.load(folder / "merged.pth")), logits(live), RATIO)
    convert(folder / "ours.pth", folder / "again", "peft")
    same_folder(folder / "theirs", folder / "again")
    assert config_of(folder / "again") == config_of(folder / "theirs")

    other = LAYOUTS[layout == "official"]
    convert(folder / "ours.pth", folder / "other", "peft", layout=other)
    close("the other layout", logits(load(folder / "other", foreign(folder, other))), logits(live), RATIO)


def names_of(folder):
    """(target modules, names of the tensors)"""
    return config_of(folder)["target_modules"], set(load_file(folder / TENSORS))


def test_target_modules_are_short_where_they_select_the_same(folder):
    native(folder, "miss", rank=7)
    for layout, want in (
        ("official", ["key", "output", "receptance", "value"]),
        ("fla", ["k_proj", "key", "o_proj", "r_proj", "v_proj", "value"]),
    ):
        convert(folder / "a.pth", folder / layout, "peft", layout=layout)
        assert names_of(folder / layout)[0] == want
    assert "base_model.model.rwkv7.blocks.1.ffn.key.miss_block" in names_of(folder / "official")[1]
    assert "base_model.model.model.layers.1.attn.r_proj.miss_block" in names_of(folder / "fla")[1]
    native(folder, "miss", rank=7, targets=["att.key"])  # "key" would be the channel mix's, too
    convert(folder / "a.pth", folder / "some", "peft")
    assert names_of(folder / "some")[0] == [f"rwkv7.blocks.{i}.att.key" for i in (0, 1)]
    native(folder, "miss", rank=7, targets=["head"])
    convert(folder / "a.pth", folder / "head", "peft")
    assert names_of(folder / "head")[1] == {"base_model.model.head.miss_block"}


def test_the_names_of_the_pth_stay_where_they_are_asked_for_or_the_model_is_not_known(folder):
    native(folder, "miss", rank=7)
    done = convert(folder / "a.pth", folder / "pth", "peft", layout="pth")
    assert done.notes == [] and "base_model.model.blocks.0.att.key.miss_block" in names_of(folder / "pth")[1]
    metadata = read_metadata(folder / "a.pth") | {"arch": None}
    write_checkpoint(folder / "b.pth", read_checkpoint(folder / "a.pth").items(), metadata)
    done = convert(folder / "b.pth", folder / "unknown", "peft")
    assert "--base MODEL, or --layout official or fla" in done.notes[0]
    assert names_of(folder / "unknown")[1] == names_of(folder / "pth")[1]
    done = convert(folder / "b.pth", folder / "based", "peft", Hints(base=str(folder / "base.pth")))
    assert done.notes == [] and names_of(folder / "based")[0] == ["key", "output", "receptance", "value"]


def renamed(folder, out, change):
    """A copy of a peft folder with other names of tensors."""
    out.mkdir()
    save_file({change(name): t for name, t in load_file(folder / TENSORS).items()}, out / TENSORS)
    (out / CONFIG).write_text((folder / CONFIG).read_text())
    return out


def test_a_llama_keeps_its_names(folder):
    """model.layers is in both; only RWKV's own modules tell that it is one."""
    native(folder, "lora", rank=3, targets=["att.key", "att.value"])
    convert(folder / "a.pth", folder / "fla", "peft", layout="fla")
    llama = renamed(folder / "fla", folder / "llama", lambda name: name.replace(".attn.", ".self_attn."))
    convert(llama, folder / "b.pth", "native")
    assert "model.layers.0.self_attn.k_proj" in read_metadata(folder / "b.pth")["linears"]
    # the header names the model's sizes, so that k_proj and v_proj alone are enough
    convert(folder / "fla", folder / "c.pth", "native")
    assert read_metadata(folder / "c.pth")["linears"] == read_metadata(folder / "a.pth")["linears"]


@pytest.mark.parametrize(
    "flags,message",
    [
        ({"to": "safetensors", "layout": "fla"}, "--layout fla is for --to peft and lora; safetensors"),
        ({"to": "peft", "layout": "hf"}, "--layout 'hf' is unknown; choose one of: official, fla, pth"),
    ],
)
def test_layouts_that_are_none(folder, flags, message):
    native(folder, "miss", rank=7)
    with pytest.raises(rwkv_miss.UserError, match=re.escape(message)):
        convert(folder / "a.pth", folder / "out", **flags)
    assert not (folder / "out").exists()


def test_models_without_the_layout(folder):
    write_checkpoint(folder / "base.pth", random_tensors(arch_of(6)).items())
    native(folder, "miss", rank=7)
    with pytest.raises(rwkv_miss.UserError, match="is RWKV-7's, and the adapter is one of an RWKV-6"):
        convert(folder / "a.pth", folder / "out", "peft", layout="official")
    convert(folder / "a.pth", folder / "out", "peft")
    assert "base_model.model.blocks.0.att.gate.miss_block" in names_of(folder / "out")[1]
    metadata = read_metadata(folder / "a.pth") | {"arch": None}
    write_checkpoint(folder / "b.pth", read_checkpoint(folder / "a.pth").items(), metadata)
    with pytest.raises(rwkv_miss.UserError, match=r"att\.gate has no place in --layout fla"):
        convert(folder / "b.pth", folder / "other", "peft", layout="fla")


def test_linears_of_flas_low_rank_maps_are_named(folder):
    native(folder, "lora", rank=3)
    convert(folder / "a.pth", folder / "fla", "peft", layout="fla")
    odd = renamed(folder / "fla", folder / "odd", lambda name: name.replace("o_proj", "w_lora.lora.0"))
    with pytest.raises(rwkv_miss.UserError, match=r"w_lora\.lora\.0 is no module of the \.pth"):
        convert(odd, folder / "b.pth", "native")


def test_a_damaged_layout_is_named(folder):
    native(folder, "lora", rank=3)
    convert(folder / "a.pth", folder / "out", "peft")
    convert(folder / "out", folder / "b.pth", "native")
    metadata = read_metadata(folder / "b.pth")
    metadata["origin"]["layout"] = 3
    write_checkpoint(folder / "c.pth", read_checkpoint(folder / "b.pth").items(), metadata)
    with pytest.raises(
        rwkv_miss.UserError, match="the adapter's origin has the layout '3'; the file is damaged"
    ):
        convert(folder / "c.pth", folder / "again", "peft")


def test_a_package_of_rwkv_lightning_needs_one_file_as_its_base(folder):
    native(folder, "miss", rank=7)
    export(folder / "base.pth", folder / "hf", "hf", settings=TextSettings("none"))
    with pytest.raises(rwkv_miss.UserError, match="names the SHA-256 of a model's file; make that with"):
        convert(folder / "a.pth", folder / "out", "rwkv-lightning", Hints(base=str(folder / "hf")))
