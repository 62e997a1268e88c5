"""GGUF files under llama.cpp itself, from the package xllamacpp: logits, tokens, the chat template."""

import ctypes
import dataclasses
import random

import pytest
import torch

import rwkv_miss
from benchmarks import llama
from rwkv_miss.files.checkpoint import write_checkpoint
from src.data.rwkv_template import RwkvTemplate
from src.data.tokenizer import load_tokenizer
from src.export import TextSettings, export
from src.model import RWKV

from .conftest import close, make_arch, random_tensors
from .test_adapters import filled

pytest.importorskip("gguf", reason="the extra convert is absent: pip install gguf")
EXACT = 2e-5  # share of max |logit|: fp32 against float64, as for every implementation in the goldens' README
# (mean KL, agreement of the likeliest token): 2.5 times the worst of 20 random models of this size, KL
# 2.9e-5, 4.2e-4 and 4.3e-2, agreement 0.95, 0.93 and 0.50; llama.cpp rounds the activations too. A random
# model of 12 x 768 loses the same: 2.6e-5, 3e-4, 3.5e-2
LOST = {"BF16": (7e-5, 0.9), "Q8_0": (1e-3, 0.85), "Q4_0": (0.1, 0.4)}


@pytest.fixture(scope="session")
def library():
    try:
        return llama.load_library()
    except FileNotFoundError as error:
        pytest.skip(f"LLAMA.CPP ABSENT, GGUF is not checked against it: {error}")


def under_llama(library, path, kind, folder, ids, tokenizer="none"):
    """Logits (T, V) token by token, after checking that those of the whole prompt at once end alike."""
    export(path, folder / "m.gguf", "gguf", kind, settings=TextSettings(tokenizer))
    model = llama.Llama(library, folder / "m.gguf")
    whole = model.feed(ids)
    model.start(1)
    logits = torch.stack([model.feed([token]) for token in ids])
    close("prompt", whole, logits[-1], EXACT if kind == "F32" else 0.1)
    model.close()
    return logits


def lost(got, want):
    p, q = want.double().log_softmax(-1), got.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean()), float((p.argmax(-1) == q.argmax(-1)).double().mean())


@pytest.mark.parametrize("name", ["golden/rwkv7-tiny", "golden/rwkv6-tiny", "real/rwkv6-3m-utf16"])
def test_goldens(tmp_path, data_dir, library, name):
    golden = torch.load(data_dir / f"{name}.golden.pt", weights_only=True)
    ids = (golden["tokens"] if "tokens" in golden else golden["ids"])[0].tolist()
    want = golden["logits64"][0]
    close(name, under_llama(library, data_dir / f"{name}.pth", "F32", tmp_path, ids), want, EXACT)
    for kind, (divergence, agreement) in LOST.items():
        kl, same = lost(under_llama(library, data_dir / f"{name}.pth", kind, tmp_path, ids), want)
        assert kl < divergence and same >= agreement, f"{kind}: KL {kl:.1e}, {same:.0%}"


def odd(version, **sizes):
    """Sizes that differ wherever they may."""
    arch = make_arch(version, 3, 128, 64, 200)
    ranks = {"w": 8, "a": 12, "v": 24, "g": 16} if version == 7 else {"maa": 20, "decay": 24}
    return dataclasses.replace(arch, dim_ffn=160, ranks=ranks, **sizes)


@pytest.mark.parametrize(
    "version,sizes",
    [
        (6, {}),
        (7, {}),
        (7, {"head_size": 128, "n_head": 1}),
        (6, {"head_size": 16, "n_head": 8}),
        (7, {"n_layer": 1}),
        (7, {"layer0_value_residual": False}),
    ],
)
def test_random_models(tmp_path, library, version, sizes):
    path = tmp_path / "m.pth"
    write_checkpoint(path, random_tensors(odd(version, **sizes)).items())
    ids = torch.randint(200, (40,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = RWKV.load(path, torch.float64)(ids[None])[0][0]
    close("F32", under_llama(library, path, "F32", tmp_path, ids.tolist()), want, EXACT)
    for kind, (divergence, agreement) in LOST.items():
        kl, same = lost(under_llama(library, path, kind, tmp_path, ids.tolist()), want)
        assert kl < divergence and same >= agreement, f"{kind}: KL {kl:.1e}, {same:.0%}"


def test_a_batch_of_sequences_is_each_of_them(tmp_path, library):
    """As benchmarks.decode_batches measures it."""
    path = tmp_path / "m.pth"
    write_checkpoint(path, random_tensors(odd(7)).items())
    export(path, tmp_path / "m.gguf", "gguf", "F32", settings=TextSettings("none"))
    batch = llama.Llama(library, tmp_path / "m.gguf", 1024, sequences=4)
    alone = llama.Llama(library, tmp_path / "m.gguf")
    ids = torch.randint(200, (6, 3), generator=torch.Generator().manual_seed(0)).tolist()
    together = [batch.step(tokens).clone() for tokens in ids]
    for i in range(3):
        alone.start(1)
        for step, tokens in enumerate(ids):
            close("logits", together[step][i], alone.feed([tokens[i]]), EXACT)


def test_a_model_of_bytes_end_to_end(tmp_path, library):
    path = tmp_path / "m.pth"
    write_checkpoint(
        path,
        random_tensors(dataclasses.replace(odd(7), vocab_size=256)).items(),
        {"tokenizer": "bytes", "template": "rwkv:hermes"},
    )
    export(path, tmp_path / "m.gguf", "gguf", "F32")
    model, ours = llama.Llama(library, tmp_path / "m.gguf"), RWKV.load(path, torch.float64)
    text = "Grüße,\n\n<s> 世界 \x00\x7f!"
    ids = model.encode(text, special=True)
    assert ids == list(text.encode()) and model.decode(ids) == text.encode() and model.ends(0)
    tokens, state = ids, None
    with torch.no_grad():
        for _ in range(12):  # both go on with the same bytes
            got, (want, state) = model.feed(tokens), ours(torch.tensor([tokens]), state)
            close("logits", got, want[0, -1], EXACT)
            tokens = [int(got.argmax())]
            assert tokens == [int(want[0, -1].argmax())]


@pytest.fixture(scope="session")
def world(tmp_path_factory, library):
    folder = tmp_path_factory.mktemp("world")
    write_checkpoint(folder / "m.pth", random_tensors(make_arch(7, 1, 64, 64, 65536), torch.bfloat16).items())
    export(folder / "m.pth", folder / "m.gguf", "gguf")
    return llama.Llama(library, folder / "m.gguf")


def test_tokens_are_worlds(world):
    ours, draw = load_tokenizer("world", 65536), random.Random(0)
    vocabulary = [text for piece in ours.table.values() if (text := piece.decode(errors="ignore"))]
    texts = ["<s>", "[PAD65530]", "a <s> b\n\nc", "<|endoftext|>", 'it\'s "q" \\n \\x41 \\', "你好，世界 🌍"]
    texts += ["\x00\x01\x7f", "\u00ff\ufffd", "\r\n\t  x", "User: hi\n\nAssistant:", "\\xff[PAD65530]"]
    texts += ["".join(draw.choices(vocabulary, k=draw.randint(1, 30))) for _ in range(300)]
    ranges = ((32, 127), (0xA0, 0xD800), (0x10000, 0x20000))

    def letter():
        return chr(draw.choice([draw.randrange(*ends) for ends in ranges]))

    texts += ["".join(letter() for _ in range(draw.randint(1, 40))) for _ in range(100)]
    for text in texts:
        ids = ours.encode(text)
        assert world.encode(text) == ids and world.encode(text, special=True) == ids, text
        assert world.decode(ids) == text.encode(), text
    assert [token for token in range(65536) if world.ends(token)] == [0, 261]
    # only a program that looks for control tokens in it finds token 0 here
    assert world.encode("\\xff<s>") == ours.encode("\\xff<s>")


def test_llama_cpps_own_function_knows_the_chat_template(world):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Hello  there\n"},
        {"role": "assistant", "content": "Hi. "},
        {"role": "user", "content": "A\nB"},
    ]
    for count in (1, 2, 4):
        ask = messages[count - 1]["role"] == "user"
        want = "".join(text for text, _ in RwkvTemplate("rwkv").segments(messages[:count], ask=ask))
        # the function ends every turn
        assert world.chat(messages[:count], ask) == want + ("" if ask else "\n\n")


def test_another_file_is_not_loaded(tmp_path, library):
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(RuntimeError, match="does not load"):
        llama.Llama(library, tmp_path / "m.gguf")


def test_a_flower_ends_a_turn(tmp_path, library):
    """And no blank line does, which thoughts hold."""
    path = tmp_path / "m.pth"
    tensors = random_tensors(make_arch(7, 1, 64, 64, 65536))
    write_checkpoint(path, tensors.items(), {"tokenizer": "world", "template": "flower:json"})
    assert not any("stop llama.cpp" in note for note in export(path, tmp_path / "m.gguf", "gguf").notes)
    model, world = llama.Llama(library, tmp_path / "m.gguf"), load_tokenizer("world", 65536)
    assert [token for token in range(65536) if model.ends(token)] == [0, *world.encode("✿")]
    asked = RwkvTemplate("flower").segments([{"role": "user", "content": "a"}], ask=True)[0].text
    assert model.encode(asked, special=True) == world.encode(asked)
    model.close()


def test_a_chat_begins_with_the_bos(tmp_path, library):
    """llama.cpp's tokenizer adds none, whatever add_bos_token says, so the chat template begins with it."""
    path = tmp_path / "m.pth"
    tensors = random_tensors(make_arch(7, 1, 64, 64, 65536))
    write_checkpoint(path, tensors.items(), {"tokenizer": "world", "bos": [0]})
    export(path, tmp_path / "m.gguf", "gguf")
    model, world = llama.Llama(library, tmp_path / "m.gguf"), load_tokenizer("world", 65536)
    begin, _, _ = model.chat_template().partition("{")
    assert model.encode(begin + "User: hi", special=True) == [0, *world.encode("User: hi")]
    assert 0 not in model.encode(begin + "User: hi"), "what a user types is text"
    model.close()


@pytest.fixture(scope="module")
def lora(library):
    """lora(model, path): use a LoRA from here on; path None: none."""
    library.llama_adapter_lora_init.restype = ctypes.c_void_p
    library.llama_adapter_lora_init.argtypes = ctypes.c_void_p, ctypes.c_char_p
    library.llama_set_adapters_lora.argtypes = (*[ctypes.c_void_p] * 2, ctypes.c_size_t, ctypes.c_void_p)

    def use(model, path):
        adapter = library.llama_adapter_lora_init(model.model, str(path).encode())
        assert adapter, f"llama.cpp does not load {path}"
        adapters, scales = (ctypes.c_void_p * 1)(adapter), (ctypes.c_float * 1)(1.0)
        assert library.llama_set_adapters_lora(model.context, adapters, 1, scales) == 0

    return use


ALL = ["receptance", "key", "value", "output", "gate", "head"]


@pytest.mark.parametrize(
    "version,method,options",
    [
        (7, "miss", {"rank": 5}),
        (6, "miss", {"rank": 12, "scale": "sqrt", "rank_map": {"ffn": 3}, "targets": ALL}),
        (7, "lora", {"rank": 4, "alpha": 11, "rslora": True, "targets": ALL[:4] + ["head"]}),
    ],
)
def test_an_adapter_is_its_merged_file(tmp_path, library, lora, version, method, options):
    base, adapter, merged = (tmp_path / f"{name}.pth" for name in ("base", "adapter", "merged"))
    write_checkpoint(base, random_tensors(odd(version)).items())
    model = RWKV.load(base)
    rwkv_miss.inject(model, method, **options)
    rwkv_miss.save_adapter(filled(model, 1), adapter)
    rwkv_miss.merge_file(base, adapter, merged)
    ids = torch.randint(200, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        want, plain = (RWKV.load(path, torch.float64)(torch.tensor([ids]))[0][0] for path in (merged, base))
    found = {}
    for name, path, kind in (("F32", base, "F32"), ("BF16", base, "BF16"), ("merged", merged, "BF16")):
        export(path, tmp_path / "m.gguf", "gguf", kind, settings=TextSettings("none"))
        model = llama.Llama(library, tmp_path / "m.gguf")
        if path is base:
            export(adapter, tmp_path / "a.gguf", "gguf", kind)
            lora(model, tmp_path / "a.gguf")
        found[name] = torch.stack([model.feed([token]) for token in ids])
        model.close()
    close("logits", found["F32"], want, EXACT)
    # factors and weights are rounded as much as merged weights are
    assert lost(found["BF16"], want)[0] < 2.5 * lost(found["merged"], want)[0]
    assert lost(plain, want)[0] > 1e-2, "the adapter changes too little to show"
