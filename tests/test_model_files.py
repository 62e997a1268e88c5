"""A model is the same in every form: a .pth, a trainer's file, safetensors, Hugging Face folders, shards."""

import functools
import json
import os
import pathlib
import re
import shutil

import pytest
import torch

from rwkv_miss import UserError, inject, merge_file, progress, read_checkpoint, read_metadata, save_adapter
from rwkv_miss.__main__ import describe, main
from rwkv_miss.extract import extract_base
from rwkv_miss.files.checkpoint import Arch, write_checkpoint
from rwkv_miss.files.identity import Identity
from rwkv_miss.files.model_files import (
    forget_readings,
    model_metadata,
    read_model,
    read_tensors,
    reading_once,
)
from rwkv_miss.merging.diff import diff_files
from rwkv_miss.merging.unmerge import check_merge
from src.data import recorded_tokenizer
from src.data.templates import load_template, recorded_template
from src.data.tokenizer import byte_names, load_tokenizer
from src.inference.load import load
from src.model import RWKV

from .conftest import make_arch, random_tensors

safetensors = pytest.importorskip("safetensors.torch", reason="the extra convert is absent")
ARCH = make_arch(7, n_layer=2, n_embd=128, head_size=64, vocab_size=259)
CONFIG = {"model_type": "rwkv7", "num_hidden_layers": 2, "head_dim": 64, "norm_eps": 1e-5}
IDS = torch.arange(14).reshape(2, 7) * 5 % 67
# words of a checkpoint's names in flash-linear-attention's, written down anew
FLA = {
    r"^emb\.": "model.embeddings.",
    r"^ln_out\.": "model.norm.",
    r"^head\.": "lm_head.",
    r"^blocks\.(\d+)\.": r"model.layers.\1.",
    r"\.ln0\.": ".pre_norm.",
    r"\.ln1\.": ".attn_norm.",
    r"\.ln2\.": ".ffn_norm.",
    r"\.att\.ln_x\.": ".attn.g_norm.",
    r"\.att\.(r)eceptance\.|\.att\.(k)ey\.|\.att\.(v)alue\.|\.att\.(o)utput\.": r".attn.\1\2\3\4_proj.",
    r"\.att\.([wavg])1$": r".attn.\1_lora.lora.0.weight",
    r"\.att\.([wavg])2$": r".attn.\1_lora.lora.2.weight",
    r"\.att\.([wav])0$": r".attn.\1_lora.lora.2.bias",
    r"\.att\.": ".attn.",
}
RESIDUAL = [f"blocks.0.att.v{i}" for i in range(3)]


def as_official(name):
    return name if name == "head.weight" else f"rwkv7.{name}"


def as_fla(tensors):
    stored = {}
    for name, tensor in tensors.items():
        if name in RESIDUAL:
            continue
        new = functools.reduce(lambda text, rule: re.sub(*rule, text), FLA.items(), name)
        if new.endswith((".lora.0.weight", ".lora.2.weight")):
            tensor = tensor.t().contiguous()
        elif not new.endswith("r_k") and ".x_" not in new.replace("ffn.x_k", ""):
            tensor = tensor.flatten() if tensor.dim() == 3 else tensor
        stored[new] = tensor
    return stored


def save_folder(path, stored, shards=1, config=CONFIG):
    """Tensors as transformers saves them, in one file or in several."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    if shards == 1:
        safetensors.save_file(stored, path / "model.safetensors", {"format": "pt"})
        return path
    place = {
        name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(sorted(stored))
    }
    for file in set(place.values()):
        part = {name: stored[name] for name in stored if place[name] == file}
        safetensors.save_file(part, path / file, {"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    return path


def wrapped(tensors, prefix=""):
    """A trainer's file, with an optimizer whose groups share their betas."""
    a, b = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = torch.optim.AdamW([{"params": [a]}, {"params": [b]}])
    (a + b).sum().backward()
    optimizer.step()
    return {
        "epoch": 3,
        "state_dict": {prefix + name: tensor for name, tensor in tensors.items()},
        "optimizer_states": [optimizer.state_dict()],
        "loops": {"fit": {"done": (1, 2)}},
    }


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """Form -> path of the same model."""
    folder = tmp_path_factory.mktemp("forms")
    tensors = random_tensors(ARCH, torch.bfloat16)
    official = {as_official(name): tensor for name, tensor in tensors.items()}
    write_checkpoint(folder / "m.pth", tensors.items())
    torch.save(wrapped(tensors, "_forward_module.model."), folder / "lightning.ckpt")
    torch.save({f"module._orig_mod.{name}": t for name, t in tensors.items()}, folder / "compiled.pth")
    torch.save({"model": tensors, "iter": 5}, folder / "model.pt", _use_new_zipfile_serialization=False)
    safetensors.save_file(tensors, folder / "m.safetensors")
    return {
        "pth": folder / "m.pth",
        "lightning": folder / "lightning.ckpt",
        "compiled": folder / "compiled.pth",
        "legacy": folder / "model.pt",
        "safetensors": folder / "m.safetensors",
        "official": save_folder(folder / "official", official),
        "sharded": save_folder(folder / "sharded", official, 3),
        "fla": save_folder(folder / "fla", as_fla(tensors)),
        "fla sharded": save_folder(folder / "fla-sharded", as_fla(tensors), 2),
    }


FORMS = ("lightning", "compiled", "legacy", "safetensors", "official", "sharded", "fla", "fla sharded")


def step(path, dtype):
    """(logits, the gradients of a MiSS adapter after one backward)."""
    model = RWKV.load(path, dtype)
    inject(model, method="miss", rank=8)
    x, _ = model.features(IDS)
    model.loss(x.flatten(0, 1), IDS.roll(-1, 1).flatten()).backward()
    with torch.no_grad():
        logits = model(IDS)[0]
    return logits, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_logits_and_a_training_step_are_the_same_bits(forms, dtype):
    logits, grads = step(forms["pth"], dtype)
    assert grads and all(grad.abs().max() > 0 for grad in grads.values())
    for form in FORMS:
        got, got_grads = step(forms[form], dtype)
        assert torch.equal(got, logits), form
        assert got_grads.keys() == grads.keys()
        assert all(torch.equal(got_grads[name], grad) for name, grad in grads.items()), form


def test_tensors_names_shapes_and_fingerprint_are_the_same(forms):
    """Up to the value residual of block 0, which flash-linear-attention's layout has no place for."""
    want, fingerprint = read_checkpoint(forms["pth"]), Identity(forms["pth"]).fingerprint
    for form in FORMS:
        found = read_tensors(forms[form])
        kept = [name for name in want if "fla" not in form or name not in RESIDUAL]
        assert list(found) == kept, form
        assert all(torch.equal(found[name], want[name]) for name in kept)
        assert all(found[name].shape == want[name].shape for name in kept)
        assert (Identity(forms[form]).fingerprint == fingerprint) is ("fla" not in form), form
    with torch.device("meta"):
        assert list(want) == [name for name, _ in RWKV(ARCH).named_parameters()]


def mapped_from(tensor):
    """Name of the file whose mapping a tensor is in, "" for other memory."""
    for line in pathlib.Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
        if first <= tensor.data_ptr() < last:
            return os.path.basename(line.split(maxsplit=5)[5]) if len(line.split()) > 5 else ""
    return ""


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="NO /proc: mappings are not seen")
def test_nothing_is_copied_but_maps_that_are_turned_around(forms, all_mapped):
    for form in ("official", "sharded", "fla", "safetensors", "lightning"):
        model = RWKV.load(forms[form])
        copied = {name for name, p in model.named_parameters() if "." not in mapped_from(p)}
        turned = {name for name in copied if re.fullmatch(r"blocks\.\d\.att\.[wavg][12]", name)}
        assert copied == turned and len(turned) == (14 if form == "fla" else 0), form
        assert all(p.is_contiguous() for p in model.parameters())


def test_a_kept_reading_is_of_the_file_as_it_is(tmp_path):
    """A changed file is read again; what a caller takes out is there for the next one."""
    path = tmp_path / "m.pth"
    with reading_once():
        for value in (1.0, 2.0):
            torch.save({"x": torch.tensor([value])}, path)
            first = read_tensors(path)
            assert first["x"].item() == value
            assert read_tensors(path)["x"] is first.pop("x")
        forget_readings()
        assert read_tensors(path)["x"] is not read_tensors(path)["x"]
        path.unlink()
        with pytest.raises(UserError, match="m.pth does not exist"):
            read_tensors(path)


def test_what_is_taken_off_is_said_once(forms, capsys):
    progress._print_note.cache_clear()
    RWKV.load(forms["lightning"])
    RWKV.load(forms["lightning"])
    err = capsys.readouterr().err
    assert err.count("note: ") == 2
    assert "the tensors are those under 'state_dict'; left out: epoch," in err
    assert "_forward_module.model. is taken off the names of the tensors" in err
    for form in ("pth", "official", "fla", "safetensors"):
        RWKV.load(forms[form])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["state_dict", "model_state_dict", "model", "module"])
def test_the_names_under_which_trainers_put_a_model(tmp_path, name):
    torch.save({name: {"emb.weight": torch.ones(2)}, "epoch": 3}, tmp_path / "m.pth")
    tensors, _, notes, _ = read_model(tmp_path / "m.pth")
    assert list(tensors) == ["emb.weight"]
    assert notes == [f"{tmp_path}/m.pth: the tensors are those under {name!r}; left out: epoch"]


def adapter_of(path, out, parts=""):
    model = RWKV.load(path, torch.float32)
    inject(model, method="miss", rank=8, train_parts=parts)
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.02 * torch.randn_like(p)
    save_adapter(model, out)
    return out


def test_an_adapter_of_one_form_fits_all_that_keep_every_tensor(forms, tmp_path):
    adapters = {form: adapter_of(forms[form], tmp_path / f"{form}.pth") for form in ("pth", "sharded", "fla")}
    assert merge_file(forms["pth"], adapters["pth"], tmp_path / "want.pth").notes() == []
    want = (tmp_path / "want.pth").read_bytes()
    for form in ("lightning", "legacy", "sharded"):
        report = merge_file(forms[form], adapters["sharded"], tmp_path / "got.pth")
        assert "the merged file is a plain .pth with RWKV's names" in report.notes()[0]
        got, kept = read_checkpoint(tmp_path / "got.pth"), read_checkpoint(tmp_path / "want.pth")
        assert list(got) == list(kept) and all(torch.equal(got[name], kept[name]) for name in kept), form
        assert check_merge(forms[form], tmp_path / "want.pth", [adapters["pth"]]).ok
    assert want == (tmp_path / "want.pth").read_bytes()
    assert read_metadata(adapters["sharded"])["base"] == "sharded"
    # block 0's value residual is not in the folder, so that its fingerprint is another one
    merge_file(forms["fla"], adapters["fla"], tmp_path / "got.pth")
    got, kept = read_checkpoint(tmp_path / "got.pth"), read_checkpoint(tmp_path / "want.pth")
    assert kept.keys() - got.keys() == set(RESIDUAL)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in got.items())
    with pytest.raises(
        UserError, match=r"on another base \(fla\), not on .*m.pth; one .* no value residual in block 0"
    ):
        merge_file(forms["pth"], adapters["fla"], tmp_path / "got.pth")
    merge_file(forms["pth"], adapters["fla"], tmp_path / "got.pth", force=True)


@pytest.mark.parametrize("form", ["official", "sharded", "fla", "fla sharded"])
def test_a_merge_into_a_folder_has_its_layout_and_the_tensors_of_the_pth(form, forms, tmp_path):
    adapter = adapter_of(forms[form], tmp_path / "a.pth", "ln")
    for out in ("want.pth", "got"):
        merge_file(forms[form], adapter, tmp_path / out)
    before, want, got = (
        read_tensors(path) for path in (forms[form], tmp_path / "want.pth", tmp_path / "got")
    )
    assert list(got) == list(want) and all(torch.equal(got[name], want[name]) for name in want)
    assert any(not torch.equal(got[name], before[name]) for name in want if "ln_x" in name)
    assert check_merge(forms[form], tmp_path / "got", adapter).ok
    assert model_metadata(tmp_path / "got") == read_metadata(tmp_path / "want.pth")
    assert describe(tmp_path / "got")["kind"] == describe(forms[form])["kind"]
    assert sorted(os.listdir(tmp_path / "got")) == sorted(os.listdir(forms[form]))
    adapter_of(forms[form], adapter, "state" if form == "official" else "time")
    if form != "sharded":
        words = "att.time_state" if form == "official" else r"att.w[12], "
        with pytest.raises(UserError, match=rf"{words}.* can't be put into .*; merge into a .pth"):
            merge_file(forms[form], adapter, tmp_path / "other")


def test_other_programs_read_them_too(forms, tmp_path, capsys):
    adapter = adapter_of(forms["pth"], tmp_path / "a.pth")
    merge_file(forms["pth"], adapter, tmp_path / "merged.pth")
    for form in ("official", "compiled"):
        diff = diff_files(forms[form], tmp_path / "merged.pth", tmp_path / f"{form}.pth", 8)
        assert len(diff.linears) == 12
        model, tokenizer = load(forms[form], adapter, "bytes", accelerator="cpu")
        assert model(IDS)[0].shape == (2, 7, 259)
    facts = describe(forms["fla sharded"])
    assert facts["kind"] == "Hugging Face folder, layout fla"
    assert facts["tensors"] == len(read_tensors(forms["fla"]))
    assert Arch.from_dict(facts["arch"]).n_layer == 2
    main(["inspect", str(forms["official"])])
    assert "official: Hugging Face folder, layout official" in capsys.readouterr().out


def test_a_folder_is_hashed_once_and_again_where_a_shard_changes(forms, tmp_path, monkeypatch):
    from rwkv_miss.files import identity

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(identity, "REMEMBERED", 1)
    monkeypatch.setattr(identity, "SETTLED", -1)
    folder = shutil.copytree(forms["sharded"], tmp_path / "folder")
    computed = []
    real = identity.fingerprint
    monkeypatch.setattr(identity, "fingerprint", lambda *a: computed.append(1) or real(*a))
    first = Identity(folder).fingerprint
    assert Identity(folder).fingerprint == first and len(computed) == 1
    shard = folder / "model-00002-of-00003.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert Identity(folder).fingerprint != first and len(computed) == 2


# refusals


def one_tensor(name):
    return random_tensors(ARCH) | {name: torch.ones(4)}


@pytest.mark.parametrize(
    "name, words",
    [
        ("blocks.1.ffn.s_emb.weight", "belongs to RWKV-7a"),
        ("blocks.1.ffn.s_emb_x.weight", "belongs to RWKV-7a"),
        ("blocks.0.ffn.s0", "belongs to RWKV-7a"),
        ("blocks.0.qkv.qq.weight", "belongs to RWKV-7b"),
        ("blocks.1.ffn.enn.weight", "belongs to a preview of RWKV-8"),
        ("blocks.1.rosa_q.weight", r"belongs to RWKV-8 \(ROSA"),
        ("blocks.1.att.ROSA.emb", r"belongs to RWKV-8 \(ROSA"),
    ],
)
def test_newer_architectures_are_refused_by_name(tmp_path, name, words):
    tensors = one_tensor(name)
    if "qkv" in name:
        tensors["blocks.0.ffn.s_emb.weight"] = torch.ones(4)  # 7b has what 7a has
    torch.save({"state_dict": {f"model.{key}": t for key, t in tensors.items()}}, tmp_path / "m.pth")
    for read in (RWKV.load, describe, lambda path: merge_file(path, path, tmp_path / "out.pth")):
        with pytest.raises(
            UserError, match=f"{re.escape(name)} {words}.*, which is not supported; RWKV-6 and"
        ):
            read(tmp_path / "m.pth")


def test_a_model_inside_another_one_is_offered_and_extracted(tmp_path, capsys):
    tensors = random_tensors(ARCH)
    whole = {f"module.rwkv.{name}": t for name, t in tensors.items()} | {"module.vit.a": torch.ones(3)}
    torch.save({"state_dict": whole, "epoch": 1}, tmp_path / "vision.ckpt")
    with pytest.raises(UserError, match=r"python -m rwkv_miss extract-base .*vision.ckpt BASE.pth"):
        RWKV.load(tmp_path / "vision.ckpt")
    main(["extract-base", str(tmp_path / "vision.ckpt"), str(tmp_path / "base.pth")])
    said = capsys.readouterr().out
    assert "base.pth: RWKV-7, 2 layers" in said and "1 of module." in said
    got = read_checkpoint(tmp_path / "base.pth")
    assert list(got) == list(tensors) and all(torch.equal(got[name], t) for name, t in tensors.items())
    for prefix, words in (
        ("llm.", "no tensors that begin with llm.; there are: "),
        ("module.vit.", "no RWKV"),
    ):
        with pytest.raises(UserError, match=words):
            extract_base(tmp_path / "vision.ckpt", tmp_path / "x.pth", prefix)
    assert not (tmp_path / "x.pth").exists()
    others = {name: torch.ones(1) for name in ("eye", "blocks.0.a", "model.blocks.0.a")}
    torch.save({f"llm.{name}": t for name, t in tensors.items()} | others, tmp_path / "other.pth")
    extract_base(tmp_path / "other.pth", tmp_path / "base2.pth", "llm.")
    assert (tmp_path / "base2.pth").read_bytes() == (tmp_path / "base.pth").read_bytes()
    with pytest.raises(UserError, match="is there already"):
        extract_base(tmp_path / "other.pth", tmp_path / "base.pth", "llm.")


@pytest.mark.parametrize("prefixes", [("", "_orig_mod."), ("model.", "_orig_mod."), ("module.", "")])
def test_two_models_of_one_name_inside_another_one_are_refused(tmp_path, prefixes):
    tensors = random_tensors(ARCH)
    whole = {f"{prefix}rwkv.{name}": t for prefix in prefixes for name, t in tensors.items()}
    torch.save(whole, tmp_path / "m.pth")
    with pytest.raises(UserError, match="m.pth has rwkv.emb.weight twice, with and without a prefix such as"):
        extract_base(tmp_path / "m.pth", tmp_path / "base.pth")
    assert not (tmp_path / "base.pth").exists()


@pytest.mark.parametrize(
    "value, words",
    [
        (
            {"state_dict": {"emb.weight": torch.ones(2)}, "model": {"emb.weight": torch.ones(2)}},
            "under 'state_dict' and 'model'",
        ),
        ({"state_dict": {"a": torch.ones(2), "b": 3}}, "holds a int under 'b'"),
        ({"weights": {"a": torch.ones(2)}}, "holds a dict under 'weights'"),
        ({"emb.weight": torch.ones(2), "model": {"a": torch.ones(2)}}, "holds a dict under 'model'"),
        (
            {"emb.weight": torch.ones(2), "model.emb.weight": torch.ones(2), "blocks.0.a": torch.ones(2)},
            "has emb.weight twice, with and without a prefix such as model.",
        ),
        ({"state_dict": {"a": torch.ones(2)}, "hyper": re.compile("x")}, "could run code"),
    ],
)
def test_what_is_not_clear_is_refused(tmp_path, value, words):
    torch.save(value, tmp_path / "m.pth")
    with pytest.raises(UserError, match=words):
        read_model(tmp_path / "m.pth")


def test_other_models_keep_their_names(tmp_path):
    torch.save({"model.layers.0.q.weight": torch.ones(2, 2), "module.x": torch.ones(1)}, tmp_path / "m.pth")
    assert list(read_model(tmp_path / "m.pth").tensors) == ["model.layers.0.q.weight", "module.x"]
    assert read_model(tmp_path / "m.pth").notes == []


@pytest.mark.parametrize(
    "form, file", [("fla", "model.safetensors"), ("sharded", "model-00001-of-00003.safetensors")]
)
def test_a_file_of_a_folder_is_not_taken_for_all_of_it(forms, form, file):
    with pytest.raises(
        UserError, match=f"{file} belongs to a Hugging Face folder; give the folder, {forms[form]}"
    ):
        RWKV.load(forms[form] / file)


def damaged(folder, what):
    weights = folder / "model-00001-of-00003.safetensors"
    index = folder / "model.safetensors.index.json"
    if what == "no config":
        (folder / "config.json").unlink()
    elif what == "no shard":
        weights.unlink()
    elif what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif what == "outside":
        index.write_text(json.dumps({"weight_map": {"a": "../m.pth"}}))
    elif what == "no index":
        index.unlink()
    elif what == "twice":
        shutil.copy(weights, folder / "model-00002-of-00003.safetensors")
    elif what == "other names":
        for file in folder.glob("*.safetensors"):
            file.unlink()
        safetensors.save_file({"gpt.a": torch.ones(2)}, folder / "model.safetensors")
    else:
        (folder / "config.json").write_text(json.dumps(CONFIG | what))


@pytest.mark.parametrize(
    "what, words",
    [
        ("no config", "is a folder without config.json"),
        ("no shard", "model-00001-of-00003.safetensors is missing: .* names 3 files of weights"),
        ("truncated", "model-00001-of-00003.safetensors is truncated or damaged"),
        ("outside", "no table of files in this folder"),
        ("no index", "has neither model.safetensors nor model.safetensors.index.json"),
        ("twice", "is in two of its files"),
        ("other names", r"tensors such as 'gpt.a'; expected are the names of the official layout"),
        ({"model_type": "llama"}, "is a folder of 'llama', expected rwkv7"),
        ({"num_hidden_layers": 4}, "has 2 layers, and its config.json says num_hidden_layers 4"),
        ({"layer_norm_epsilon": 1e-6}, "has layer_norm_epsilon 1e-06; RWKV's is 1e-05"),
    ],
)
def test_damaged_folders(forms, tmp_path, what, words):
    folder = shutil.copytree(forms["sharded"], tmp_path / "folder")
    damaged(folder, what)
    with pytest.raises(UserError, match=words):
        RWKV.load(folder)


# other files of the weights' folder


def with_files(folder, **files):
    """A model's folder with more files, by their names with _ for the dot."""
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


def fast(pieces, form):
    """A tokenizer.json with these pieces by id: named by bytes or by their texts, in a table or a list."""
    if form == "list":
        vocab = [[pieces.get(i, b"").decode("utf-8", "replace"), 0.0] for i in range(max(pieces) + 1)]
        return {"version": "1.0", "model": {"type": "Unigram", "vocab": vocab}}
    names = {token: "".join(map(byte_names().__getitem__, piece)) for token, piece in pieces.items()}
    return {
        "version": "1.0",
        "model": {"type": "BPE", "vocab": {n: t for t, n in names.items()}, "merges": []},
    }


def test_a_folder_with_worlds_vocabulary_has_world(tmp_path, monkeypatch):
    """The 256 bytes stand for World here, which takes a second to read."""
    lines = "".join(f"{byte + 1} {bytes([byte])!r} 1\n" for byte in range(256))
    with_files(tmp_path, world__txt=lines)
    world = load_tokenizer(str(tmp_path / "world.txt"), 257)
    known = {"world": world}
    monkeypatch.setattr(recorded_tokenizer, "WORLD_IDS", 256)
    monkeypatch.setattr(
        recorded_tokenizer,
        "load_tokenizer",
        lambda spec, *rest: known.get(spec) or load_tokenizer(spec, *rest),
    )
    pieces = {token: piece for token, piece in world.table.items() if piece}
    for name, content in (
        ("tokenizer__json", fast(pieces, "table")),
        ("tokenizer__json", fast(pieces, "list")),
        ("rwkv_vocab_v20230424__txt", lines),
    ):
        with_files(tmp_path, **{name: content})
        assert recorded_tokenizer.folder_tokenizer(tmp_path, 257) is world
    moved = {token + 1: piece for token, piece in pieces.items()}
    (tmp_path / "rwkv_vocab_v20230424.txt").unlink()
    with_files(tmp_path, tokenizer__json=fast(moved, "table"))
    assert not recorded_tokenizer._has_vocabulary_of(world, str(tmp_path / "tokenizer.json"))


def test_a_folder_with_another_vocabulary_has_that_one(forms, tmp_path, capsys):
    progress._print_note.cache_clear()
    folder = shutil.copytree(forms["official"], tmp_path / "folder")
    pieces = {0: b"<end>"} | {i + 1: bytes([i]) for i in range(256)}
    with_files(
        folder,
        tokenizer__json=fast(pieces, "table"),
        tokenizer_config__json={"eos_token": {"content": "<end>"}},
    )
    _, tokenizer = load(folder, None, accelerator="cpu")
    assert tokenizer.name == str(folder / "tokenizer.json") and tokenizer.eod == (0,)
    assert capsys.readouterr().err.count("tokenizer.json, whose vocabulary is not World's") == 1
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="vocabulary of 259 is not the World one"):
        load(folder, None, accelerator="cpu")
    assert load(folder, None, "bytes", accelerator="cpu")[1].name == "bytes"
    with_files(folder, tokenizer__json={"model": 3})
    with pytest.raises(UserError, match="tokenizer.json"):
        load(folder, None, accelerator="cpu")


JINJA = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize(
    "file, content",
    [
        ("chat_template.jinja", JINJA),
        ("tokenizer_config.json", {"chat_template": JINJA}),
        ("tokenizer_config.json", {"chat_template": [{"name": "default", "template": JINJA}]}),
    ],
)
def test_a_folders_chat_template_is_named_and_not_taken(forms, tmp_path, capsys, file, content):
    progress._print_note.cache_clear()
    folder = shutil.copytree(forms["official"], tmp_path / "folder")
    tokenizer = load_tokenizer("bytes", 256)
    assert recorded_template("auto", tokenizer, None, folder).name == "rwkv"
    assert capsys.readouterr().err == ""
    with_files(folder, **{file.replace(".", "__"): content})
    for _ in range(2):
        assert recorded_template("auto", tokenizer, None, folder).name == "rwkv"
    err = capsys.readouterr().err
    assert err.count("note: ") == 1 and f"--template {folder / file} takes it" in err
    taken = recorded_template(str(folder / file), tokenizer, None, folder)
    assert taken.record == JINJA and capsys.readouterr().err == ""


def test_a_tokenizer_config_without_a_template_is_none(tmp_path):
    with_files(tmp_path, tokenizer_config__json={"chat_template": 3})
    with pytest.raises(UserError, match="tokenizer_config.json has no chat_template"):
        load_template(str(tmp_path / "tokenizer_config.json"))
