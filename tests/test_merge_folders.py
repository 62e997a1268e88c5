"""Merges into Hugging Face folders of any model: the folder's files, and the live model's logits."""

import importlib.util
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import rwkv_miss
from rwkv_miss.__main__ import describe, main
from rwkv_miss.merging import merge as merging
from rwkv_miss.merging.unmerge import check_merge

from .conftest import close

SIZES = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=1)
# name -> (kind, settings, class that is saved, class that is trained, targets, trained as a whole, dtype)
MODELS = {
    "in shards": ("Llama", {"num_key_value_heads": 2}, "ForCausalLM", "ForCausalLM", ["q_proj", "down_proj"],
                  "model.norm.weight", torch.bfloat16),
    "a tied head": ("Llama", {"tie_word_embeddings": True}, "ForCausalLM", "ForCausalLM", ["q_proj"],
                    "lm_head.weight", torch.float32),
    "without the prefix of its class": ("Roberta", {}, "Model", "ForMaskedLM", ["query"],
                                        "lm_head.bias", torch.float32),
    "with the prefix of another class": ("Roberta", {}, "ForMaskedLM", "Model", ["query"],
                                         "embeddings.LayerNorm.bias", torch.float32),
    "transposed matrices": ("GPT2", {}, "Model", "LMHeadModel", ["c_attn", "c_fc"],
                            "transformer.ln_f.weight", torch.float32),
    "positions and a tied head": ("GPT2", {}, "LMHeadModel", "LMHeadModel", ["wpe", "c_attn"],
                                     "transformer.ln_f.weight", torch.float32),
    "renamed by transformers": ("Mixtral", {"num_local_experts": 3, "num_key_value_heads": 2},
                                "ForCausalLM", "ForCausalLM", ["q_proj", "gate_up_proj", "down_proj"],
                                "model.layers.1.mlp.gate.weight", torch.float32),
}  # fmt: skip


def outputs(model):
    found = model.eval()(torch.arange(2, 20)[None])
    return getattr(found, "logits", found[0])


def stored(folder):
    """File of weights -> its tensors by their names."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found[file.name] = {name: opened.get_tensor(name) for name in opened.keys()}
    return found


@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="the test extra is absent")
@pytest.mark.parametrize("name", MODELS)
def test_a_merged_folder_answers_as_the_live_model(name, tmp_path, monkeypatch):
    import transformers

    kind, settings, saved, trained, targets, whole, dtype = MODELS[name]
    torch.manual_seed(0)
    base, adapter, out = tmp_path / "base", tmp_path / "a.pth", tmp_path / "out"
    config = getattr(transformers, f"{kind}Config")(**SIZES, **settings)
    model = getattr(transformers, kind + saved)(config).to(dtype)
    model.save_pretrained(base, max_shard_size="10KB" if name == "in shards" else "1GB")
    (base / "tokenizer.json").write_text("{}")
    (base / "pytorch_model.bin").write_text("another form of the weights")
    (base / ".cache").mkdir()
    load = getattr(transformers, kind + trained).from_pretrained
    live = load(base, dtype=dtype).eval()
    rwkv_miss.inject(live, "miss", targets=targets, rank=4)
    live.get_parameter(whole).requires_grad_(True)
    # a head that the saved class lacks starts at random
    lacking = {n: p for n, p in live.named_parameters() if "lm_head" in n and saved == "Model"}
    for p in lacking.values():
        p.requires_grad_(True)
    with torch.no_grad():
        before = outputs(live)
        for p in live.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
        want = outputs(live)
    rwkv_miss.save_adapter(live, adapter)
    report = rwkv_miss.merge_file(base, adapter, out)

    with torch.no_grad():
        got = outputs(load(out, dtype="auto"))
    assert got.dtype == dtype and (want - before).abs().max() > 0.01
    close("logits", got, want, 1e-5 if dtype == torch.float32 else 0.01)
    files = {path.name for path in base.iterdir()} - {"pytorch_model.bin", ".cache"}
    assert {path.name for path in out.iterdir()} == files and (out / "tokenizer.json").read_text() == "{}"
    assert report.read[0] == f"{base} has more, which is left out: pytorch_model.bin"
    assert [f"{name}, " in report.read[-1] for name in lacking][:1] == [True] * bool(lacking)
    for file, tensors in stored(base).items():
        merged = stored(out)[file]
        assert [(n, t.shape, t.dtype) for n, t in merged.items() if n not in lacking] == [
            (n, t.shape, t.dtype) for n, t in tensors.items()
        ]
    assert (len(stored(out)) > 3) == (name == "in shards")
    check = check_merge(base, out, adapter)
    assert check.ok and len(check.changed) >= 2
    facts = describe(out)
    assert facts["kind"] == f"Hugging Face folder, {kind.lower()}" and facts["metadata"]["base"] == "base"
    with pytest.raises(rwkv_miss.UserError, match="is already a merge of"):
        rwkv_miss.merge_file(out, adapter, tmp_path / "twice")


@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="the test extra is absent")
def test_a_change_that_depends_on_the_whole_matrix_of_an_expert_is_refused(tmp_path):
    import transformers

    config = transformers.MixtralConfig(**SIZES, num_local_experts=2, num_key_value_heads=2)
    model = transformers.MixtralForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    rwkv_miss.inject(model, "dora", targets=["gate_up_proj"], rank=4)
    rwkv_miss.save_adapter(model, tmp_path / "a.pth")
    with pytest.raises(rwkv_miss.UserError, match="by dora depends on the whole matrix, of which .*w1"):
        rwkv_miss.merge_file(tmp_path / "base", tmp_path / "a.pth", tmp_path / "out")


# the rest needs no transformers


def folder(path, config=None, **tensors):
    """A folder with two files of weights, each with a matrix and a row of integers."""
    path.mkdir()
    names = {
        "a.weight": "model-1.safetensors",
        "b.weight": "model-2.safetensors",
        "rows": "model-2.safetensors",
    }
    tensors = {"a.weight": torch.ones(4, 6), "b.weight": torch.ones(6, 4), "rows": torch.arange(3)} | tensors
    for file in set(names.values()):
        save_file({n: tensors[n] for n in names if names[n] == file}, path / file, {"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (path / "config.json").write_text(json.dumps(config or {"model_type": "mine", "dtype": "float32"}))
    return path


@pytest.fixture
def adapter(tmp_path):
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(6, 4, False), "b": torch.nn.Linear(4, 6, False)})
    with torch.no_grad():
        for layer in model.values():
            layer.weight.fill_(1)
    rwkv_miss.inject(model, "miss", targets=["a", "b"], rank=2)
    with torch.no_grad():
        for layer in model.values():
            layer.miss.normal_()
    rwkv_miss.save_adapter(model, tmp_path / "a.pth")
    return tmp_path / "a.pth"


def test_another_dtype_is_named_by_the_configuration_and_a_pth_takes_the_folders_names(adapter, tmp_path):
    base = folder(tmp_path / "base", {"model_type": "mine", "text_config": {"torch_dtype": "float32"}})
    main(f"merge --base {base} --adapter {adapter} --out {tmp_path}/out --dtype fp16".split())
    tensors = {name: t for part in stored(tmp_path / "out").values() for name, t in part.items()}
    assert {name: t.dtype for name, t in tensors.items()} == {
        **dict.fromkeys(("a.weight", "b.weight"), torch.float16),
        "rows": torch.int64,
    }
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config == {"dtype": "float16", "model_type": "mine", "text_config": {"torch_dtype": "float16"}}
    rwkv_miss.merge_file(base, adapter, tmp_path / "m.pth", dtype="fp16")
    flat = torch.load(tmp_path / "m.pth", weights_only=True)
    assert flat.keys() == tensors.keys() and all(torch.equal(flat[name], tensors[name]) for name in flat)


def test_tensors_are_made_one_after_the_other_and_a_failure_leaves_nothing(adapter, tmp_path, monkeypatch):
    made, plain = [], merging.round_into

    def failing(out, key, *others):
        made.append(key)
        if key == "b.weight":
            assert any(path.suffix == ".tmp" and "out" in path.name for path in tmp_path.iterdir())
            raise OSError("the disk is gone")
        return plain(out, key, *others)

    monkeypatch.setattr(merging, "round_into", failing)
    base = folder(tmp_path / "base")
    with pytest.raises(OSError, match="the disk is gone"):
        rwkv_miss.merge_file(base, adapter, tmp_path / "out")
    assert made == ["a.weight", "b.weight"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "base"]


@pytest.mark.parametrize(
    "what, words",
    [
        ("full", "out holds mine; choose another name, or empty the folder"),
        ("into itself", "base is an input; choose another name"),
        ("m.safetensors", "m.safetensors is the name of a file; name a folder to write, or a .pth"),
        ("no shard", "model-2.safetensors is missing: model.safetensors.index.json names 2 files of weights"),
        ("pickles", "has neither .* but pytorch_model.bin; transformers' from_pretrained"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, r"quantised \(bitsandbytes\): .*"
         "python -m rwkv_miss merge --base UNQUANTISED --adapter .*a.pth --output .*out"),
        ("other names", "a.pth changes b, which .*base does not have, .* has tensors such as one.b.weight"),
        ("other shape", "does not fit a, "),
    ],
)  # fmt: skip
def test_what_is_refused_leaves_nothing(what, words, adapter, tmp_path):
    config = {"model_type": "mine", **(what if isinstance(what, dict) else {})}
    base, out = folder(tmp_path / "base", config), tmp_path / "out"
    if what == "full":
        out.mkdir()
        (out / "mine").write_text("x")
    elif what in ("into itself", "m.safetensors"):
        out = base if what == "into itself" else tmp_path / what
    elif what == "no shard":
        (base / "model-2.safetensors").unlink()
    elif what == "pickles":
        for file in base.glob("model*"):
            file.unlink()
        (base / "pytorch_model.bin").write_bytes(b"x")
    elif what in ("other names", "other shape"):
        for file in base.glob("model*"):
            file.unlink()
        tensors = {"other.a.weight": torch.ones(4, 6), "one.b.weight": torch.ones(4, 6)}
        if what == "other shape":
            tensors = {"a.weight": torch.ones(3, 7), "b.weight": torch.ones(5, 3)}
        save_file(tensors, base / "model.safetensors")
    with pytest.raises(rwkv_miss.UserError, match=words):
        rwkv_miss.merge_file(base, adapter, out)
    left = ["a.pth", "base", *(["out"] if what == "full" else [])]
    assert sorted(os.listdir(tmp_path)) == left


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "mine", "architectures": ["Mine"], "auto_map": {"AutoConfig": "mine.Mine"}},
        {"model_type": "llama", "architectures": []},
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "no such"},
        {"model_type": "llama", "architectures": ["pipeline"]},
    ],
    ids=["code of its own", "no class", "a setting that there is not", "no model"],
)
def test_a_strangers_configuration_runs_nothing_and_is_no_traceback(config, adapter, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    base = folder(tmp_path / "base", config)
    for file in base.glob("model*"):
        file.unlink()
    save_file({"other.a.weight": torch.ones(4, 6)}, base / "model.safetensors")
    (base / "mine.py").write_text(
        "import pathlib, transformers\n"
        f"pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
        "class Mine(transformers.PretrainedConfig): model_type = 'mine'\n"
    )
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # to: run the custom code?
    with pytest.raises(rwkv_miss.UserError, match="a.pth changes .*base does not have"):
        rwkv_miss.merge_file(base, adapter, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["a.pth", "base"]
