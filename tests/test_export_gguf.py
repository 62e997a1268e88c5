"""GGUF files read by the package gguf: every tensor and key as llama.cpp expects them, and refusals of what
it would compute wrongly.
"""

import ast
import dataclasses
import errno
import functools
import itertools

import numpy as np
import pytest
import torch

import rwkv_miss
from benchmarks.common import peak_above_start
from rwkv_miss import UserError
from rwkv_miss.adapter_file import ADAPTER_FORMAT
from rwkv_miss.files.checkpoint import RUN_FORMAT, read_checkpoint, read_metadata, write_checkpoint
from scripts import export as program
from src import export as package
from src.data.jinja_template import JinjaTemplate
from src.data.rwkv_template import MODES, THOUGHTS_TWICE, RwkvTemplate
from src.data.tokenizer import load_tokenizer
from src.export import TextSettings, export, gguf_reader
from src.export.chat_template import rwkv_jinja
from src.model import RWKV

from .conftest import make_arch, random_tensors

gguf = pytest.importorskip("gguf", reason="the extra convert is absent: pip install gguf")


def arch_of(version, **sizes):
    """Unequal sizes everywhere: a mixed-up pair must not fit."""
    arch = make_arch(version, 2, 128, 64, 256)
    ranks = {"w": 8, "a": 12, "v": 24, "g": 16} if version == 7 else {"maa": 20, "decay": 24}
    return dataclasses.replace(arch, dim_ffn=160, ranks=ranks, **sizes)


def saved(path, arch, dtype=torch.float32, metadata=None, drop=()):
    tensors = {name: t for name, t in random_tensors(arch, dtype).items() if name not in drop}
    write_checkpoint(path, tensors.items(), metadata)
    return tensors


def read(path):
    """(key -> value, name -> (type, tensor of float32)) by the package gguf."""
    reader = gguf.GGUFReader(path)
    tensors = {}
    for t in reader.tensors:
        values = gguf.quants.dequantize(t.data, t.tensor_type).reshape(tuple(reversed(t.shape.tolist())))
        tensors[t.name] = t.tensor_type.name, torch.from_numpy(np.array(values, dtype=np.float32))
    return {key: field.contents() for key, field in reader.fields.items()}, tensors


def expected(t, version):
    """name -> (kind of tensor, values) of a model of two layers, word by word as llama.cpp reads them."""
    p = {"token_embd.weight": ("L", t["emb.weight"]), "output.weight": ("L", t["head.weight"])}
    norms = {"token_embd_norm": "blocks.0.ln0", "output_norm": "ln_out"}
    for i in range(2):
        b, a, f = f"blk.{i}.", f"blocks.{i}.att.", f"blocks.{i}.ffn."
        norms |= {
            b + "attn_norm": f"blocks.{i}.ln1",
            b + "attn_norm_2": f"blocks.{i}.ln2",
            b + "time_mix_ln": a + "ln_x",
        }
        for name in ("receptance", "key", "value", "output"):
            p[f"{b}time_mix_{name}.weight"] = "L", t[f"{a}{name}.weight"]
        p[b + "channel_mix_key.weight"] = "L", t[f + "key.weight"]
        p[b + "channel_mix_value.weight"] = "L", t[f + "value.weight"]
        if version == 7:
            p[b + "time_mix_lerp_fused.weight"] = (
                "V",
                torch.stack([t[a + name] for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")]),
            )
            p[b + "channel_mix_lerp_k.weight"] = "V", t[f + "x_k"].flatten()
            for name in ("w0", "a0", "v0", "k_k", "k_a", "r_k"):
                p[f"{b}time_mix_{name}.weight"] = "V", t[a + name].flatten()
            for name in ("w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2"):
                p[f"{b}time_mix_{name}.weight"] = "M", t[a + name].t()
        else:
            p[b + "time_mix_gate.weight"] = "L", t[a + "gate.weight"]
            p[b + "channel_mix_receptance.weight"] = "L", t[f + "receptance.weight"]
            fused = ("time_maa_w", "time_maa_k", "time_maa_v", "time_maa_r", "time_maa_g")
            p[b + "time_mix_lerp_x.weight"] = "V", t[a + "time_maa_x"].flatten()
            p[b + "time_mix_lerp_fused.weight"] = "V", torch.stack([t[a + name] for name in fused])
            p[b + "time_mix_w1.weight"] = "M", t[a + "time_maa_w1"].t()
            p[b + "time_mix_w2.weight"] = "M", t[a + "time_maa_w2"].permute(0, 2, 1)
            p[b + "time_mix_decay.weight"] = "V", t[a + "time_decay"].flatten()
            p[b + "time_mix_decay_w1.weight"] = "M", t[a + "time_decay_w1"].t()
            p[b + "time_mix_decay_w2.weight"] = "M", t[a + "time_decay_w2"].t()
            p[b + "time_mix_first.weight"] = "V", t[a + "time_faaaa"]
            p[b + "channel_mix_lerp_k.weight"] = "V", t[f + "time_maa_k"].flatten()
            p[b + "channel_mix_lerp_r.weight"] = "V", t[f + "time_maa_r"].flatten()
    p |= {
        f"{key}.{part}": ("V", t[f"{norm}.{part}"])
        for key, norm in norms.items()
        for part in ("weight", "bias")
    }
    return p


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("version", [6, 7])
def test_every_tensor_is_there_and_no_other(tmp_path, version, kind):
    tensors = saved(tmp_path / "m.pth", arch_of(version))
    export(tmp_path / "m.pth", tmp_path / "m.gguf", "gguf", kind, settings=TextSettings("bytes"))
    _, got = read(tmp_path / "m.gguf")
    if version == 7:  # block 0 needs a value residual of a's rank; nothing reads it
        tensors |= {
            "blocks.0.att.v1": tensors["blocks.0.att.v1"][:, :12],
            "blocks.0.att.v2": tensors["blocks.0.att.v2"][:12],
        }
    want = expected(tensors, version)
    assert got.keys() == want.keys()
    for name, (role, values) in want.items():
        type_, found = got[name]
        assert type_ == {"L": kind, "M": "F32" if kind == "F32" else "BF16", "V": "F32"}[role], name
        assert found.shape == values.shape, name
        if type_ == "F32":
            assert torch.equal(found, values), name
        elif type_ == "BF16":
            assert torch.equal(found, values.bfloat16().float()), name
        # half a step of the scale that 32 neighbours share, a whole one at Q4_0's missing eighth positive
        # step, and what fp16 rounds off
        else:
            blocks = values.reshape(-1, 32)
            largest = blocks.abs().amax(1, keepdim=True)
            step = largest / (127 * 2 if kind == "Q8_0" else 8) + largest / 2**11
            assert ((found.reshape(-1, 32) - blocks).abs() <= step * 1.0001).all(), name


@pytest.mark.parametrize("version", [6, 7])
def test_keys(tmp_path, version):
    saved(tmp_path / "m.pth", arch_of(version))
    export(tmp_path / "m.pth", tmp_path / "my model.gguf", "gguf", "Q8_0", settings=TextSettings("none"))
    keys, _ = read(tmp_path / "my model.gguf")
    of_version = {
        6: {"time_mix_extra_dim": 20, "time_decay_extra_dim": 24, "rescale_every_n_layers": 0},
        7: {
            "attention.decay_lora_rank": 8,
            "attention.iclr_lora_rank": 12,
            "attention.value_residual_mix_lora_rank": 24,
            "attention.gate_lora_rank": 16,
        },
    }[version]
    sizes = {
        "context_length": 1048576,
        "embedding_length": 128,
        "block_count": 2,
        "feed_forward_length": 160,
        "attention.head_count": 0,
        "wkv.head_size": 64,
        "vocab_size": 256,
        **of_version,
    }
    got = {name: value for name, value in keys.items() if not name.startswith(("GGUF.", "rwkv_miss."))}
    eps = got.pop(f"rwkv{version}.attention.layer_norm_epsilon")
    assert eps == np.float32(1e-5)
    assert got == {
        "general.architecture": f"rwkv{version}",
        "general.name": "m",
        "general.file_type": 7,
        "tokenizer.ggml.model": "none",
        **{f"rwkv{version}.{name}": value for name, value in sizes.items()},
    }


def test_the_rank_of_a_single_layers_value_residual(tmp_path):
    saved(tmp_path / "m.pth", arch_of(7, n_layer=1))
    export(tmp_path / "m.pth", tmp_path / "m.gguf", "gguf", settings=TextSettings("none"))
    keys, tensors = read(tmp_path / "m.gguf")
    assert (
        keys["rwkv7.attention.value_residual_mix_lora_rank"]
        == 12
        == len(tensors["blk.0.time_mix_v1.weight"][1])
    )


def test_block_0_without_a_value_residual_gets_one(tmp_path):
    saved(tmp_path / "m.pth", arch_of(7), drop=[f"blocks.0.att.v{i}" for i in range(3)])
    export(tmp_path / "m.pth", tmp_path / "m.gguf", "gguf", settings=TextSettings("none"))
    _, tensors = read(tmp_path / "m.gguf")
    assert all(not tensors[f"blk.0.time_mix_v{i}.weight"][1].any() for i in range(3))
    assert tensors["blk.0.time_mix_v1.weight"][1].shape == (12, 128)


def test_the_world_vocabulary(tmp_path):
    saved(
        tmp_path / "m.pth",
        dataclasses.replace(arch_of(7), n_embd=64, n_head=1, dim_att=64, vocab_size=65536),
        torch.bfloat16,
    )
    export(tmp_path / "m.pth", tmp_path / "m.gguf", "gguf")
    keys, _ = gguf_reader.read(tmp_path / "m.gguf")  # the package takes seconds for as many
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    table = load_tokenizer("world", 65536).table
    assert len(tokens) == len(types) == 65536 and len(table) == 65530
    assert all(
        ast.literal_eval(f'b"""{text}"""' if text[-1:] != '"' else f"b'{text}'") == table[i]
        for i, text in enumerate(tokens)
        if 0 < i < 65530
    )
    assert (tokens[0], types[0]) == (r"\xff<s>", 3) and set(types[1:65530]) == {1}
    assert tokens[65530:] == [rf"\xff[PAD{i}]" for i in range(65530, 65536)] and types[65530:] == [5] * 6
    assert {name: keys[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "eot")} == {
        "bos": 0,
        "eos": 0,
        "eot": 261,
    }
    assert table[261] == b"\n\n" and keys["tokenizer.ggml.model"] == "rwkv" and "rwkv7.vocab_size" not in keys
    assert keys["tokenizer.chat_template"] == rwkv_jinja(RwkvTemplate("rwkv", "json"))


def test_what_the_checkpoint_records_is_in_the_file(tmp_path):
    saved(
        tmp_path / "m.pth", arch_of(7), metadata={"tokenizer": "bytes", "eod": "", "template": "think:hermes"}
    )
    exported = export(tmp_path / "m.pth", tmp_path / "m.gguf", "gguf")
    keys, _ = read(tmp_path / "m.gguf")
    assert len(keys["tokenizer.ggml.tokens"]) == 256 and keys["tokenizer.ggml.tokens"][0] == r"\x00"
    assert set(keys["tokenizer.ggml.token_type"]) == {1}
    assert keys["tokenizer.chat_template"] == rwkv_jinja(RwkvTemplate("think"))
    assert "tokenizer.ggml.eot_token_id" not in keys
    assert not any("newline" in note for note in exported.notes)


def test_a_thinking_model_does_not_end_at_the_blank_lines_of_its_thoughts(tmp_path):
    (tmp_path / "v.txt").write_text("1 'a' 1\n2 '\\n' 1\n3 '\\n\\n' 2\n5 '✿' 3\n", encoding="utf-8")
    for template, eot in (
        ("rwkv:hermes", 3),
        ("fake-think:hermes", 3),
        ("think-short:hermes", None),
        ("think-chinese:json", None),
        ("rwkv:markdown", None),
        ("flower:json", 5),
        ("flower-fake-think:json", 5),
    ):
        saved(
            tmp_path / "m.pth",
            arch_of(7),
            metadata={"tokenizer": str(tmp_path / "v.txt"), "template": template},
        )
        exported = export(tmp_path / "m.pth", tmp_path / "m.gguf", "gguf")
        keys, _ = read(tmp_path / "m.gguf")
        assert not any("no token is ✿" in note for note in exported.notes)
        assert keys.get("tokenizer.ggml.eot_token_id") == eot
        assert any("s hold blank lines, so" in note for note in exported.notes) == (eot is None)
        assert keys["tokenizer.ggml.tokens"][:4] == [r"\xff<s>", "a", r"\n", r"\n\n"]
        assert keys["tokenizer.ggml.token_type"][4] == 5
    saved(tmp_path / "m.pth", arch_of(7), metadata={"tokenizer": "bytes", "template": "flower:json"})
    exported = export(tmp_path / "m.pth", tmp_path / "m.gguf", "gguf")
    assert "template flower: no token is ✿, which ends a turn; let llama.cpp stop at it" in exported.notes
    assert "tokenizer.ggml.eot_token_id" not in read(tmp_path / "m.gguf")[0]


def test_the_end_of_a_turn_is_that_of_the_users_template(tmp_path):
    """A blank line ends no turn of a template that ends it otherwise."""
    (tmp_path / "v.txt").write_text("1 'a' 1\n2 '\\n' 1\n3 '\\n\\n' 2\n5 '<e>' 3\n", encoding="utf-8")
    for ending, eot in (("\n\n", 3), ("<e>", 5), ("<end>\n", None), ("", None)):
        template = f"{{% for m in messages %}}{{{{ m.role + ':' + m.content + {ending!r} }}}}{{% endfor %}}"
        metadata = {"tokenizer": str(tmp_path / "v.txt"), "template": template}
        saved(tmp_path / "m.pth", arch_of(7), metadata=metadata)
        exported = export(tmp_path / "m.pth", tmp_path / "m.gguf", "gguf")
        assert read(tmp_path / "m.gguf")[0].get("tokenizer.ggml.eot_token_id") == eot
        assert any("no token is <end>, which ends a turn" in note for note in exported.notes) == (
            ending == "<end>\n"
        )


def test_a_tokenizer_without_a_form_is_left_out_loudly(tmp_path):
    saved(tmp_path / "m.pth", arch_of(7))
    exported = export(tmp_path / "m.pth", tmp_path / "m.gguf", "gguf", settings=TextSettings("utf16"))
    assert "no tokenizer is in the file: llama.cpp has none like utf16" in "\n".join(exported.lines())
    (tmp_path / "v.txt").write_text("1 'a' 1\n2 'b' 1\n")
    exported = export(
        tmp_path / "m.pth", tmp_path / "m.gguf", "gguf", settings=TextSettings(str(tmp_path / "v.txt"))
    )
    assert "has no token for a newline" in "\n".join(exported.lines())
    assert read(tmp_path / "m.gguf")[0]["tokenizer.ggml.model"] == "none"


def test_the_users_own_template_is_in_the_file_without_its_marks_of_training(tmp_path):
    template = (
        "{% for m in messages %}<{{ m['role'] }}>{% generation %}{{ m['content'] }}{%- endgeneration -%}  .{{"
        " eos_token }}{% endfor %}"
    )
    saved(tmp_path / "m.pth", arch_of(7), metadata={"tokenizer": "bytes", "template": template})
    export(tmp_path / "m.pth", tmp_path / "m.gguf", "gguf")
    kept = read(tmp_path / "m.gguf")[0]["tokenizer.chat_template"]
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert "generation" not in kept
    assert (
        JinjaTemplate("kept", kept, "E")._render(messages)
        == JinjaTemplate("own", template, "E")._render(messages)
        == "<user>hi.E<assistant>ho.E"
    )


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


BRIEF, FIVE = {"role": "system", "content": " Be\r\n\r\nbrief. \n"}, assistant("five", reasoning="1+4")
F = {"function": {"name": "f", "arguments": {"x": "<é>", "y": [1, 2.5, None, True]}}}
CALLING = assistant("ok", tool_calls=[{"name": "g", "arguments": {"a": 1}}])
CONVERSATIONS = [
    ([], None),
    ([user("Hi")], None),
    ([user("<think>?"), assistant(" yes\n")], None),
    ([BRIEF, user("a\n\n\nb\n \n\nc"), assistant("x\n\ny "), user("d")], None),
    ([user("q"), assistant("<think>\nhmm\n\nhm</think>\n\nfour")], None),
    ([user("q"), assistant("four", reasoning_content=" 2+2 \n"), user("and?"), FIVE], None),
    ([user("q"), assistant("<think> a </think> b </think> c")], None),
    ([user("q"), assistant("<think> never")], None),
    ([user("q"), assistant("<think>a</think>b", reasoning_content="c")], None),
    (
        [user("q"), assistant(None, tool_calls=[F]), {"role": "tool", "content": "3"}, CALLING],
        [{"type": "function", "function": {"name": "f", "description": "it's"}}, {"name": "g✿"}],
    ),
    ([user("✿ a ✿"), assistant("b ❀")], None),
    ([user("a"), assistant("b ✿")], None),
    ([user("a"), assistant("b", reasoning_content="嗯，c")], None),
]


@pytest.mark.parametrize(
    "name, tool_style",
    [
        *((name, "hermes") for name in MODES),
        *itertools.product(
            ["rwkv", "think-short", "fake-think", "flower"], ["json", "signatures", "markdown"]
        ),
    ],
)
def test_the_jinja_template_is_rwkvs(name, tool_style):
    ours = RwkvTemplate(name, tool_style)
    jinja = JinjaTemplate(name, rwkv_jinja(ours), "")

    def rendered(make):
        try:
            return make()
        except UserError as error:
            return THOUGHTS_TWICE in str(error)

    refused = 0
    asked = ours.form.between + (ours.form.ask if ours.form.end else "")
    for messages, tools in CONVERSATIONS:
        for ask in (False, True):
            want = rendered(lambda: "".join(text for text, _ in ours.segments(messages, tools, ask)))  # noqa: B023
            if not ask and messages and messages[-1]["role"] == "user":
                want += asked
            assert rendered(lambda: jinja._render(messages, ask, tools)) == want  # noqa: B023
            refused += not isinstance(want, str)
    # an open <think>, thoughts twice; thoughts where they have no place; a flower where it ends a turn
    expected = 4 * (name != "rwkv") + 8 * ("fake-think" in name) + 2 * ("flower" in name)
    assert refused == expected


def heads(number, size):
    return {"n_embd": number * size, "head_size": size, "n_head": number}


@pytest.mark.parametrize(
    "version,sizes,kind,message",
    [
        (7, heads(2, 32), "F32", "heads of 32 would load in llama.cpp and compute something else"),
        (7, heads(1, 96), "F32", "heads of 96 would load"),
        (6, {"dim_att": 64, "n_head": 1}, "F32", "64 wide in all and the model 128"),
        (6, {"dim_ffn": 168}, "Q8_0", "Q8_0 needs rows of a multiple of 32, the ffn is 168"),
        (6, heads(1, 72), "Q4_0", "Q4_0 needs rows of a multiple of 32, the width is 72"),
    ],
)
def test_what_llama_cpp_would_compute_wrongly_is_refused(tmp_path, version, sizes, kind, message):
    arch = dataclasses.replace(arch_of(version), **sizes)
    arch = dataclasses.replace(arch, dim_att=arch.n_head * arch.head_size)
    saved(tmp_path / "m.pth", arch)
    with pytest.raises(UserError, match=message):
        export(tmp_path / "m.pth", tmp_path / "m.gguf", "gguf", kind, settings=TextSettings("none"))
    assert [p.name for p in tmp_path.iterdir()] == ["m.pth"]


def test_heads_that_only_cpus_run_are_told_of(tmp_path):
    saved(tmp_path / "m.pth", dataclasses.replace(arch_of(6), head_size=32, n_head=4))
    exported = export(tmp_path / "m.pth", tmp_path / "m.gguf", "gguf", "F32", settings=TextSettings("none"))
    assert "heads of 32: llama.cpp runs them on a CPU; its CUDA kernels" in exported.notes[0]
    saved(tmp_path / "m.pth", arch_of(6))
    exported = export(tmp_path / "m.pth", tmp_path / "m.gguf", "gguf", "F32", settings=TextSettings("none"))
    assert not any("CUDA" in note for note in exported.notes)


@pytest.mark.parametrize(
    "change,message",
    [
        (
            lambda t: t.update({"blocks.0.att.key.miss": torch.ones(4, 128)}),
            "has the unknown blocks.0.att.key.miss",
        ),
        (lambda t: t.pop("blocks.1.att.v1"), "lacks blocks.1.att.v1"),
        (lambda t: t.update({"head.weight": t["head.weight"] * torch.nan}), "head.weight holds NaN"),
        (lambda t: t.update({"ln_out.bias": torch.ones(128, dtype=torch.int8)}), "ln_out.bias is torch.int8"),
        (
            lambda t: t.update({f"blocks.{i}.att.time_state": torch.ones(2, 64, 64) for i in range(2)}),
            "has an initial state",
        ),
    ],
)
def test_what_is_no_merged_model_is_refused(tmp_path, change, message):
    tensors = random_tensors(arch_of(7))
    change(tensors)
    write_checkpoint(tmp_path / "m.pth", tensors.items())
    with pytest.raises(UserError, match=message):
        export(tmp_path / "m.pth", tmp_path / "m.gguf", "gguf", settings=TextSettings("none"))
    assert [p.name for p in tmp_path.iterdir()] == ["m.pth"]


def test_an_adapter_and_the_checkpoint_of_a_run_are_refused(tmp_path):
    messages = {
        "--resume auto": {"format": RUN_FORMAT, "step": 3},
        "is an adapter": {"format": ADAPTER_FORMAT, "base": "b.pth"},
    }
    for message, metadata in messages.items():
        write_checkpoint(tmp_path / "m.pth", {"x": torch.ones(2)}.items(), metadata)
        with pytest.raises(UserError, match=message):
            export(tmp_path / "m.pth", tmp_path / "m.gguf", "gguf")


@pytest.mark.parametrize(
    "method,options,message",
    [
        ("dora", {}, "the change of a weight by dora is no product of two factors"),
        ("miss", {"train_parts": "head", "tokens": [3]}, "rows of emb and head are trained .1., which"),
        ("miss", {"train_parts": "ln"}, "blocks.0.ln0.weight is trained as a whole, which no LoRA holds"),
        ("state", {}, "blocks.0.att.time_state is trained as a whole"),
    ],
)
def test_an_adapter_that_is_no_lora_is_refused(tmp_path, method, options, message):
    model = RWKV(arch_of(7))
    model.load_state_dict(random_tensors(model.arch))
    rwkv_miss.inject(model, method, **options)
    rwkv_miss.save_adapter(model, tmp_path / "a.pth")
    with pytest.raises(UserError, match=f"{message}.*merge"):
        export(tmp_path / "a.pth", tmp_path / "a.gguf", "gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


def test_a_lora_has_float_factors_and_the_sizes_of_its_model(tmp_path):
    model = RWKV(arch_of(7))
    rwkv_miss.inject(model, "miss", rank=4)
    rwkv_miss.save_adapter(model, tmp_path / "a.pth")
    with pytest.raises(UserError, match="a LoRA has --type F32 or BF16; Q8_0 is for whole models"):
        export(tmp_path / "a.pth", tmp_path / "a.gguf", "gguf", "Q8_0")
    with pytest.raises(UserError, match="a.pth is an adapter; flags about texts and --drop_state"):
        export(tmp_path / "a.pth", tmp_path / "a.gguf", "gguf", settings=TextSettings("none"))
    metadata = read_metadata(tmp_path / "a.pth")
    tensors = read_checkpoint(tmp_path / "a.pth")
    write_checkpoint(tmp_path / "b.pth", tensors.items(), metadata | {"arch": None})
    with pytest.raises(
        UserError,
        match="b.pth records no sizes .* convert .* --base MODEL, the base.s file or folder, adds",
    ):
        export(tmp_path / "b.pth", tmp_path / "a.gguf", "gguf")
    renamed = {name.replace("att.key", "att.w1"): t for name, t in tensors.items()}
    linears = [name.replace("att.key", "att.w1") for name in metadata["linears"]]
    write_checkpoint(tmp_path / "c.pth", renamed.items(), metadata | {"linears": linears})
    with pytest.raises(UserError, match="c.pth adapts blocks.0.att.w1, to which llama.cpp applies no LoRA"):
        export(tmp_path / "c.pth", tmp_path / "a.gguf", "gguf")


def test_an_initial_state_is_left_out_when_told_to(tmp_path):
    tensors = random_tensors(arch_of(7)) | {
        f"blocks.{i}.att.time_state": torch.ones(2, 64, 64) for i in range(2)
    }
    write_checkpoint(tmp_path / "m.pth", tensors.items())
    exported = export(
        tmp_path / "m.pth", tmp_path / "m.gguf", "gguf", drop_state=True, settings=TextSettings("none")
    )
    assert exported.notes[0].startswith("2 initial states left out")
    assert not any("state" in name for name in read(tmp_path / "m.gguf")[1])


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    saved(tmp_path / "m.pth", arch_of(7))
    (tmp_path / "m.gguf").write_text("before")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")
        yield

    monkeypatch.setattr(package.gguf, "_pieces", full)
    with pytest.raises(UserError, match="m.gguf was not written: No space left"):
        export(tmp_path / "m.pth", tmp_path / "m.gguf", "gguf", settings=TextSettings("none"))
    assert (tmp_path / "m.gguf").read_text() == "before" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path):
    arch = dataclasses.replace(arch_of(7), n_embd=384, n_head=6, dim_att=384, vocab_size=65536)
    saved(tmp_path / "m.pth", arch, torch.bfloat16)
    for kind in ("F32", "Q8_0"):  # 100 MB of F32 in each of the two largest tensors
        paths, settings = (tmp_path / "m.pth", tmp_path / "m.gguf"), TextSettings("none")
        export(*paths, "gguf", kind, settings=settings)
        peak = peak_above_start(functools.partial(export, *paths, "gguf", kind, settings=settings))
        assert peak < 40e6, f"{kind}: {peak:,} bytes"


def test_the_program(tmp_path, capsys, monkeypatch):
    saved(tmp_path / "m.pth", arch_of(7))
    argv = f"--model {tmp_path}/m.pth --out {tmp_path}/m.gguf --to gguf --tokenizer bytes".split()
    program.main([*argv, "--type", "Q8_0"])
    assert capsys.readouterr().out.startswith(f"{tmp_path}/m.gguf: GGUF Q8_0, RWKV-7, 2 layers, width 128")
    program.main(argv)
    assert "had to be rounded to BF16; --type F32 keeps all values" in capsys.readouterr().out
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(SystemExit):
        program.main(argv)
    assert "pip install gguf" in capsys.readouterr().err
