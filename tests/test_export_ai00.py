"""Files for Ai00: what web-rwkv's loader asks for, by name, shape and dtype, and refusals."""

import dataclasses

import pytest
import torch

import rwkv_miss
from rwkv_miss import UserError
from rwkv_miss.files.checkpoint import write_checkpoint
from scripts import export as program
from src.export import TextSettings, export
from src.model import RWKV

from .conftest import random_tensors
from .test_export_gguf import arch_of, saved

safetensors = pytest.importorskip(
    "safetensors.torch", reason="the extra convert is absent: pip install safetensors"
)


def loaded(path):
    """(version, sizes, tensors) as loader.rs finds them; it takes nothing but fp16."""
    t = safetensors.load_file(path)
    assert all(tensor.dtype == torch.float16 for tensor in t.values())
    layers = 1 + max(int(name.split(".")[1]) for name in t if name.startswith("blocks."))
    a, f = "blocks.0.att.", "blocks.0.ffn."
    v6 = [f"{a}time_mix_{name}" for name in ("x", *"wkvrg", "w1", "w2")]
    v6 += [f"{a}time_decay_w1", f"{a}time_decay_w2", f"{f}time_mix_k", f"{f}time_mix_r"]
    names = "x_r x_w x_k x_v x_a x_g w0 w1 w2 a0 a1 a2 g1 g2 r_k k_k k_a".split()
    v7 = [f"{a}{name}" for name in names]
    version = 7 if all(name in t for name in v7) else 6 if all(name in t for name in v6) else None
    V, C = t["emb.weight"].shape
    sizes = {"V": V, "C": C, "F": len(t[f"{f}key.weight"]), "layers": layers}
    if version == 7:
        sizes |= {"H": len(t[f"{a}r_k"]), "v": len(t["blocks.1.att.v1"])}
        sizes |= {name: len(t[f"{a}{name}1"]) for name in "wag"}
    else:
        sizes |= {"H": len(t[f"{a}time_first"]), "maa": len(t[f"{a}time_mix_w1"]) // 5}
        sizes["decay"] = len(t[f"{a}time_decay_w1"])
    return version, sizes, t


def wanted(version, s, layer):
    """name -> shape of what build_v6() and build_v7() load of a layer; vectors are taken of any shape."""
    b, C, F = f"blocks.{layer}", s["C"], s["F"]
    shapes = {
        f"{b}.{norm}.{part}": (C,) for norm in ("ln1", "ln2", "att.ln_x") for part in ("weight", "bias")
    }
    shapes |= {f"{b}.att.{name}.weight": (C, C) for name in ("receptance", "key", "value", "output")}
    shapes |= {f"{b}.ffn.key.weight": (F, C), f"{b}.ffn.value.weight": (C, F)}
    if version == 6:
        vectors = [f"att.time_mix_{name}" for name in "xwkvrg"] + ["att.time_decay"]
        shapes |= {f"{b}.{name}": (C,) for name in [*vectors, "ffn.time_mix_k", "ffn.time_mix_r"]}
        shapes |= {f"{b}.att.gate.weight": (C, C), f"{b}.ffn.receptance.weight": (C, C)}
        shapes |= {f"{b}.att.time_mix_w1": (5 * s["maa"], C), f"{b}.att.time_mix_w2": (5, C, s["maa"])}
        shapes |= {f"{b}.att.time_decay_w1": (s["decay"], C), f"{b}.att.time_decay_w2": (C, s["decay"])}
        return shapes | {f"{b}.att.time_first": (s["H"], C // s["H"])}
    vectors = [f"att.x_{name}" for name in "rwkvag"] + [f"att.{name}" for name in ("w0", "a0", "k_k", "k_a")]
    shapes |= {f"{b}.{name}": (C,) for name in [*vectors, "ffn.x_k"]}
    maps = "wag" if layer == 0 else "wagv"
    shapes |= {f"{b}.att.{name}1": (s[name], C) for name in maps}
    shapes |= {f"{b}.att.{name}2": (C, s[name]) for name in maps}
    return shapes | {f"{b}.att.r_k": (s["H"], C // s["H"])} | ({f"{b}.att.v0": (C,)} if layer else {})


@pytest.mark.parametrize("version", [6, 7])
def test_a_model_has_what_the_loader_asks_for(tmp_path, version):
    arch = arch_of(version)
    tensors = random_tensors(arch, torch.bfloat16) | {
        f"blocks.{i}.att.time_state": torch.randn(2, 64, 64) for i in range(2)
    }
    write_checkpoint(tmp_path / "m.pth", tensors.items())
    exported = export(tmp_path / "m.pth", tmp_path / "m.st", "ai00")
    assert "had to be rounded to fp16" in exported.notes[0]
    found, sizes, t = loaded(tmp_path / "m.st")
    expected = {"V": 256, "C": 128, "F": 160, "layers": 2, "H": 2} | arch.ranks
    assert (found, sizes) == (version, expected)
    for layer in range(2):
        for name, shape in wanted(version, sizes, layer).items():
            vector = len(shape) == 1
            assert (t[name].numel() == shape[0]) if vector else (tuple(t[name].shape) == shape), name
    turned = ["time_state", *(f"{name}{i}" for name in "wavg" for i in (1, 2))]
    turned += [f"time_{kind}_w{i}" for kind in ("maa", "decay") for i in (1, 2)]
    for name, tensor in tensors.items():
        theirs = name.replace("time_faaaa", "time_first").replace("time_maa", "time_mix")
        if name.split(".")[-1] in turned:
            tensor = tensor.transpose(-1, -2)
        assert torch.equal(t.pop(theirs), tensor.half()), name
    assert not t


def test_a_tuned_state_is_a_file_of_its_own(tmp_path):
    model = RWKV(arch_of(7))
    rwkv_miss.inject(model, "state")
    with torch.no_grad():
        for block in model.blocks:
            block.att.time_state.normal_()
    rwkv_miss.save_adapter(model, tmp_path / "a.pth")
    exported = export(tmp_path / "a.pth", tmp_path / "a.state", "ai00")
    assert exported.lines()[0].startswith(f"{tmp_path}/a.state: Ai00 states, state of 2 tensors")
    found = safetensors.load_file(tmp_path / "a.state")
    # [key, value], read as (key, head, value)
    assert found.keys() == {f"blocks.{i}.att.time_state" for i in range(2)}
    for i, block in enumerate(model.blocks):
        assert torch.equal(found[f"blocks.{i}.att.time_state"], block.att.time_state.detach().mT.half())


def test_what_ai00_has_no_place_for(tmp_path):
    tensors = saved(tmp_path / "m.pth", dataclasses.replace(arch_of(7), n_layer=1))
    with pytest.raises(UserError, match="1 layer.*the value residual of a second layer"):
        export(tmp_path / "m.pth", tmp_path / "m.st", "ai00")
    tensors = random_tensors(arch_of(6))
    tensors["head.weight"] *= 1e6
    write_checkpoint(tmp_path / "m.pth", tensors.items())
    with pytest.raises(UserError, match="head.weight has values beyond fp16's largest, 65504"):
        export(tmp_path / "m.pth", tmp_path / "m.st", "ai00")
    with pytest.raises(UserError, match="are for gguf and hf; ai00 holds all tensors and no tokenizer"):
        export(tmp_path / "m.pth", tmp_path / "m.st", "ai00", settings=TextSettings("world"))
    model = RWKV(arch_of(7))
    rwkv_miss.inject(model, "miss", rank=4)
    rwkv_miss.save_adapter(model, tmp_path / "a.pth")
    with pytest.raises(UserError, match="takes no adapters but initial states; merge the adapter"):
        export(tmp_path / "a.pth", tmp_path / "a.st", "ai00")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "m.pth"]


def test_the_program(tmp_path, capsys):
    saved(tmp_path / "m.pth", arch_of(7))
    program.main(f"--model {tmp_path}/m.pth --out {tmp_path}/m.st --to ai00".split())
    assert capsys.readouterr().out.startswith(f"{tmp_path}/m.st: ai00, RWKV-7, 2 layers, width 128")
