"""The decoder of the CPU against the model in float64: logits, states, every kind of weights, and the way
into the chat and back.
"""

import collections
import copy
import ctypes
import dataclasses
import io
import itertools
import re
import shutil
import subprocess
import time
import weakref

import pytest
import torch
from torch.nn.functional import kl_div

import rwkv_miss
from benchmarks import decode as benchmark
from rwkv_miss import UserError
from rwkv_miss.adapter import adapted_linears
from src.common.device import cpu_features
from src.data.collate import padded_left
from src.data.tokenizer import load_tokenizer
from src.inference import bf16_products, cpu_decoder, int8_panels
from src.inference.adapters import BASE, Adapters, Applied
from src.inference.cpu_decoder import Decoder
from src.inference.decoder_tensors import int8_rows
from src.inference.decoders import fastest, for_training
from src.inference.engine import Engine, Request
from src.inference.load import load
from src.inference.sampling import Sampling
from src.inference.torch_decoder import TorchDecoder
from src.model import RWKV, LayerState
from src.ops import build, native

from .conftest import close, make_arch, random_tensors

# fp32 sums against float64, relative to the largest logit: 3e-7 to 3e-6 seen. Goldens' README: 2e-5 between
# independent fp32 runtimes
TOLERANCE = 2e-5

SIZES = [
    dict(version=7),
    dict(version=6),
    dict(version=7, n_layer=3, n_embd=72, head_size=8, vocab_size=101),
    dict(version=6, n_layer=3, n_embd=40, head_size=8, vocab_size=33),
    dict(version=7, n_layer=1, n_embd=528, head_size=24),
    dict(version=6, n_layer=1, n_embd=320, head_size=64),
    dict(version=6, n_embd=50, dim_att=48, dim_ffn=70),
    dict(version=6, n_embd=24, dim_att=64, dim_ffn=7),
    dict(version=7, dim_ffn=8237),
    dict(version=7, layer0_value_residual=False),
    dict(version=7, initial_state=True),
    dict(version=6, initial_state=True),
]


def make(version, dim_att=None, dim_ffn=None, layer0_value_residual=None, initial_state=False, **sizes):
    arch = make_arch(version, **sizes)
    changes = {"dim_att": dim_att, "dim_ffn": dim_ffn, "layer0_value_residual": layer0_value_residual}
    if dim_att:
        changes["n_head"] = dim_att // arch.head_size
    return dataclasses.replace(
        arch,
        initial_state=initial_state,
        **{name: value for name, value in changes.items() if value is not None},
    )


def model_of(arch, tensors, dtype):
    """The model as the CPU runs it, in `dtype`; states stay fp32."""
    model = RWKV(arch, "cpu" if dtype != torch.float64 else "torch").to(dtype).eval().requires_grad_(False)
    model.load_state_dict(tensors)
    for block in model.blocks:
        if block.att.time_state is not None and dtype != torch.float64:
            block.att.time_state.data = tensors[f"blocks.{block.att.layer}.att.time_state"].float()
    return model


def some_ids(arch, count, seed=1):
    return torch.randint(arch.vocab_size, (1, count), generator=torch.Generator().manual_seed(seed))


def one_by_one(model, ids, state=None):
    """(logits (T, V), state): every token by itself."""
    logits, read = [], model.next_logits if isinstance(model, RWKV) else model.read
    for i in range(ids.shape[1]):
        part, state = read(ids[:, i : i + 1], state)
        logits.append(part)
    return torch.cat(logits), state


def close_states(got, want, ratio):
    for layer, (a, b) in enumerate(zip(got, want, strict=True)):
        for name in a._fields:
            close(f"layer {layer}, {name}", getattr(a, name), getattr(b, name), ratio)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_logits_and_states_are_the_models(sizes, dtype):
    """Weights in bf16 cost nothing: the float64 model has the rounded ones, and fp32's tolerance holds."""
    arch = make(**sizes)
    tensors = {name: t if "time_state" in name else t.to(dtype) for name, t in random_tensors(arch).items()}
    ids = some_ids(arch, 19)
    want, want_state = one_by_one(model_of(arch, tensors, torch.float64), ids)
    decoder = Decoder(model_of(arch, tensors, dtype))
    got, state = one_by_one(decoder, ids)
    close("logits", got, want, TOLERANCE)
    close_states(state, want_state, TOLERANCE)
    assert all(part.dtype == torch.float32 for layer in state for part in layer)


def test_the_benchmarks_divergence_of_a_prompt_is_that_of_one_that_is_read_at_once(tmp_path):
    benchmark.write_base(tmp_path / "base.pth", 7, 2, 64)
    exact, half = (benchmark.Ours(tmp_path / "base.pth", dtype) for dtype in (torch.float32, torch.bfloat16))
    ids = list(range(1, 41))
    logits = benchmark.one_by_one(exact, ids)
    found = benchmark.divergences(half, logits, ids)
    read = {length: half.decoder.read(torch.tensor([ids[:length]]), None)[0] for length in (40, 24, 8)}
    each = [
        kl_div(got.log_softmax(-1), logits[length - 1].log_softmax(-1), reduction="sum", log_target=True)
        for length, got in read.items()
    ]
    assert found["kl_prompt"] == pytest.approx(float(sum(each) / 3), rel=0.05, abs=1e-7)
    assert abs(found["kl"]) < 1e-6, "weights in bf16 cost nothing where the state is fp32"


@pytest.mark.parametrize(
    "name", ["golden/rwkv6-tiny", "golden/rwkv7-tiny", "real/rwkv7-reverse", "real/rwkv6-3m-utf16"]
)
def test_golden_logits_and_states(data_dir, name):
    golden = torch.load(data_dir / f"{name}.golden.pt", weights_only=True)
    # the real v6 file is bf16 and stays so
    decoder = Decoder(RWKV.load(data_dir / f"{name}.pth", kernel="cpu"))
    for row, ids in enumerate(golden["tokens"].long()):
        logits, state = one_by_one(decoder, ids[None])
        close("logits", logits, golden["logits64"][row], TOLERANCE)
        wanted = [
            LayerState(*(want[part][row : row + 1] for part in LayerState._fields))
            for want in golden["final_state"]
        ]
        close_states(state, wanted, TOLERANCE)


@pytest.mark.parametrize("version", [6, 7])
def test_int8_weights_are_a_byte_each_and_no_further_off(version, monkeypatch):
    """Without panels the decoder has the error of the rounded weights and none of its own: float64 with the
    same weights is the reference.
    """
    monkeypatch.setattr(int8_panels, "instruction_is_there", lambda: False)
    arch = make(version, n_embd=72, head_size=8, vocab_size=101)
    tensors = random_tensors(arch)
    rounded = dict(tensors)
    for name, weight in tensors.items():
        if name.endswith(".weight") and weight.dim() == 2 and name != "emb.weight":
            values, scale = int8_rows(weight)
            rounded[name] = values.double() * scale.double().unsqueeze(1)
            assert (
                (rounded[name] - weight).abs() <= weight.abs().amax(1, keepdim=True) / 254 * (1 + 1e-5)
            ).all()
    ids = some_ids(arch, 19)
    want, want_state = one_by_one(model_of(arch, rounded, torch.float64), ids)
    decoder = Decoder(model_of(arch, tensors, torch.float32), int8=True)
    got, state = one_by_one(decoder, ids)
    close("logits", got, want, TOLERANCE)
    close_states(state, want_state, TOLERANCE)
    assert (got - one_by_one(Decoder(decoder.model), ids)[0]).abs().max() > 1e-3 * want.abs().max(), (
        "nothing was quantised"
    )


@pytest.mark.parametrize("version", [6, 7])
def test_int8_panels_are_off_by_their_rounding(version, monkeypatch):
    """Also where the sizes fill no panel, and after the weights changed. Rounded weights and activations have
    a relative error of about 0.01 each; in these models 0.006 to 0.02 of the largest logit was seen.
    """
    monkeypatch.setattr(int8_panels, "instruction_is_there", lambda: True)
    arch = make(version, n_embd=72, head_size=8, vocab_size=101)
    tensors, ids = random_tensors(arch), some_ids(arch, 19)
    model = model_of(arch, tensors, torch.float32)
    decoder = Decoder(model, int8=True)
    for change in ("none", "head.weight"):
        if change != "none":
            tensors[change] = tensors[change].flip(0)
            model.head.weight = torch.nn.Parameter(tensors[change], requires_grad=False)
            decoder.refresh()
        want, _ = one_by_one(model_of(arch, tensors, torch.float64), ids)
        got, _ = one_by_one(decoder, ids)
        assert 1e-3 < (got - want).abs().max() / want.abs().max() < 0.04, change


def test_int8_is_as_close_as_llama_cpps_q8_0(data_dir, monkeypatch):
    """A real model: the divergence of its next token from that with exact weights, in nats. llama.cpp 0.5.0's
    Q8_0 has 7.5e-5 on this text.
    """
    monkeypatch.setattr(int8_panels, "instruction_is_there", lambda: True)
    model = RWKV.load(data_dir / "real/rwkv6-3m-utf16.pth", kernel="cpu")
    text = "First Citizen: Before we proceed any further, hear me speak. All: Speak, speak."
    ids = torch.tensor([list(text.encode("utf-16-le"))])
    want, got = (one_by_one(Decoder(model, int8=int8), ids)[0] for int8 in (False, True))
    found = kl_div(got.log_softmax(-1), want.log_softmax(-1), reduction="batchmean", log_target=True)
    assert 0 < found < 7.5e-5


@pytest.mark.parametrize("version", [6, 7])
def test_bf16_weights_have_activations_in_two_parts_or_one(version, monkeypatch):
    """As on a CPU with instructions for bf16. Two parts keep the tolerance of fp32, one is off by up to 2^-8
    of each activation. Without the instructions one part is an error.
    """
    arch = make(version, n_embd=72, head_size=8, vocab_size=101)
    tensors = {name: t.bfloat16() for name, t in random_tensors(arch).items()}
    model, ids = model_of(arch, tensors, torch.bfloat16), some_ids(arch, 19)
    want, _ = one_by_one(model_of(arch, tensors, torch.float64), ids)
    monkeypatch.setattr(bf16_products, "instruction_is_there", lambda: False)
    plain, _ = one_by_one(Decoder(model), ids)
    with pytest.raises(UserError, match="--activations bf16: this CPU has no"):
        fastest(model, bf16_activations=True)
    monkeypatch.setattr(bf16_products, "instruction_is_there", lambda: True)
    pairs, _ = one_by_one(fastest(model)[0], ids)
    close("two parts", pairs, want, TOLERANCE)
    assert not torch.equal(pairs, plain), "the instructions' products were not used"
    single, _ = one_by_one(fastest(model, bf16_activations=True)[0], ids)
    assert 2e-4 < (single - want).abs().max() / want.abs().max() < 0.03


def test_a_row_of_zeros_is_zeros_in_int8():
    values, scale = int8_rows(torch.tensor([[0.0, 0.0], [1.0, -2.0]]))
    assert values.tolist() == [[0, 0], [64, -127]] and scale.tolist() == pytest.approx([0, 2 / 127])


def decoder_library(command):
    """The decoder's sources in a library of their own, built with this command."""
    sources = [
        build.CUDA / f"{name}_cpu.cpp"
        for name in ("decode", "decode_products", "bf16_products", "int8_panels")
    ]
    path = build.build(
        "decoder", "the decoder", 10, sources, build.headers(), command, ["-pthread"], cpu_features()
    )
    return ctypes.CDLL(str(path))


@pytest.fixture(scope="module", params=["one build", pytest.param("all builds", marks=pytest.mark.rare)])
def other_builds(request):
    """The decoder as other compilers make it. Left to itself, gcc fuses products and sums where it tunes for
    Skylake, and in a part of a loop only where it tunes for Zen.
    """
    if request.param == "one build":
        return []
    commands = []
    for name, *flags in (("g++", "-mtune=skylake"), ("g++", "-mtune=znver4"), ("clang++",)):
        compiler = shutil.which(name)
        asked = [compiler, *flags, "-E", "-x", "c++", "/dev/null"]
        if compiler and subprocess.run(asked, capture_output=True).returncode == 0:
            commands.append([*build.cpu_command(compiler), *flags])
    return [decoder_library(command) for command in commands]


WIDE = {"version": 7, "n_embd": 528, "head_size": 24}


@pytest.mark.parametrize(
    "sizes, int8",
    [
        *((WIDE, int8) for int8 in ("", "rows", "panels")),
        (SIZES[2], ""),
        (SIZES[3], "rows"),
        (SIZES[6], "panels"),
        ({"version": 7, "dim_ffn": 8237}, "panels"),
    ],
    ids=str,
)
def test_any_compiler_and_number_of_threads_gives_the_same_bits(sizes, int8, other_builds, monkeypatch):
    monkeypatch.setattr(int8_panels, "instruction_is_there", lambda: int8 == "panels")
    arch = make(**sizes)
    model = model_of(arch, random_tensors(arch), torch.float32)
    results = []
    for library in (native.library("cpu"), *other_builds):
        monkeypatch.setattr(native, "library", lambda device, library=library: library)
        for threads in (1, 2, 3, 7):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            decoder = Decoder(model, int8=bool(int8))
            results.append(one_by_one(decoder, some_ids(arch, 9)))
            decoder.close()
    for logits, state in results[1:]:
        assert torch.equal(logits, results[0][0])
        assert all(torch.equal(a, b) for old, new in zip(results[0][1], state) for a, b in zip(old, new))


@pytest.mark.parametrize("sizes", [SIZES[0], SIZES[1], SIZES[6], SIZES[10], SIZES[11]], ids=str)
def test_the_state_passes_between_prompt_and_answer_and_back(sizes):
    """Prompt, single tokens, a second prompt, and the model itself going on from there: as if all of it had
    been read at once.
    """
    arch = make(**sizes)
    tensors = random_tensors(arch)
    ids = some_ids(arch, 41)
    want, want_state = model_of(arch, tensors, torch.float64)(ids)
    model = model_of(arch, tensors, torch.float32)
    decoder = Decoder(model)
    logits, state = decoder.read(ids[:, :17], None)
    close("prompt", logits, want[:, 16], TOLERANCE)
    logits, state = one_by_one(decoder, ids[:, 17:21], state)
    close("answer", logits, want[0, 17:21], TOLERANCE)
    logits, state = decoder.read(ids[:, 21:34], state)
    close("second prompt", logits, want[:, 33], TOLERANCE)
    logits, state = model(ids[:, 34:], state)
    close("model", logits, want[:, 34:], TOLERANCE)
    close_states(state, want_state, TOLERANCE)


@pytest.mark.parametrize("reading, ratio", [(torch.float32, TOLERANCE), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("version", [6, 7])
def test_a_prompt_is_read_in_fp32_where_the_cpu_has_no_bf16(version, reading, ratio, monkeypatch):
    """With weights that stay bf16: then as exactly as single tokens are; else with the rounding of bf16
    activations, 0.01 seen.
    """
    monkeypatch.setattr(cpu_decoder, "multiplies_bf16", lambda: reading == torch.bfloat16)
    arch = make(version)
    tensors = {name: t.bfloat16() for name, t in random_tensors(arch).items()}
    ids = some_ids(arch, 30)
    want, want_state = model_of(arch, tensors, torch.float64)(ids)
    decoder = Decoder(model_of(arch, tensors, torch.bfloat16))
    _, state = decoder.read(ids[:, :20], None)
    logits, state = decoder.read(ids[:, 20:], state)
    error = (logits - want[:, -1]).abs().max() / want.abs().max()
    assert error < ratio and (error > TOLERANCE) == (reading == torch.bfloat16)
    close_states(state, want_state, ratio)


def test_states_that_are_kept_stay_as_they_are():
    arch = make(7)
    decoder = Decoder(model_of(arch, random_tensors(arch), torch.float32))
    states, copies = [None], [None]
    for token in some_ids(arch, 12)[0].tolist():
        _, state = decoder.read(torch.tensor([[token]]), states[-1])
        states.append(state)
        copies.append(copy.deepcopy(state))
    for kept, before in zip(states[1:], copies[1:]):
        assert all(torch.equal(a, b) for old, new in zip(kept, before) for a, b in zip(old, new))
    first, _ = decoder.read(torch.tensor([[3]]), states[4])
    assert torch.equal(first, decoder.read(torch.tensor([[3]]), copies[4])[0])


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("method", ["miss", "lora", "state"])
def test_adapters_of_every_kind_lose_nothing(version, method, checkpoint, tmp_path):
    """On a bf16 base, factors of an adapter are in fp32, a tensor that is trained as a whole stays fp32, and
    the rest stays the file's bf16.
    """
    base, vocabulary = checkpoint(version, torch.bfloat16), tmp_path / "vocabulary.txt"
    vocabulary.write_text("".join(f"{i} {bytes([64 + i])!r} 1\n" for i in range(1, 60)))
    trained = RWKV.load(base)
    options = {} if method == "state" else {"rank": 5}
    rwkv_miss.inject(trained, method, train_parts="ln,time,head", **options)
    torch.manual_seed(2)
    for p in (p for p in trained.parameters() if p.requires_grad):
        p.data += 0.05 * torch.randn_like(p)
    rwkv_miss.save_adapter(trained, tmp_path / "adapter.pth")
    exact = RWKV.load(base, torch.float64)
    rwkv_miss.load_adapter(exact, tmp_path / "adapter.pth")
    for parameter in exact.parameters():
        parameter.data = parameter.double()
    model, _ = load(base, tmp_path / "adapter.pth", str(vocabulary), accelerator="cpu")
    decoder, how = fastest(model)
    ids = some_ids(model.arch, 19)
    with torch.no_grad():
        close("logits", one_by_one(decoder, ids)[0], exact(ids)[0][0], TOLERANCE)
    assert model.emb.weight.dtype == torch.bfloat16 and not adapted_linears(model)
    assert isinstance(decoder, Decoder)
    assert (
        load(base, None, str(vocabulary), accelerator="cpu", precision="fp32")[0].emb.weight.dtype
        == torch.float32
    )


@pytest.mark.parametrize(
    "version, method", [(7, "miss"), (6, "lora"), (7, "vera"), (6, "state"), (7, "none")]
)
def test_a_model_between_two_steps_of_its_training_answers_as_it_is_then(version, method):
    arch = make(version, n_embd=72, head_size=8, vocab_size=101)
    model = RWKV(arch, "cpu")
    model.load_state_dict(random_tensors(arch))
    if method != "none":
        options = {} if method == "state" else {"rank": 5}
        rows = {"train_parts": "ln,emb,head", "tokens": [7, 30]} if method == "miss" else {}
        rwkv_miss.inject(model, method, **{"train_parts": "ln,time,head", **rows, **options})
    model.eval()
    ids = torch.cat([some_ids(arch, 6, seed) for seed in range(3)])
    for step in range(2):
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(step)
            for p in (p for p in model.parameters() if p.requires_grad):
                p += 0.05 * torch.randn_like(p)
        decoder = for_training(model, 4)
        assert isinstance(decoder, Decoder)
        for row in range(3):
            decoder.put(row, decoder.read(ids[row : row + 1, :4], None)[1])
        for t in (4, 5):
            logits = decoder.step(ids[:, t].tolist(), [BASE] * 3)
        decoder.close()
        exact = copy.deepcopy(model)
        exact.set_kernel("torch")
        with torch.no_grad():
            close("logits", logits, exact.double()(ids)[0][:, -1], TOLERANCE)


def test_a_bf16_file_is_used_where_it_is_mapped(checkpoint):
    model = RWKV.load(checkpoint(7, torch.bfloat16), kernel="cpu")
    kept = {tensor.data_ptr() for tensors in Decoder(model).kept.values() for tensor in tensors}
    assert kept > {
        p.data_ptr()
        for name, p in model.named_parameters()
        if p.squeeze().dim() > 1 and "r_k" not in name and "0.att.v" not in name
    }


@pytest.mark.parametrize("version", [6, 7])
def test_a_stream_says_the_same_with_and_without_it(version):
    arch = make(version, vocab_size=257)
    tensors = random_tensors(arch)
    tensors["head.weight"][0] -= 1  # the end of document
    model, tokenizer = model_of(arch, tensors, torch.float32), load_tokenizer("bytes", 257)
    for sampling in (Sampling(temperature=0), Sampling(1, 0.9, frequency_penalty=0.3)):
        request = Request(tokenizer.encode("hello"), 60, sampling, seed=2)
        said = []
        for decoder in (TorchDecoder(model, 1), fastest(model)[0]):
            (answer,) = next(Engine(decoder, tokenizer).run([request]))
            said.append(answer.text)
        assert said[0] == said[1] and len("".join(said[0])) > 10


def test_what_has_no_decoder_answers_in_torch():
    arch = make(7)
    plain, odd = RWKV(arch), RWKV(make(7, n_embd=36, head_size=12), "cpu")
    dora, pissa = (model_of(arch, random_tensors(arch), torch.float32) for _ in range(2))
    rwkv_miss.inject(dora, "dora", rank=4)
    rwkv_miss.inject(pissa, "pissa", rank=4)
    quantised = RWKV(arch, "cpu")
    quantised.quantise("int8", torch.float32)
    for model, why in (
        (plain, "kernel is torch"),
        (dora, "dora adds no factors"),
        (pissa, "pissa adds no factors"),
        (quantised, "base is quantised"),
        (odd, "multiples of 8"),
        (RWKV(arch, "cpu").half(), "float16"),
    ):
        asked, how = fastest(model)
        assert isinstance(asked, TorchDecoder) and why in how
        assert isinstance(for_training(model, 2), TorchDecoder)
        with pytest.raises(UserError, match=f"--quant int8.*{why}"):
            fastest(model, int8=True)
        with pytest.raises(ValueError, match=why):
            Decoder(model)


def test_bad_tokens_are_errors_and_overflows_are_seen():
    arch = make(7)
    decoder = Decoder(model_of(arch, random_tensors(arch), torch.float32))
    for token in (-1, arch.vocab_size):
        with pytest.raises(IndexError, match=f"token {token}"):
            decoder.read(torch.tensor([[token]]), None)
    for name in ("blocks.1.ffn.key.weight", "emb.weight"):  # logits that overflow, and a norm's variance
        loud = random_tensors(arch)
        loud[name] *= 1e30
        logits, _ = Decoder(model_of(arch, loud, torch.float32)).read(torch.tensor([[1]]), None)
        assert not logits.isfinite().all()


def test_states_of_other_models_and_other_shapes_are_errors():
    """By name, and before the native code reads where nothing is."""
    decoder, one = Decoder(RWKV(make(7), "cpu")), torch.tensor([[1]])
    _, state = decoder.read(one, None)
    for shape in ((2, 1), (0, 1), (1, 0), (1,), (1, 1, 1)):
        with pytest.raises(ValueError, match=rf"ids are {re.escape(str(shape))}, expected \(1, T\)"):
            decoder.read(torch.ones(shape, dtype=torch.int64), state)
    wrong = [
        (state[:-1], "has 1 layers, expected 2"),
        ([state[0], state[1]._replace(ffn_x=None)], "ffn_x of layer 1's state is None"),
    ]
    for name in LayerState._fields:
        part = getattr(state[1], name)
        for other in (part[..., :-1], torch.cat([part, part]), part[0]):
            seen, expected = (re.escape(str(tuple(t.shape))) for t in (other, part))
            wrong.append(
                (
                    [state[0], state[1]._replace(**{name: other})],
                    f"{name} of layer 1's state is {seen}, expected {expected}",
                )
            )
    for ids in (one, torch.tensor([[1, 2, 3]])):
        for tensors, why in wrong:
            with pytest.raises(ValueError, match=why):
                decoder.read(ids, tensors)


def test_a_closed_decoder_is_an_error():
    decoder = Decoder(RWKV(make(7), "cpu"))
    decoder.close()
    decoder.close()
    for ids in ([[1]], [[1, 2]]):
        with pytest.raises(ValueError, match="closed"):
            decoder.read(torch.tensor(ids), None)


def test_waiting_threads_use_no_time_and_end(monkeypatch):
    """The pool sleeps between tokens, and its threads are gone once it is closed."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    arch = make(7)
    before = threads()
    decoder = Decoder(model_of(arch, random_tensors(arch), torch.float32))
    decoder.read(torch.tensor([[1]]), None)
    time.sleep(0.05)
    start = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - start < 0.1 and threads() == before + 3
    decoder.close()
    # Linux wakes who waits for a thread's end before it has taken it off the list
    end = time.monotonic() + 5
    while threads() != before and time.monotonic() < end:
        time.sleep(0.01)
    assert threads() == before


def threads():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("Threads"))


def test_flags_reach_the_decoder(checkpoint, capsys, monkeypatch):
    """The one line that a chat says names what --quant, --precision and --wkv chose; the answer is that of
    the plain model.
    """
    from demo import chat

    path = checkpoint(7, torch.bfloat16, vocab_size=257)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    for flags, line in (
        ([], "bfloat16 weights"),
        (["--quant", "int8"], "int8 weights"),
        (["--precision", "fp32"], "float32 weights"),
        (["--huge_pages", "yes"], "KiB copied, "),
        (["--wkv", "torch"], "in torch"),
    ):
        chat.main(["--model", str(path), "--tokenizer", "bytes", "--accelerator", "cpu", *flags])
        assert line in capsys.readouterr().err
    answers = []
    for flags in (["--wkv", "torch"], []):
        chat.main(
            [
                *f"--model {path} --tokenizer bytes --prompt hello --temperature 0 --max_tokens 40".split(),
                *flags,
            ]
        )
        answers.append(capsys.readouterr().out)
    assert answers[0][:20] == answers[1][:20] != ""


ROWS_OF = (1, 2, 3, 5, 16, 17)


def rows_in_step(decoder, starts, tokens, applied, count):
    """(logits (T, count, V), states) of the first rows after tokens (T, rows), each from its start."""
    for row, start in enumerate(starts[:count]):
        decoder.put(row, start)
    logits = [decoder.step(each[:count].tolist(), applied[:count]) for each in tokens]
    return torch.stack(logits), [decoder.take(row) for row in range(count)]


@pytest.mark.parametrize(
    "sizes, dtype, int8",
    [
        (SIZES[2], torch.bfloat16, ""),
        (SIZES[3], torch.float32, ""),
        (dict(version=7, n_layer=2, n_embd=328, head_size=8, dim_ffn=523, vocab_size=77), torch.bfloat16, ""),
        (
            dict(version=7, n_layer=2, n_embd=144, head_size=48, dim_ffn=211, vocab_size=65),
            torch.float32,
            "panels",
        ),
        (
            dict(version=6, n_layer=2, n_embd=136, head_size=8, dim_ffn=77, vocab_size=19),
            torch.bfloat16,
            "rows",
        ),
        (SIZES[6], torch.bfloat16, ""),
        (SIZES[7], torch.bfloat16, "panels"),
    ],
    ids=str,
)
def test_a_row_has_the_same_bits_in_any_company(sizes, dtype, int8, monkeypatch):
    """Alone, with 1 to 16 other rows, with one thread and two: logits and states."""
    monkeypatch.setattr(int8_panels, "instruction_is_there", lambda: int8 == "panels")
    arch = make(**sizes)
    model = model_of(arch, {name: t.to(dtype) for name, t in random_tensors(arch).items()}, dtype)
    tokens = some_ids(arch, 3 * max(ROWS_OF)).view(3, -1)
    alone = None
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        decoder = Decoder(model, max(ROWS_OF), int8=bool(int8))
        if alone is None:
            starts = [decoder.read(some_ids(arch, 1, seed), None)[1] for seed in range(max(ROWS_OF))]
            alone = [
                rows_in_step(decoder, [start], tokens[:, row : row + 1], [BASE], 1)
                for row, start in enumerate(starts)
            ]
        for count in ROWS_OF:
            logits, states = rows_in_step(decoder, starts, tokens, [BASE] * count, count)
            for row, (want, (want_state,)) in enumerate(alone[:count]):
                assert torch.equal(logits[:, row], want[:, 0]), f"row {row} of {count}, {threads} threads"
                assert equal_states(states[row], want_state), f"row {row} of {count}, {threads} threads"
        decoder.close()


def equal_states(got, want):
    return all(torch.equal(a, b) for old, new in zip(got, want) for a, b in zip(old, new))


@pytest.mark.parametrize("version", [6, 7])
def test_steps_of_rows_are_the_models(version):
    """Rows with tokens and states of their own against the model in float64; rows move."""
    arch = make(version, n_embd=72, head_size=8, vocab_size=101)
    tensors = random_tensors(arch)
    ids = torch.cat([some_ids(arch, 12, seed) for seed in range(5)])
    exact = model_of(arch, tensors, torch.float64)
    decoder = Decoder(model_of(arch, tensors, torch.float32), 6)
    for row in range(5):
        decoder.put(row, decoder.read(ids[row : row + 1, :4], None)[1])
    for t in range(4, 12):
        if t == 8:  # the first row ends, the last one moves into its place
            decoder.move(4, 0)
            ids = ids[[4, 1, 2, 3]]
        logits = decoder.step(ids[:, t].tolist(), [BASE] * len(ids))
    want, states = exact(ids)
    close("logits", logits, want[:, -1], TOLERANCE)
    for row in range(4):
        taken = decoder.take(row)
        close_states(
            taken, [LayerState(*(part[row : row + 1] for part in layer)) for layer in states], TOLERANCE
        )
    again = decoder.take(0)
    decoder.step(ids[:, 0].tolist(), [BASE] * 4)
    assert equal_states(taken, decoder.take(3)) is False and equal_states(again, decoder.take(0)) is False


@pytest.mark.parametrize("sizes", [SIZES[2], SIZES[3], SIZES[10], SIZES[11]], ids=str)
def test_prompts_read_together_are_those_read_alone(sizes):
    arch = make(**sizes)
    tensors = random_tensors(arch)
    exact, decoder = (
        model_of(arch, tensors, torch.float64),
        Decoder(model_of(arch, tensors, torch.float32), 4),
    )
    prompts = [some_ids(arch, length, length)[0].tolist() for length in (19, 3, 17, 19)]
    logits, state = decoder.read_together(*padded_left(prompts))
    for row, prompt in enumerate(prompts):
        want, want_state = exact.next_logits(torch.tensor([prompt]))
        close("logits", logits[row : row + 1], want, TOLERANCE)
        row_state = [LayerState(*(part[row : row + 1] for part in layer)) for layer in state]
        close_states(row_state, want_state, TOLERANCE)


def adapters_of(path, tmp_path, methods):
    """A bf16 model with a random adapter of each method, (name, method, rank)."""
    files = {}
    for name, method, rank in methods:
        trained = RWKV.load(path)
        rwkv_miss.inject(trained, method, rank=rank)
        torch.manual_seed(len(files))
        for p in (p for p in trained.parameters() if p.requires_grad):
            p.data += 0.05 * torch.randn_like(p)
        files[name] = tmp_path / f"{name}.pth"
        rwkv_miss.save_adapter(trained, files[name])
    model = RWKV.load(path, kernel="cpu").eval().requires_grad_(False)
    return Adapters(model, files)


@pytest.mark.parametrize("version, int8", [(7, False), (6, True)])
def test_every_row_has_its_own_adapter(version, int8, checkpoint, tmp_path, monkeypatch):
    """Several adapters in one batch, of one method and rank and of others, at strengths of their own: each
    row's bits are those of the row alone, and the numbers those of Adapters.use.
    """
    adapters = adapters_of(
        checkpoint(version, torch.bfloat16, n_embd=72, head_size=8),
        tmp_path,
        [("a", "miss", 5), ("b", "miss", 5), ("c", "miss", 32), ("d", "lora", 20)],
    )
    choices = [(), ("a",), ("b",), ("a",), ("c",), ("d",), (), ("b",), ("d",), ("a", "d"), ("a",)]
    applied = [Applied(names, 0.5 + 0.25 * row) if names else BASE for row, names in enumerate(choices)]
    tokens = some_ids(adapters.model.arch, 3 * len(applied)).view(3, -1)
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        decoder = Decoder(adapters.model, len(applied), adapters, int8=int8)
        start = adapters.model.initial_state(1)
        logits, _ = rows_in_step(decoder, [start] * len(applied), tokens, applied, len(applied))
        for row, one in enumerate(applied):
            want, _ = rows_in_step(decoder, [start], tokens[:, row : row + 1], [one], 1)
            assert torch.equal(logits[:, row], want[:, 0]), f"row {row}, {one}, {threads} threads"
            if threads == 1:
                adapters.use(one.names, one.scale)
                decoder.refresh()
                used, state = one_by_one(decoder, tokens[None, :, row])
                assert torch.equal(used, want[:, 0]), one
                adapters.use()
                decoder.refresh()
                base, _ = one_by_one(decoder, tokens[None, :, row])
                assert torch.equal(used, base) == (one == BASE)
        decoder.close()


def test_combinations_of_adapters_come_and_go_with_their_rows(checkpoint, tmp_path):
    """As many as there are rows are kept, and one that was forgotten has the same bits again."""
    names = "abcd"
    adapters = adapters_of(checkpoint(7), tmp_path, [(name, "lora", 3) for name in names])
    decoder = Decoder(adapters.model, 2, adapters)
    start = adapters.model.initial_state(1)

    def logits(*choices):
        for row in range(2):
            decoder.put(row, start)
        return decoder.step([5] * len(choices), [Applied(tuple(choice)) for choice in choices])

    choices = [*names, *map("".join, itertools.permutations(names, 3))]
    want = {choice: logits(choice)[0] for choice in choices}
    assert len({tuple(row.tolist()) for row in want.values()}) > len(names)
    copies = [weakref.ref(tensor) for tensor in decoder.tables["d", "c", "b"].kept]
    logits("abc", "abd")
    assert copies and not any(copy() is not None for copy in copies)
    for pair in zip(choices, reversed(choices), strict=True):
        assert all(torch.equal(got, want[one]) for got, one in zip(logits(*pair), pair)), pair
        sizes = collections.Counter(map(len, decoder.tables))
        assert sizes == {1: 4, 3: 2} and {table.number for table in decoder.tables.values()} == {*range(6)}


def test_a_row_that_overflows_spoils_no_other(checkpoint, tmp_path):
    adapters = adapters_of(checkpoint(7, torch.bfloat16), tmp_path, [("a", "miss", 4)])
    decoder = Decoder(adapters.model, 3, adapters)
    loud = Applied(("a",), 1e38)
    logits = decoder.step([1, 2, 3], [BASE, loud, BASE])
    assert not logits[1].isfinite().all()
    decoder = Decoder(adapters.model, 3, adapters)
    assert torch.equal(decoder.step([1, 9, 3], [BASE] * 3)[[0, 2]], logits[[0, 2]])


def test_rows_that_are_not_there_are_errors():
    decoder = Decoder(RWKV(make(7), "cpu"), 2)
    state = decoder.take(1)
    for tokens, applied in (([], []), ([1, 2, 3], [BASE] * 3), ([1, 2], [BASE])):
        with pytest.raises(ValueError, match=f"{len(tokens)} tokens? for .*from 1 to 2"):
            decoder.step(tokens, applied)
    with pytest.raises(IndexError, match="token 67"):
        decoder.step([1, 67], [BASE] * 2)
    for call in (
        lambda: decoder.put(2, state),
        lambda: decoder.take(-1),
        lambda: decoder.move(0, 2),
        lambda: decoder.move(2, 0),
    ):
        with pytest.raises(ValueError, match="expected one of the decoder's 2"):
            call()
    with pytest.raises(ValueError, match="has 1 layers"):
        decoder.put(0, state[:1])
    with pytest.raises(ValueError, match="0 rows"):
        Decoder(decoder.model, 0)
    decoder.close()
    for call in (lambda: decoder.step([1], [BASE]), lambda: decoder.put(0, state), lambda: decoder.take(0)):
        with pytest.raises(ValueError, match="closed"):
            call()
