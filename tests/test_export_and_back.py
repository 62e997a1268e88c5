"""safetensors, and the way back from every form: the same file, or a note of what is not."""

import dataclasses
import functools
import os
import random
import struct

import pytest
import torch

from benchmarks.common import peak_above_start
from rwkv_miss import UserError
from rwkv_miss.__main__ import describe, show
from rwkv_miss.files.checkpoint import read_checkpoint, read_metadata, write_checkpoint
from src import export as forms
from src.export import TextSettings, gguf_reader

from .conftest import make_arch, random_tensors
from .test_export_gguf import arch_of, saved

pytest.importorskip("gguf", reason="the extra convert is absent: pip install gguf")
safetensors = pytest.importorskip(
    "safetensors", reason="the extra convert is absent: pip install safetensors"
)
METADATA = {"tokenizer": "bytes", "eod": "", "template": "think:hermes", "note": "kept ☃"}


def export(path, out, to, *settings, **named):
    """The way back again and again: no checkpoint that is there may be replaced."""
    if to == "pth":
        out.unlink(missing_ok=True)
    return forms.export(path, out, to, *settings, **named)


def released(version, **sizes):
    """As arch_of(), with the value residual's rank below a's, as in all released models."""
    arch = arch_of(version, **sizes)
    return dataclasses.replace(arch, ranks=arch.ranks | {"v": 5}) if version == 7 else arch


def there_and_back(path, to, kind=""):
    there, back = path.with_name(f"there-{to}-{kind}"), path.with_name("back.pth")
    export(path, there, to, kind)
    return there, back, export(there, back, "pth")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("version", [6, 7])
def test_there_and_back_is_the_same_file(tmp_path, version, dtype):
    saved(tmp_path / "m.pth", released(version), dtype, METADATA)
    kinds = ["F32", "BF16"] if dtype == torch.bfloat16 else ["F32"]
    for to, kind in (
        [("gguf", kind) for kind in kinds] + [("safetensors", "")] + [("hf", "")] * (version == 7)
    ):
        _, back, exported = there_and_back(tmp_path / "m.pth", to, kind)
        assert back.read_bytes() == (tmp_path / "m.pth").read_bytes() and exported.notes == [], (to, kind)


@pytest.mark.parametrize("to", ["gguf", "hf", "safetensors"])
def test_odd_files_come_back_as_they_were(tmp_path, to):
    """Mixed dtypes, squeezed vectors, another order, no value residual in block 0, and no metadata."""
    tensors = {
        name: t
        for name, t in random_tensors(released(7)).items()
        if not name.startswith("blocks.0.att.v") or "value" in name
    }
    tensors["emb.weight"], tensors["head.weight"] = (
        tensors["emb.weight"].half(),
        tensors["head.weight"].double(),
    )
    tensors["blocks.1.att.x_r"], tensors["blocks.1.att.w0"] = (
        tensors["blocks.1.att.x_r"].flatten(),
        tensors["blocks.1.att.w0"].flatten(),
    )
    tensors = dict(sorted(tensors.items(), reverse=True))
    write_checkpoint(tmp_path / "m.pth", tensors.items())
    export(
        tmp_path / "m.pth",
        tmp_path / "there",
        to,
        "F32" if to == "gguf" else "",
        settings=TextSettings("auto" if to == "safetensors" else "none"),
    )
    exported = export(tmp_path / "there", tmp_path / "back.pth", "pth")
    back = read_checkpoint(tmp_path / "back.pth")
    assert list(back) == list(tensors) and read_metadata(tmp_path / "back.pth") is None
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape, name
        assert torch.equal(
            back[name], tensor if to != "gguf" or name != "head.weight" else tensor.float().double()
        ), name
    assert len(exported.notes) == (to == "gguf")  # no fp64 there


def test_what_gguf_does_not_keep_is_said(tmp_path):
    tensors = saved(tmp_path / "m.pth", released(7))
    export(tmp_path / "m.pth", tmp_path / "m.gguf", "gguf", "BF16", settings=TextSettings("none"))
    exported = export(tmp_path / "m.gguf", tmp_path / "back.pth", "pth")
    assert "tensors, emb.weight first, were rounded in the export" in exported.notes[0]
    back = read_checkpoint(tmp_path / "back.pth")
    assert all(
        torch.equal(back[name], t if t.squeeze().dim() < 2 or name.endswith("r_k") else t.bfloat16().float())
        for name, t in tensors.items()
    )
    saved(tmp_path / "m.pth", arch_of(7), torch.bfloat16)  # the value residual's rank, 24, is above a's, 12
    exported = export(tmp_path / "m.pth", tmp_path / "m.gguf", "gguf", "BF16", settings=TextSettings("none"))
    assert "which no runtime reads, is cut to a's rank" in exported.notes[-1]
    exported = export(tmp_path / "m.gguf", tmp_path / "back.pth", "pth")
    assert "its last columns are zeros" in exported.notes[0]
    before, back = read_checkpoint(tmp_path / "m.pth"), read_checkpoint(tmp_path / "back.pth")
    assert [name for name in before if not torch.equal(before[name], back[name])] == [
        "blocks.0.att.v1",
        "blocks.0.att.v2",
    ]
    assert torch.equal(back["blocks.0.att.v1"][:, :12], before["blocks.0.att.v1"][:, :12])
    assert not back["blocks.0.att.v1"][:, 12:].any()


def test_quantised_files_are_no_way_back(tmp_path):
    saved(tmp_path / "m.pth", arch_of(6))
    export(tmp_path / "m.pth", tmp_path / "m.gguf", "gguf", "Q8_0", settings=TextSettings("none"))
    with pytest.raises(UserError, match="type 8, in which the checkpoint's values are lost"):
        export(tmp_path / "m.gguf", tmp_path / "back.pth", "pth")


@pytest.mark.parametrize("version", [6, 7])
def test_a_file_of_another_program_becomes_a_checkpoint(tmp_path, monkeypatch, version):
    """Without the record: the canonical order and shapes."""
    tensors = saved(tmp_path / "m.pth", released(version), torch.bfloat16)
    for to in ["gguf", "safetensors"] + ["hf"] * (version == 7):
        with monkeypatch.context() as other:
            for module in ("src.export.gguf", "rwkv_miss.files.provenance"):
                other.setattr(f"{module}.KEY", "another.key")
            export(
                tmp_path / "m.pth",
                tmp_path / to,
                to,
                settings=TextSettings("auto" if to == "safetensors" else "none"),
            )
        exported = export(tmp_path / to, tmp_path / "back.pth", "pth")
        back = read_checkpoint(tmp_path / "back.pth")
        assert "another program wrote this" in exported.notes[-1]
        wanted = {
            name: t
            for name, t in tensors.items()
            if to != "gguf" or name not in [f"blocks.0.att.v{i}" for i in range(3)]
        }
        assert list(back) == list(wanted)
        assert all(torch.equal(back[name].to(t.dtype), t) for name, t in wanted.items())
        assert back["ln_out.bias"].dtype == (torch.float32 if to == "gguf" else torch.bfloat16)


@pytest.mark.parametrize("prefix", ["model.", "_orig_mod.module."])
def test_safetensors_of_a_trainer_become_a_checkpoint(tmp_path, prefix):
    tensors = random_tensors(arch_of(7), torch.bfloat16)
    write_checkpoint(tmp_path / "m.pth", tensors.items())
    pytest.importorskip("safetensors.torch").save_file(
        {prefix + name: t for name, t in tensors.items()}, tmp_path / "m.safetensors"
    )
    exported = export(tmp_path / "m.safetensors", tmp_path / "back.pth", "pth")
    assert (tmp_path / "back.pth").read_bytes() == (tmp_path / "m.pth").read_bytes()
    assert f"{prefix} is taken off" in exported.notes[0] and "another program wrote this" in exported.notes[1]


def test_safetensors_are_read_by_the_package(tmp_path):
    tensors = saved(tmp_path / "m.pth", arch_of(6)) | {"head.weight": torch.ones(256, 128).half()}
    tensors |= {f"blocks.{i}.att.time_state": torch.randn(2, 64, 64) for i in range(2)}
    write_checkpoint(tmp_path / "m.pth", tensors.items(), METADATA)
    export(tmp_path / "m.pth", tmp_path / "m.safetensors", "safetensors")
    with safetensors.safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert set(file.keys()) == tensors.keys() and file.metadata()["format"] == "pt"
        assert all(
            torch.equal(file.get_tensor(name), t) and file.get_tensor(name).dtype == t.dtype
            for name, t in tensors.items()
        )
    export(tmp_path / "m.safetensors", tmp_path / "back.pth", "pth")
    assert (tmp_path / "back.pth").read_bytes() == (tmp_path / "m.pth").read_bytes()


def test_inspect_says_what_an_exported_file_is(tmp_path, capsys):
    saved(tmp_path / "m.pth", arch_of(7), metadata=METADATA)
    export(tmp_path / "m.pth", tmp_path / "m.safetensors", "safetensors")
    show(describe(tmp_path / "m.safetensors"))
    shown = capsys.readouterr().out
    assert shown.startswith(f"{tmp_path / 'm.safetensors'}: model in safetensors, ")
    assert "scripts.export --to pth gives the .pth back" in shown and len(shown) < 1000


# refusals


@pytest.mark.parametrize(
    "to,version,sizes,message",
    [
        ("pth", 7, {}, "is a checkpoint already"),
        ("ggml", 7, {}, "--to 'ggml' is unknown; choose one of: gguf, hf, safetensors, ai00, pth"),
    ],
)
def test_forms_that_would_be_wrong_are_refused(tmp_path, to, version, sizes, message):
    saved(tmp_path / "m.pth", arch_of(version, **sizes))
    with pytest.raises(UserError, match=message):
        export(tmp_path / "m.pth", tmp_path / "out", to)
    assert [p.name for p in tmp_path.iterdir()] == ["m.pth"]


@pytest.mark.parametrize(
    "to,flags,message",
    [
        ("hf", {"kind": "F32"}, "--type F32 is for gguf; hf has the checkpoint's own dtypes"),
        ("safetensors", {"kind": "BF16"}, "--type BF16"),
        (
            "safetensors",
            {"settings": TextSettings("bytes")},
            "are for gguf and hf; safetensors holds all tensors and no tokenizer",
        ),
        ("pth", {"drop_state": True}, "are for gguf and hf; pth"),
        ("pth", {"settings": TextSettings(template="think")}, "are for gguf and hf"),
        ("gguf", {"layout": "fla"}, "--layout fla is for hf; gguf has one layout"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(tmp_path, to, flags, message):
    with pytest.raises(UserError, match=message):
        export(tmp_path / "m.pth", tmp_path / "out", to, **flags)


def test_other_forms_go_by_way_of_a_checkpoint(tmp_path):
    saved(tmp_path / "m.pth", arch_of(7))
    export(tmp_path / "m.pth", tmp_path / "m.gguf", "gguf", settings=TextSettings("none"))
    with pytest.raises(UserError, match="is a GGUF file; make a checkpoint of it first, with --to pth"):
        export(tmp_path / "m.gguf", tmp_path / "hf", "hf")
    export(tmp_path / "m.pth", tmp_path / "hf", "hf", settings=TextSettings("none"))
    with pytest.raises(UserError, match="belongs to a Hugging Face folder; give the folder"):
        export(tmp_path / "hf" / "model.safetensors", tmp_path / "back.pth", "pth")


def changed(key, value):
    """The keys of a GGUF file as the reader gives them, one of them changed."""
    real = gguf_reader.read

    def read(path):
        keys, tensors = real(path)
        return {**keys, key: value}, tensors

    return read


@pytest.mark.parametrize(
    "key,value,message",
    [
        ("general.architecture", "llama", "a GGUF file of 'llama', expected rwkv6 or rwkv7"),
        ("rwkv7.block_count", 10**9, "block_count is 1000000000, expected a number from 1 to 4096"),
        ("rwkv7.block_count", 3, "lacks blk.2."),
        ("rwkv7.block_count", 1, "has the unknown blk.1."),
        ("rwkv7.wkv.head_size", 0, "wkv.head_size is 0"),
        ("rwkv7.wkv.head_size", 60, "its shapes do not fit"),
        ("rwkv7.attention.layer_norm_epsilon", float("nan"), "has layers with an eps of nan"),
        *(
            (
                "rwkv_miss.checkpoint",
                f'{{"tensors": {{"x": ["float32", {sizes}]}}, "metadata": null}}',
                "a size that no tensor has",
            )
            for sizes in ("1099511627776", "1, 1, 1, 1, 1")
        ),
        ("rwkv7.attention.layer_norm_epsilon", 1e-6, "has layers with an eps of 1e-06; RWKV's is 1e-05"),
        ("rwkv_miss.checkpoint", '{"tensors": {"x": ["float32", 1e999]}, "metadata": null}', "can't be read"),
        ("rwkv7.rescale_every_n_layers", 6, "halved every 6 layers"),
        ("rwkv_miss.checkpoint", "{", "can't be read"),
        ("rwkv_miss.checkpoint", '{"tensors": {}, "metadata": null}', "not in both"),
    ],
)
def test_keys_that_cannot_be(tmp_path, monkeypatch, key, value, message):
    saved(tmp_path / "m.pth", released(7))
    export(tmp_path / "m.pth", tmp_path / "m.gguf", "gguf", settings=TextSettings("none"))
    monkeypatch.setattr(gguf_reader, "read", changed(key, value))
    with pytest.raises(UserError, match=message):
        export(tmp_path / "m.gguf", tmp_path / "back.pth", "pth")
    assert not (tmp_path / "back.pth").exists()


def test_a_gguf_file_that_claims_more_than_it_holds(tmp_path):
    saved(tmp_path / "m.pth", released(7))
    export(tmp_path / "m.pth", tmp_path / "m.gguf", "gguf", settings=TextSettings("none"))
    content = (tmp_path / "m.gguf").read_bytes()
    # then 4 bytes, how many dimensions; 8 each; 4, the type; 8
    tensor = content.index(b"token_embd.weight") + len("token_embd.weight")
    for place, value, message in (
        (8, 2**40, "a count of 1,099,511,627,776"),
        (24, 2**40, "a text of 1,099,511,627,776 bytes"),
        (24, 2**22, "4,194,304 bytes are announced where"),
        (tensor + 4, 2**63, "'token_embd.weight' of .* lies outside of the file"),
        (tensor + 12, 0, "lies outside"),
        (tensor + 24, 2**62, "lies outside"),
        (tensor + 12, len(content) // 300, "or lie over each other"),
    ):
        data = bytearray(content)
        data[place : place + 8] = struct.pack("<Q", value)
        (tmp_path / "m.gguf").write_bytes(data)
        with pytest.raises(UserError, match=message):
            export(tmp_path / "m.gguf", tmp_path / "back.pth", "pth")


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, to, message in (
        ("pipe", "gguf", "is no regular file"),
        ("none", "gguf", "does not exist"),
        ("folder", "pth", "is a folder without config.json"),
    ):
        with pytest.raises(UserError, match=message):
            export(tmp_path / name, tmp_path / f"m.{to}", to)
    with pytest.raises(UserError, match="none.gguf does not exist"):
        export(tmp_path / "none.gguf", tmp_path / "b.pth", "pth")


@pytest.mark.parametrize(
    "dtype, expected",
    [
        (torch.int64, "expected floating-point numbers; the codes of a quantised model are no weights"),
        (torch.float8_e4m3fn, "expected one of float64, float32, bfloat16, float16"),
    ],
)
def test_what_is_no_float_does_not_come_back(tmp_path, dtype, expected):
    from safetensors.torch import save_file

    save_file(
        {name: t.to(dtype) for name, t in random_tensors(arch_of(7)).items()}, tmp_path / "m.safetensors"
    )
    with pytest.raises(UserError, match=expected):
        export(tmp_path / "m.safetensors", tmp_path / "back.pth", "pth")


def test_a_gguf_header_without_end(tmp_path):
    arrays = struct.pack("<Q1sIIQ", 1, b"a", 9, 4, 1 << 20) + bytes(4 << 20)
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 9) + 9 * arrays)
    with pytest.raises(UserError, match="a header beyond 33,554,432 bytes"):
        export(tmp_path / "m.gguf", tmp_path / "back.pth", "pth")


def test_a_gguf_tensor_that_comes_twice(tmp_path):
    saved(tmp_path / "m.pth", released(7))
    export(tmp_path / "m.pth", tmp_path / "m.gguf", "gguf", settings=TextSettings("none"))
    content = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(
        content.replace(b"blk.1.attn_norm_2.bias", b"blk.0.attn_norm_2.bias", 1)
    )
    with pytest.raises(UserError, match="tensors come twice"):
        export(tmp_path / "m.gguf", tmp_path / "back.pth", "pth")


def test_the_input_is_no_output(tmp_path):
    saved(tmp_path / "m.pth", arch_of(7))
    (tmp_path / "link").symlink_to(tmp_path / "m.pth")
    before = (tmp_path / "m.pth").read_bytes()
    with pytest.raises(UserError, match="link is an input; choose another name"):
        export(tmp_path / "m.pth", tmp_path / "link", "safetensors")
    assert (tmp_path / "m.pth").read_bytes() == before


def test_infinite_values_do_not_come_back(tmp_path):
    from safetensors.torch import save_file

    tensors = random_tensors(arch_of(7))
    tensors["head.weight"][3, 4] = torch.inf
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="head.weight holds NaN or infinite values"):
        export(tmp_path / "m.safetensors", tmp_path / "back.pth", "pth")


def test_mutated_files_are_refused_or_read(tmp_path):
    """Truncated, flipped and overwritten, most often in the header: never anything but a UserError."""
    saved(tmp_path / "m.pth", make_arch(7, 1, 64, 64, 16), metadata=METADATA)
    draw, refused, files = random.Random(0), 0, {}
    for to in ("gguf", "safetensors", "hf"):
        export(
            tmp_path / "m.pth",
            tmp_path / f"m.{to}",
            to,
            settings=TextSettings("auto" if to == "safetensors" else "none"),
        )
        path = tmp_path / "m.hf" / "config.json" if to == "hf" else tmp_path / f"m.{to}"
        files[tmp_path / f"m.{to}"] = path, path.read_bytes()
    for _ in range(120):
        for model, (path, content) in files.items():
            data, place = (
                bytearray(content),
                draw.randrange(min(len(content), draw.choice([100, 6000, len(content)]))),
            )
            change = draw.randrange(3)
            if change == 0:
                data = data[:place]
            elif change == 1:
                data[place] ^= 1 << draw.randrange(8)
            else:
                data[place : place + 8] = struct.pack(
                    "<Q", draw.choice([0, 1, 2**31, 2**40, 2**63, 2**64 - 1])
                )
            path.write_bytes(data)
            try:
                export(model, tmp_path / "back.pth", "pth")
            except UserError:
                refused += 1
        for path, content in files.values():
            path.write_bytes(content)
    assert refused > 200


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path):
    arch = dataclasses.replace(released(7), n_embd=384, n_head=6, dim_att=384, vocab_size=65536)
    saved(tmp_path / "m.pth", arch, torch.bfloat16)
    largest = 65536 * 384 * 2
    for to in ("hf", "safetensors", "gguf"):
        settings = TextSettings("auto" if to == "safetensors" else "none")
        work = functools.partial(export, tmp_path / "m.pth", tmp_path / to, to, settings=settings)
        assert peak_above_start(work) < 0.3 * largest, to
        peak = peak_above_start(lambda: export(tmp_path / to, tmp_path / "back.pth", "pth"))  # noqa: B023
        assert peak < 1.3 * largest, f"{to}: {peak:,} bytes"
