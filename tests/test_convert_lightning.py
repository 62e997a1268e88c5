"""Packages of rwkv_lightning_cuda: alpha / r folded into D and out again without losing a bit, its loader's
checks, and refusals by name.
"""

import hashlib
import json
import pickletools
import re
import zipfile

import pytest
import torch

import rwkv_miss
from rwkv_miss.convert import Hints, convert
from rwkv_miss.convert.lightning import TARGETS, canonical
from rwkv_miss.files.checkpoint import read_checkpoint, read_metadata, write_checkpoint

from .conftest import close, make_arch, random_tensors
from .test_convert_peft import logits, merged, rwkv, saved

pytestmark = pytest.mark.usefixtures("in_its_folder")
RANK, BASE = 5, "ab" * 32


def package(folder, alpha=5.0, dtype=torch.float16, seed=0, manifest=(), tensors=()):
    """A folder as its trainer's save_package() writes it, for the RWKV-7 of the tests: every linear of two
    blocks.
    """
    arch = make_arch(7)
    widths = {
        "att": (arch.n_embd, arch.n_embd),
        "ffn.key": (arch.dim_ffn, arch.n_embd),
        "ffn.value": (arch.n_embd, arch.dim_ffn),
    }
    torch.manual_seed(seed)
    D, targets = {}, []
    for layer in range(arch.n_layer):
        for target in TARGETS:
            out, width = widths[target if target in widths else "att"]
            name = f"blocks.{layer}.{target}.weight.D"
            D[name] = (0.1 * torch.randn(out, RANK)).to(dtype)
            targets.append(
                dict(name=name, layer=layer, target=f"{target}.weight", in_features=width, shape=[out, RANK])
            )
    facts = {
        "format_version": 1,
        "kind": "inference_adapter",
        "method": "miss",
        "dtype": str(dtype).removeprefix("torch."),
        "layout": "modulo_rank_zero_pad",
        "rank": RANK,
        "alpha": alpha,
        "scale": float(torch.tensor(alpha) / RANK),
        "base_fingerprint": BASE,
        "targets": targets,
        **dict(manifest),
    }
    content = hashlib.sha256(
        canonical(facts).encode()
        + b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in D.values())
    )
    folder.mkdir()
    (folder / "adapter.json").write_text(canonical({**facts, "content_version": content.hexdigest()}) + "\n")
    write_checkpoint(folder / "adapter.pth", {**D, **dict(tensors)}.items())
    return D, facts


@pytest.mark.parametrize("alpha", [5.0, 16.0, 0.3, -7.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_package_is_read_merged_and_written_again(alpha, dtype, tmp_path):
    D, facts = package(tmp_path / "theirs", alpha, dtype)
    convert(tmp_path / "theirs", tmp_path / "a.pth", "native")
    base = {name: t.double() for name, t in rwkv(7).state_dict().items()}
    for name, d in D.items():  # W' = W + scale D P, their formula, in float64
        width = base[name.removesuffix(".D")].shape[1]
        base[name.removesuffix(".D")] += facts["scale"] * d.double()[:, torch.arange(width) % RANK]
    want = rwkv(7)
    want.load_state_dict(base)
    close("merged", merged(7, tmp_path / "a.pth"), logits(want), 2e-6)
    done = convert(tmp_path / "a.pth", tmp_path / "back", "rwkv-lightning")
    assert done.notes == []
    assert (tmp_path / "back" / "adapter.json").read_bytes() == (
        tmp_path / "theirs" / "adapter.json"
    ).read_bytes()
    again = read_checkpoint(tmp_path / "back" / "adapter.pth")
    assert list(again) == list(D)
    assert all(torch.equal(again[name], D[name]) and again[name].dtype == dtype for name in D)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_value_in_half_precision_comes_back(dtype):
    """Folded into fp32 and taken out, the sum of two roundings of 2^-24 is far below half a step of fp16 or
    bf16.
    """
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    # values that the loader of rwkv_lightning takes, and fp32 has room for
    every = every[(every == 0) | ((every.float().abs() > 1e-30) & (every.float().abs() <= 65504))]
    assert len(every) > 29000
    for scale in [1 / 3, 0.1, 7 / 16, 1.0, 3.7, 128.0, 1e-4, -0.3]:
        scale = float(torch.tensor(scale))
        assert torch.equal(((every.float() * scale) / scale).to(dtype), every), scale


def test_a_native_adapter_becomes_a_package_for_its_base(tmp_path):
    model = saved(7, "miss", {})
    with pytest.raises(rwkv_miss.UserError, match="SHA-256 the package names; give that file: --base"):
        convert(tmp_path / "a.pth", tmp_path / "out", "rwkv-lightning")
    write_checkpoint(tmp_path / "base.pth", rwkv(7).state_dict().items())
    done = convert(
        tmp_path / "a.pth", tmp_path / "out", "rwkv-lightning", Hints(base=str(tmp_path / "base.pth"))
    )
    lost = float(re.match(r"rounding D to float16 lost (\S+) of it", done.notes[0])[1])
    assert 2**-11 / 12**0.5 < lost < 2**-10 / 12**0.5, (
        "steps of fp16 are 2^-11 to 2^-10 of a number, and errors uniform"
    )
    manifest = json.loads((tmp_path / "out" / "adapter.json").read_text())
    assert manifest["base_fingerprint"] == hashlib.sha256((tmp_path / "base.pth").read_bytes()).hexdigest()
    assert manifest["scale"] == 1.0 and manifest["alpha"] == manifest["rank"] == 7
    first = manifest["targets"][0]
    assert first == {
        "name": "blocks.0.att.receptance.weight.D",
        "layer": 0,
        "target": "att.receptance.weight",
        "in_features": 48,
        "shape": [48, 7],
    }
    D = read_checkpoint(tmp_path / "out" / "adapter.pth")
    miss = read_checkpoint(tmp_path / "a.pth")
    assert len(D) == 12
    assert all(torch.equal(d, miss[name.replace(".weight.D", ".miss")].t().half()) for name, d in D.items())
    convert(tmp_path / "out", tmp_path / "b.pth", "native")
    close("rounded to fp16", merged(7, tmp_path / "b.pth"), logits(model), 3e-3)

    write_checkpoint(tmp_path / "other.pth", random_tensors(make_arch(7), seed=9).items())
    with pytest.raises(
        rwkv_miss.UserError, match="other.pth is another model than the package's: its SHA-256"
    ):
        convert(
            tmp_path / "out", tmp_path / "again", "rwkv-lightning", Hints(base=str(tmp_path / "other.pth"))
        )


@pytest.mark.parametrize("options", [{"scale": "sqrt"}, {"mini_r": 4}])
def test_what_folds_into_d_is_folded(options, tmp_path):
    model = saved(7, "miss", options)
    write_checkpoint(tmp_path / "base.pth", rwkv(7).state_dict().items())
    convert(tmp_path / "a.pth", tmp_path / "out", "rwkv-lightning", Hints(base=str(tmp_path / "base.pth")))
    convert(tmp_path / "out", tmp_path / "b.pth", "native")
    close("rounded to fp16", merged(7, tmp_path / "b.pth"), logits(model), 3e-3)


@pytest.mark.parametrize(
    "version,method,options,message",
    [
        (7, "lora", {}, "MiSS only, this adapter is lora"),
        (6, "miss", {}, "belongs to RWKV-6"),
        (7, "miss", {"layout": "contiguous"}, "no layout=contiguous"),
        (7, "miss", {"shards": "balanced"}, "no shards=balanced"),
        (7, "miss", {"magnitude": True}, "no magnitude=True"),
        (7, "miss", {"expand": True}, "no expand=True"),
        (7, "miss", {"rank_map": {"ffn": 3}}, "one rank for all linears, up to 1024; this adapter has 3, 7"),
        (7, "miss", {"targets": ["head"]}, "this adapter changes head"),
        (7, "miss", {"train_parts": "ln"}, r"blocks\.0\.ln0\.weight is trained as a whole"),
    ],
)
def test_what_a_package_has_no_place_for(version, method, options, message, tmp_path):
    saved(version, method, options)
    write_checkpoint(tmp_path / "base.pth", rwkv(version).state_dict().items())
    with pytest.raises(rwkv_miss.UserError, match=f"{message}.*(merge|--to)"):
        convert(
            tmp_path / "a.pth", tmp_path / "out", "rwkv-lightning", Hints(base=str(tmp_path / "base.pth"))
        )
    assert not (tmp_path / "out").exists()


def test_values_beyond_fp16_are_refused(tmp_path):
    saved(7, "miss", {})
    tensors, metadata = read_checkpoint(tmp_path / "a.pth"), read_metadata(tmp_path / "a.pth")
    write_checkpoint(tmp_path / "a.pth", {name: t * 1e7 for name, t in tensors.items()}.items(), metadata)
    write_checkpoint(tmp_path / "base.pth", rwkv(7).state_dict().items())
    with pytest.raises(rwkv_miss.UserError, match="blocks.0.att.receptance has values beyond fp16's largest"):
        convert(
            tmp_path / "a.pth", tmp_path / "out", "rwkv-lightning", Hints(base=str(tmp_path / "base.pth"))
        )


def embed(path, manifest):
    """The manifest inside a .pth, where newer versions have it."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/miss.json", json.dumps(manifest))


def test_one_file_with_its_manifest_inside(tmp_path):
    D, _ = package(tmp_path / "theirs", 16.0)
    manifest = json.loads((tmp_path / "theirs" / "adapter.json").read_text())
    convert(tmp_path / "theirs", tmp_path / "a.pth", "native")
    with pytest.raises(rwkv_miss.UserError, match="without its manifest; give the folder"):
        convert(tmp_path / "theirs" / "adapter.pth", tmp_path / "b.pth", "native")
    embed(tmp_path / "theirs" / "adapter.pth", manifest)
    (tmp_path / "theirs" / "adapter.pth").rename(tmp_path / "adapter-final.pth")
    convert(tmp_path / "adapter-final.pth", tmp_path / "b.pth", "native")
    first, second = read_checkpoint(tmp_path / "a.pth"), read_checkpoint(tmp_path / "b.pth")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# opcodes that rwkv_lightning's parser of pickles knows
OPCODES = """PROTO EMPTY_DICT MARK BINPUT LONG_BINPUT BINGET LONG_BINGET BINUNICODE GLOBAL BININT1 BININT2
BININT LONG1 LONG4 TUPLE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 NEWTRUE NEWFALSE BINPERSID REDUCE SETITEM SETITEMS
BUILD STOP""".split()


def loaded(path):
    """(manifest, D by its names) with the checks of its load_package() for one file."""
    with zipfile.ZipFile(path) as archive:
        assert all(record.compress_type == zipfile.ZIP_STORED for record in archive.infolist())
        assert archive.getinfo("archive/miss.json").file_size <= 8 << 20
        manifest = json.loads(archive.read("archive/miss.json"))
        opcodes = {opcode.name for opcode, _, _ in pickletools.genops(archive.read("archive/data.pkl"))}
    assert opcodes <= set(OPCODES), opcodes - set(OPCODES)
    D = torch.load(path, weights_only=True)
    fixed = {"format_version": 1, "method": "miss", "layout": "modulo_rank_zero_pad"}
    assert fixed.items() <= manifest.items() and manifest["kind"] == "inference_adapter"
    assert "tensor_source" not in manifest and 0 < manifest["rank"] <= 1024
    assert len(D) == len(manifest["targets"]) and len(manifest["base_fingerprint"]) == 64
    named = {field: value for field, value in manifest.items() if field != "content_version"}
    content = hashlib.sha256(canonical(named).encode())
    for target in manifest["targets"]:
        name = f"blocks.{target['layer']}.{target['target']}.D"
        assert target["name"] == name and list(D[name].shape) == target["shape"]
        assert target["target"].removesuffix(".weight") in TARGETS and target["shape"][1] == manifest["rank"]
        assert str(D[name].dtype) == f"torch.{manifest['dtype']}" and 0 < target["in_features"] <= 1 << 20
        assert D[name].isfinite().all() and D[name].abs().max() <= 65504
        content.update(D[name].view(torch.uint8).numpy().tobytes())
    assert manifest["content_version"] == content.hexdigest()
    return manifest, D


def test_one_file_is_written_as_its_page_uploads_it(tmp_path):
    D, _ = package(tmp_path / "theirs", 16.0)
    convert(tmp_path / "theirs", tmp_path / "a.pth", "native")
    convert(tmp_path / "a.pth", tmp_path / "one.pth", "rwkv-lightning")
    manifest, found = loaded(tmp_path / "one.pth")
    assert manifest == json.loads((tmp_path / "theirs" / "adapter.json").read_text())
    assert list(found) == list(D) and all(torch.equal(found[name], D[name]) for name in D)
    convert(tmp_path / "one.pth", tmp_path / "b.pth", "native")
    assert (tmp_path / "b.pth").read_bytes() == (tmp_path / "a.pth").read_bytes()


@pytest.mark.parametrize("embedded", [True, False])
def test_the_checkpoint_of_a_training_has_d_in_fp32(embedded, tmp_path):
    D, facts = package(tmp_path / "theirs", 16.0)
    master = {f"{name}.master": torch.randn(t.shape) for name, t in D.items()}
    more = {
        f"{name}.{kind}": torch.zeros(t.shape)
        for name, t in D.items()
        for kind in ("gradient", "adam_m", "adam_v")
    }
    (tmp_path / "checkpoint-3").mkdir()
    write_checkpoint(
        tmp_path / "checkpoint-3" / "training.pth",
        {**master, **more, "initial_state": torch.zeros(3)}.items(),
    )
    (tmp_path / "checkpoint-3" / "checkpoint.json").write_text(
        json.dumps(
            {
                "kind": "miss_training_checkpoint",
                "config": {"rank": RANK, "alpha": 16.0, "base_fingerprint": BASE},
            }
        )
    )
    if embedded:
        embed(tmp_path / "checkpoint-3" / "training.pth", {**facts, "tensor_source": "master"})
    convert(tmp_path / "checkpoint-3", tmp_path / "a.pth", "native")
    found = read_checkpoint(tmp_path / "a.pth")
    assert all(
        torch.equal(found[name.replace(".weight.D.master", ".miss")], (t * torch.tensor(16 / RANK)).t())
        for name, t in master.items()
    )


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"layout": "contiguous"}, "layout is 'contiguous', expected 'modulo_rank_zero_pad'"),
        ({"kind": "x"}, "kind"),
        ({"method": "lora"}, "method"),
        ({"format_version": 2}, "format_version is 2, expected 1"),
        ({"dtype": "float32"}, "dtype is 'float32'"),
        ({"rank": "5"}, "rank is '5'"),
        ({"rank": 2000}, "from 1 to 1024"),
        ({"scale": 0.0}, "a scale that is not zero"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"alpha": None}, "alpha None"),
        ({"base_fingerprint": "x"}, "expected a SHA-256"),
        ({"targets": []}, "target None is none of"),
        ({"targets": [{"name": "blocks.0.att.gate.weight.D"}]}, "'blocks.0.att.gate.weight.D' is none of"),
        ({"targets": 3}, "none of"),
        ({"rank": 4}, r"shape \[48, 5\] in the manifest"),
        ({"content_version": "0" * 64}, "content_version is not the digest"),
    ],
)
def test_manifests_that_the_loader_refuses(changes, message, tmp_path):
    package(tmp_path / "theirs")
    path = tmp_path / "theirs" / "adapter.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(rwkv_miss.UserError, match=message):
        convert(tmp_path / "theirs", tmp_path / "a.pth", "native")


def test_tensors_that_are_not_the_manifests(tmp_path):
    D, _ = package(tmp_path / "more", tensors={"blocks.0.x": torch.zeros(2)})
    with pytest.raises(rwkv_miss.UserError, match=r"holds blocks\.0\.x, which its manifest does not list"):
        convert(tmp_path / "more", tmp_path / "a.pth", "native")
    name = next(iter(D))
    for number, (tensor, message) in enumerate(
        [(D[name].float(), "float32"), (D[name].t().contiguous(), r"\(5, 48\)"), (D[name] + 1, "digest")]
    ):
        package(tmp_path / f"t{number}", tensors={name: tensor})
        with pytest.raises(rwkv_miss.UserError, match=message):
            convert(tmp_path / f"t{number}", tmp_path / "a.pth", "native")


def test_to_lora_and_to_peft_know_the_widths_of_a_package(tmp_path):
    package(tmp_path / "theirs", 16.0)
    convert(tmp_path / "theirs", tmp_path / "lora", "lora")
    convert(tmp_path / "theirs", tmp_path / "miss", "peft")
    convert(tmp_path / "theirs", tmp_path / "a.pth", "native")
    want = merged(7, tmp_path / "a.pth")
    for name in ("lora", "miss"):
        convert(tmp_path / name, tmp_path / f"{name}.pth", "native")
        close(name, merged(7, tmp_path / f"{name}.pth"), want, 1e-6)
    with pytest.raises(
        rwkv_miss.UserError,
        match="the widths of blocks.0.att.key are in no file.*the base.s file or folder: --base MODEL",
    ):
        convert(tmp_path / "miss", tmp_path / "c", "lora")
    convert(tmp_path / "miss", tmp_path / "c", "lora", Hints(base=str(tmp_path / "base.pth")))


def test_json_as_jsoncpp_writes_it():
    """Strings and numbers were compared with jsoncpp 1.9.6's; here are the ones that differ from Python's."""
    assert (
        canonical({"b": [1, 2.0, 0.1, 1e-7, 1e22, -0.3], "a": {'é\n"': None, "Z": True}})
        == '{"a":{"Z":true,"\\u00e9\\n\\"":null},'
        '"b":[1,2.0,0.10000000000000001,9.9999999999999995e-08,1e+22,-0.29999999999999999]}'
    )
