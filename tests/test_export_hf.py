"""Hugging Face folders: both layouts are read by independent programs, and come back as the same file."""

import dataclasses
import json
import os
import random

import pytest
import torch

from rwkv_miss import UserError
from rwkv_miss.files.checkpoint import read_checkpoint, write_checkpoint
from src import export as forms
from src.data.rwkv_template import RwkvTemplate
from src.data.tokenizer import load_tokenizer
from src.export import TextSettings, hugging_face
from src.export.chat_template import rwkv_jinja
from src.model import RWKV

from .conftest import close, random_tensors
from .test_export_and_back import METADATA, export, released
from .test_export_gguf import CONVERSATIONS, arch_of, saved

pytest.importorskip("safetensors", reason="the extra convert is absent: pip install safetensors")
LAYOUTS = ["official", "fla"]


@pytest.fixture
def rwkv7_hf():
    return pytest.importorskip("rwkv7_hf", reason="the test extra is absent: pip install rwkv7-hf")


def official_as_fla(stored):
    """The official layout's tensors under flash-linear-attention's names: what transformers and that project
    say of their layouts, written here anew.
    """
    outside = {"rwkv7.emb": "model.embeddings", "rwkv7.ln_out": "model.norm", "head": "lm_head"}
    inside = {"ln0": "pre_norm", "ln1": "attn_norm", "ln2": "ffn_norm", "att.ln_x": "attn.g_norm"}
    inside |= {"att.receptance": "attn.r_proj", "att.output": "attn.o_proj"}
    inside |= {"att.key": "attn.k_proj", "att.value": "attn.v_proj", "ffn.key": "ffn.key"}
    inside |= {"ffn.value": "ffn.value"}
    renamed = {}
    for name, tensor in stored.items():
        if name.startswith("rwkv7.blocks."):
            layer, rest = name.removeprefix("rwkv7.blocks.").split(".", 1)
            module, _, leaf = rest.rpartition(".")
            if module in inside:
                rest = f"{inside[module]}.{leaf}"
            elif leaf[-1] in "012":  # w0, w1, w2 and so on
                part = {"0": "lora.2.bias", "1": "lora.0.weight", "2": "lora.2.weight"}[leaf[-1]]
                tensor = tensor.flatten() if leaf[-1] == "0" else tensor.t()
                rest = f"attn.{leaf[0]}_lora.{part}"
            else:
                tensor = tensor.flatten() if leaf in ("k_k", "k_a") or module == "ffn" else tensor
                rest = rest.replace("att.", "attn.")
            if layer == "0" and "v_lora" in rest:
                continue
            renamed[f"model.layers.{layer}.{rest}"] = tensor
        else:
            module, _, leaf = name.rpartition(".")
            renamed[f"{outside[module]}.{leaf}"] = tensor
    return renamed


def logits_of(folder, layout, rwkv7_hf, ids):
    """By rwkv7-hf; it knows the fla layout alone, so the official one is renamed for it."""
    if layout == "fla":
        model, loading = rwkv7_hf.RWKV7ForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(loading.values())
    else:
        from safetensors.torch import load_file

        model = rwkv7_hf.RWKV7ForCausalLM(
            rwkv7_hf.RWKV7Config(**json.loads((folder / "config.json").read_text()))
        )
        model.load_state_dict(official_as_fla(load_file(folder / "model.safetensors")), strict=True)
    with torch.no_grad():
        return model.eval().float()(ids).logits


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rwkv7_hf_computes_the_goldens(tmp_path, data_dir, rwkv7_hf, layout):
    golden = torch.load(data_dir / "golden/rwkv7-tiny.golden.pt", weights_only=True)
    export(
        data_dir / "golden/rwkv7-tiny.pth",
        tmp_path / "hf",
        "hf",
        layout=layout,
        settings=TextSettings("none"),
    )
    logits = logits_of(tmp_path / "hf", layout, rwkv7_hf, golden["tokens"])
    close("logits", logits, golden["logits64"], 2e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [{}, {"n_layer": 1}, {"layer0_value_residual": False}])
def test_rwkv7_hf_computes_what_ours_does(tmp_path, rwkv7_hf, sizes, layout):
    saved(tmp_path / "m.pth", arch_of(7, **sizes), metadata=METADATA)
    export(tmp_path / "m.pth", tmp_path / "hf", "hf", layout=layout)
    ids = torch.randint(256, (2, 30), generator=torch.Generator().manual_seed(0))
    want = RWKV.load(tmp_path / "m.pth", torch.float64)(ids)[0]
    close("logits", logits_of(tmp_path / "hf", layout, rwkv7_hf, ids), want, 2e-5)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["bos_token_id"] == config["eos_token_id"] == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back_is_the_same_file(tmp_path, layout):
    """With block 0's value residual, and without; and vectors that were squeezed."""
    for present in (True, False):
        arch = dataclasses.replace(released(7), layer0_value_residual=present)
        tensors = {name: t.squeeze() if "x_" in name else t for name, t in random_tensors(arch).items()}
        write_checkpoint(tmp_path / "m.pth", tensors.items(), METADATA)
        export(tmp_path / "m.pth", tmp_path / f"hf-{present}", "hf", layout=layout)
        (tmp_path / "back.pth").unlink(missing_ok=True)
        done = export(tmp_path / f"hf-{present}", tmp_path / "back.pth", "pth")
        assert (tmp_path / "back.pth").read_bytes() == (tmp_path / "m.pth").read_bytes() and done.notes == []


def test_the_official_layout_has_the_released_names_and_shapes(tmp_path):
    """As transformers' Rwkv7ForCausalLM declares them; a checkpoint may have squeezed its vectors."""
    from safetensors.torch import load_file

    arch = dataclasses.replace(arch_of(7), layer0_value_residual=False)
    tensors = {name: t.squeeze() if t.numel() == 128 else t for name, t in random_tensors(arch).items()}
    write_checkpoint(tmp_path / "m.pth", tensors.items())
    export(tmp_path / "m.pth", tmp_path / "hf", "hf", settings=TextSettings("none"))
    shapes = {name: tuple(t.shape) for name, t in load_file(tmp_path / "hf" / "model.safetensors").items()}
    wide, matrix = (1, 1, 128), (128, 128)
    att = {f"x_{name}": wide for name in "rwkvag"} | dict.fromkeys(("k_k", "k_a", "w0", "a0", "v0"), wide)
    att |= {f"{name}.weight": matrix for name in ("receptance", "key", "value", "output")}
    for name, rank in {"w": 8, "a": 12, "v": 24, "g": 16}.items():
        att |= {f"{name}1": (128, rank), f"{name}2": (rank, 128)}
    att |= {"r_k": (2, 64), "ln_x.weight": (128,), "ln_x.bias": (128,)}
    ffn = {"x_k": wide, "key.weight": (160, 128), "value.weight": (128, 160)}
    block = {f"att.{name}": shape for name, shape in att.items()}
    block |= {f"ffn.{name}": shape for name, shape in ffn.items()}
    block |= {f"ln{i}.{part}": (128,) for i in (1, 2) for part in ("weight", "bias")}
    want = {f"rwkv7.blocks.{i}.{name}": shape for i in (0, 1) for name, shape in block.items()}
    want |= {f"rwkv7.blocks.0.ln0.{part}": (128,) for part in ("weight", "bias")}
    want |= {f"rwkv7.ln_out.{part}": (128,) for part in ("weight", "bias")}
    assert shapes == want | {"rwkv7.emb.weight": (256, 128), "head.weight": (256, 128)}
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["Rwkv7ForCausalLM"] and config["model_type"] == "rwkv7"
    sizes = {"vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 64}
    sizes |= {"decay_low_rank_dim": 8, "a_low_rank_dim": 12, "v_low_rank_dim": 24, "gate_low_rank_dim": 16}
    assert config.items() >= (sizes | {"intermediate_size": 160, "tie_word_embeddings": False}).items()


def test_the_official_folders_tokenizer_and_template(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the test extra is absent")
    arch = dataclasses.replace(released(7), n_embd=64, n_head=1, dim_att=64, vocab_size=65536)
    saved(tmp_path / "m.pth", arch, torch.bfloat16, {"template": "think-short-2025:hermes"})
    done = export(tmp_path / "m.pth", tmp_path / "hf", "hf")
    assert done.notes == []
    assert done.lines()[-1] == (
        "loaded by: a transformers release with Rwkv7ForCausalLM; 5.25 lacks it. --layout fla is for rwkv7-hf"
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = load_tokenizer("world", 65536)
    assert theirs.is_fast and theirs.eos_token_id == theirs.pad_token_id == 0
    for text in ("<|endoftext|> x", "Grüße\n\n世界 🌍\r\n\t ", "'\"\\ x , y 's ."):
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode(text) and theirs.decode(ids) == text, text
    assert theirs.decode([33, 0], skip_special_tokens=True) == " "
    assert theirs.chat_template == rwkv_jinja(RwkvTemplate("think-short-2025"))
    asked = theirs.apply_chat_template(CONVERSATIONS[3][0], add_generation_prompt=True, tokenize=False)
    assert asked.endswith("User: d think a bit\n\nAssistant: <think")
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == generation["bos_token_id"] == 0
    theirs.save_pretrained(tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again("<|endoftext|> x")["input_ids"] == ours.encode("<|endoftext|> x")


def test_generation_ends_where_the_template_ends_a_turn(tmp_path):
    (tmp_path / "v.txt").write_text("1 'a' 1\n2 '\\n' 1\n3 '\\n\\n' 2\n5 '✿' 3\n", encoding="utf-8")
    for template, ends in (("rwkv:json", 0), ("think:json", 0), ("flower:json", [0, 5])):
        saved(tmp_path / "m.pth", arch_of(7), metadata={"template": template})
        export(tmp_path / "m.pth", tmp_path / template, "hf", settings=TextSettings(str(tmp_path / "v.txt")))
        generation = json.loads((tmp_path / template / "generation_config.json").read_text())
        assert generation["eos_token_id"] == ends


def test_the_fla_folders_tokenizer_and_template(tmp_path, rwkv7_hf):
    arch = dataclasses.replace(released(7), n_embd=64, n_head=1, dim_att=64, vocab_size=65536)
    saved(tmp_path / "m.pth", arch, torch.bfloat16, {"template": "think-short-2025:hermes"})
    export(tmp_path / "m.pth", tmp_path / "hf", "hf", layout="fla")
    theirs, ours = rwkv7_hf.RWKV7Tokenizer.from_pretrained(tmp_path / "hf"), load_tokenizer("world", 65536)
    draw = random.Random(0)
    texts = ["<|endoftext|> x <|padding|>", "Grüße\n\n世界 🌍\r\n\t ", "'\"\\"] + [
        bytes(draw.choices(range(128), k=40)).decode() for _ in range(50)
    ]
    for text in texts:
        assert theirs(text)["input_ids"] == ours.encode(text), text
        assert theirs.decode(ours.encode(text)) == text, text
    assert theirs.eos_token_id == theirs.pad_token_id == 0
    assert theirs.chat_template == rwkv_jinja(RwkvTemplate("think-short-2025"))
    messages = CONVERSATIONS[3][0]
    assert theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False).endswith(
        "User: d think a bit\n\nAssistant: <think"
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tokenizer_json_is_in_the_folder(tmp_path, layout):
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"a": 0, "b": 1, "</s>": 2, "?": 3}, unk_token="?")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.add_special_tokens(["</s>"])
    inner.save(str(tmp_path / "t.json"))
    saved(tmp_path / "m.pth", arch_of(7))
    done = export(
        tmp_path / "m.pth",
        tmp_path / "hf",
        "hf",
        layout=layout,
        settings=TextSettings(str(tmp_path / "t.json")),
    )
    assert done.notes == []
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert loaded("b a")["input_ids"] == [1, 0] and loaded.eos_token_id == 2


@pytest.mark.parametrize(
    "layout,reason,files",
    [
        ("fla", "rwkv7-hf has none like utf16", ["block_0_value_residual.safetensors", "config.json"]),
        ("official", "has no form for utf16", ["config.json", "generation_config.json"]),
    ],
)
def test_the_folder_says_what_it_lacks(tmp_path, layout, reason, files):
    saved(tmp_path / "m.pth", arch_of(7))
    done = export(tmp_path / "m.pth", tmp_path / "hf", "hf", layout=layout, settings=TextSettings("utf16"))
    assert reason in done.notes[0]
    assert sorted(p.name for p in (tmp_path / "hf").iterdir()) == [*files, "model.safetensors"]


def test_a_value_residual_that_is_gone_is_zero(tmp_path):
    saved(tmp_path / "m.pth", arch_of(7))
    export(tmp_path / "m.pth", tmp_path / "hf", "hf", layout="fla", settings=TextSettings("none"))
    (tmp_path / "hf" / "block_0_value_residual.safetensors").unlink()
    assert "which nothing reads, is zero" in export(tmp_path / "hf", tmp_path / "back.pth", "pth").notes[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_of_several_files(tmp_path, layout):
    """As large models are published; and no index leads out of the folder."""
    from safetensors.torch import load_file, save_file

    saved(tmp_path / "m.pth", released(7), torch.bfloat16)
    export(tmp_path / "m.pth", tmp_path / "hf", "hf", layout=layout, settings=TextSettings("none"))
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "model.safetensors").unlink()
    place = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(weights)}
    for file in set(place.values()):
        save_file({name: t for name, t in weights.items() if place[name] == file}, tmp_path / "hf" / file)
    index = tmp_path / "hf" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": place}))
    export(tmp_path / "hf", tmp_path / "back.pth", "pth")
    before, back = read_checkpoint(tmp_path / "m.pth"), read_checkpoint(tmp_path / "back.pth")
    assert all(torch.equal(before[name], t) for name, t in back.items())
    assert len(before) == len(back) + 3 * (layout == "fla")
    for bad in ("../m.safetensors", 3, None):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, bad)}))
        with pytest.raises(UserError, match="no table of files in this folder"):
            export(tmp_path / "hf", tmp_path / "back.pth", "pth")


def test_no_folder_is_written_over_and_no_half_one_is_left(tmp_path, monkeypatch):
    saved(tmp_path / "m.pth", arch_of(7))
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine").write_text("x")
    with pytest.raises(UserError, match="holds mine; choose another name, or empty the folder"):
        export(tmp_path / "m.pth", tmp_path / "hf", "hf", settings=TextSettings("none"))
    monkeypatch.setattr("src.export.hugging_face.common_config", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(tmp_path / "m.pth", tmp_path / "new", "hf", settings=TextSettings("none"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "m.pth"]


CHANGES = {
    "fla": [
        ({"head_dim": 32}, "heads of 32 and an eps of 1e-05"),
        ({"norm_eps": 1e-6}, "heads of 64 and an eps of 1e-06"),
        ({"model_type": "llama"}, "a folder of 'llama'"),
        ({"num_hidden_layers": 3}, "lacks model.layers.2."),
    ],
    "official": [
        ({"head_dim": 32}, "heads of 32: programs for this layout scale ln_x's eps with it"),
        ({"norm_eps": 1e-6}, "has norm_eps 1e-06"),
        ({"model_type": "llama"}, "a folder of 'llama'"),
        ({"num_hidden_layers": 3}, "has 2 layers, and its config.json says num_hidden_layers 3"),
    ],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_that_would_compute_something_else(tmp_path, layout):
    saved(tmp_path / "m.pth", released(7))
    export(tmp_path / "m.pth", tmp_path / "hf", "hf", layout=layout, settings=TextSettings("none"))
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    for change, message in CHANGES[layout]:
        path.write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=message):
            export(tmp_path / "hf", tmp_path / "back.pth", "pth")


def test_a_folder_that_claims_too_much(tmp_path):
    saved(tmp_path / "m.pth", released(7))
    export(tmp_path / "m.pth", tmp_path / "hf", "hf", layout="fla", settings=TextSettings("none"))
    (tmp_path / "hf" / "block_0_value_residual.safetensors").unlink()
    weights = tmp_path / "hf" / "model.safetensors"
    content = weights.read_bytes()
    recorded = b'\\"blocks.0.att.v1\\":[\\"float32\\",128,5]'
    assert recorded in content
    weights.write_bytes(content.replace(recorded, recorded.replace(b"128,5]", b"99999]")))
    with pytest.raises(UserError, match="a value residual that is larger than its matrices"):
        export(tmp_path / "hf", tmp_path / "back.pth", "pth")


def test_a_checkpoint_does_not_take_the_place_of_a_file_of_the_folder(tmp_path):
    saved(tmp_path / "m.pth", arch_of(7))
    export(tmp_path / "m.pth", tmp_path / "hf", "hf", settings=TextSettings("none"))
    before = (tmp_path / "hf" / "config.json").read_bytes()
    with pytest.raises(UserError, match="config.json lies in the input's folder"):
        forms.export(tmp_path / "hf", tmp_path / "hf" / "config.json", "pth")
    assert (tmp_path / "hf" / "config.json").read_bytes() == before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pipe_in_a_folder_is_refused(tmp_path, name):
    saved(tmp_path / "m.pth", arch_of(7))
    export(tmp_path / "m.pth", tmp_path / "hf", "hf", settings=TextSettings("none"))
    (tmp_path / "hf" / name).unlink()
    os.mkfifo(tmp_path / "hf" / name)
    with pytest.raises(UserError, match=f"{name} is no regular file"):
        export(tmp_path / "hf", tmp_path / "back.pth", "pth")


@pytest.mark.parametrize(
    "layout,sizes,message",
    [
        ("official", {"version": 6}, "the official layout is RWKV-7's alone, and the loader of RWKV-6"),
        ("fla", {"version": 6}, "with the eps of the layers, 1e-5; RWKV-6 has 64e-5"),
        ("official", {"head_size": 32, "n_head": 4}, "those of Rwkv7ForCausalLM, scale ln_x's eps"),
        ("fla", {"head_size": 128, "n_head": 1}, "flash-linear-attention, scale .* here to 128e-5"),
        ("transformers", {}, "--layout 'transformers' is unknown; choose one of: official, fla"),
    ],
)
def test_models_that_would_be_wrong_are_refused(tmp_path, layout, sizes, message):
    saved(tmp_path / "m.pth", arch_of(**({"version": 7} | sizes)))
    with pytest.raises(UserError, match=message):
        export(tmp_path / "m.pth", tmp_path / "out", "hf", layout=layout)
    assert [p.name for p in tmp_path.iterdir()] == ["m.pth"]


def test_heads_that_are_not_as_wide_as_the_model_are_refused():
    arch = dataclasses.replace(arch_of(7), n_head=1, dim_att=64)
    with pytest.raises(UserError, match="64 wide in all and the model 128; Rwkv7ForCausalLM has no models"):
        hugging_face.check(arch, "official")
