"""Live adapters: the same answers as a merged file's, for every method, and a base that is bit for bit what
it was.
"""

import pytest
import torch

import rwkv_miss
from rwkv_miss import METHODS, UserError
from src.data.tokenizer import load_tokenizer
from src.inference import int8_panels
from src.inference.adapter_stack import BASE, Applied
from src.inference.adapters import NEVER_CAST, Adapters, FittedAdapter, UnmergedLinear
from src.inference.cpu_decoder import Decoder
from src.inference.decoders import fastest
from src.inference.engine import Engine
from src.inference.load import load, load_with
from src.inference.torch_decoder import TorchDecoder
from src.model import RWKV, LayerState

from .answering import greedy_text
from .conftest import close, make_arch, random_tensors, slow
from .test_cpu_decoder import TOLERANCE, one_by_one, some_ids

# methods with those of their own options that lead to another form of the change
VARIANTS = [
    *((method, {}) for method in sorted(METHODS)),
    ("miss", {"layout": "contiguous"}),
    ("miss", {"shards": "balanced", "scale": "sqrt"}),
    ("miss", {"mini_r": 4}),
    ("miss", {"expand": True}),
    ("miss", {"magnitude": True}),
    ("bat", {"order": "row"}),
    ("pissa", {"niter": 0}),
    ("lora", {"train_parts": "emb,head", "tokens": [0, 3, 66, 200]}),
]
SIZES = {"n_embd": 40, "head_size": 8, "vocab_size": 257}  # no multiple of 16, the lanes of the native code


def train(base, out, method, seed=1, dtype=None, rank=4, **options):
    """An adapter file of random values for a base file."""
    model = RWKV.load(base, dtype)
    if METHODS[method].adapts_linears:
        options["rank"] = rank
    torch.manual_seed(seed)
    rwkv_miss.inject(model, method, **options)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn_like(p)
    rwkv_miss.save_adapter(model, out)
    return out


def merged_by_hand(base, adapters, folder, scale):
    """float64 model of the base file + scale (merged - base) of every adapter file. Each is merged once."""
    before = rwkv_miss.read_checkpoint(base)
    result = {name: tensor.double() for name, tensor in before.items()}
    for adapter in adapters:
        merged = folder / f"{adapter.stem}-merged.pth"
        if not merged.exists():
            rwkv_miss.merge_file(base, adapter, merged, "fp32")
        for name, tensor in rwkv_miss.read_checkpoint(merged).items():
            start = before.get(name, torch.zeros_like(tensor)).double()
            result[name] = result.get(name, start) + scale * (tensor.double() - start)
    model = RWKV(rwkv_miss.Arch.detect(result)).double().eval()
    model.load_state_dict(
        {name: tensor.reshape(dict(model.named_parameters())[name].shape) for name, tensor in result.items()}
    )
    return model


@torch.no_grad()
def logits_of(model, ids):
    return model(ids)[0]


@pytest.mark.product
@pytest.mark.parametrize("version", [7, slow(6)])
@pytest.mark.parametrize("method, options", VARIANTS, ids=str)
def test_every_method_says_what_its_merged_file_says(method, options, version, checkpoint, tmp_path):
    """Prompt and single tokens, in torch and in the decoder, at the scales 1 and 0.7."""
    base = checkpoint(version, **SIZES)
    adapter = train(base, tmp_path / "a.pth", method, **options)
    adapters, _ = load_with(base, {"a": adapter}, "bytes", accelerator="cpu")
    plain, decoder, ids = RWKV.load(base), Decoder(adapters.model), some_ids(adapters.model.arch, 13)
    for scale in (1, 0.7):
        adapters.use(["a"], scale)
        decoder.refresh()
        want = logits_of(merged_by_hand(base, [adapter], tmp_path, scale), ids)
        close("torch", logits_of(adapters.model, ids), want, TOLERANCE)
        close("decoder", one_by_one(decoder, ids)[0], want[0], TOLERANCE)
        close("prompt", decoder.read(ids, None)[0], want[:, -1], TOLERANCE)
    assert (want - logits_of(plain, ids)).abs().max() > 5e-3 * want.abs().max(), "the adapter changed nothing"


@pytest.mark.parametrize("version", [6, 7])
def test_the_same_text_as_the_merged_file(version, checkpoint, tmp_path):
    base, tokenizer = checkpoint(version, vocab_size=257), load_tokenizer("bytes", 257)
    rwkv_miss.merge_file(base, train(base, tmp_path / "a.pth", "miss"), tmp_path / "merged.pth", "fp32")
    said = []
    for model in (
        load(base, tmp_path / "a.pth", "bytes")[0],
        load(tmp_path / "merged.pth", None, "bytes")[0],
        load(base, None, "bytes")[0],
    ):
        said.append(greedy_text(Engine(fastest(model)[0], tokenizer), "hello?", 40))
    assert said[0] == said[1] != said[2] and len(said[0]) > 10


@pytest.mark.product
@pytest.mark.parametrize("version", [7, 6])
@pytest.mark.parametrize(
    "method, options",
    [
        ("dora", {}),
        ("bat", {}),
        ("lora", {}),
        ("miss", {"train_parts": "emb,ln,time,head,state"}),
        ("miss", {"magnitude": True}),
    ],
    ids=str,
)
def test_a_gpu_rounds_once_what_every_token_would_round(version, method, options, checkpoint, tmp_path):
    """Here on the CPU: bf16 activations give the same numbers, bit for bit, and nothing is left to cast."""
    base = checkpoint(version, **SIZES)
    adapter = train(base, tmp_path / "a.pth", method, **options)
    adapters, _ = load_with(base, {"a": adapter}, "bytes", "", "cpu", "bf16", "torch")
    model, ids, logits = adapters.model, some_ids(RWKV.load(base).arch, 13), {}
    model.computes_in = torch.bfloat16  # whatever the first weight is
    for scale in (1, 0.7):
        for rounds_to in (None, torch.bfloat16):
            adapters.rounds_to = rounds_to  # a tensor that is read from now on is rounded to it
            adapters.use()
            adapters.drop("a")
            adapters.add("a", adapter)
            adapters.use(["a"], scale)
            with torch.no_grad():
                logits[rounds_to] = model(ids)[0]
        assert torch.equal(logits[None], logits[torch.bfloat16])
    model.computes_in = None
    assert model.dtype == torch.bfloat16
    wide = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert all(NEVER_CAST.search(name) for name in wide), wide
    columns = [linear.columns for linear in adapters.linears.values() if linear.columns]
    assert all(one.B.dtype == torch.bfloat16 for one in columns)
    assert bool(columns) == (method in ("lora", "miss") and not options.get("magnitude"))


KINDS = {
    "miss": dict(method="miss", train_parts="ln,time,head"),
    "dora": dict(method="dora"),
    "state": dict(method="state"),
    "vera": dict(method="vera"),
}
WALK = [
    ("miss", 1),
    ("dora", 1),
    (None, 1),
    ("state", 0.5),
    ("miss", 0.5),
    ("vera", 1),
    (None, 0.5),
    ("dora", 0.5),
    ("miss", 1),
    (None, 1),
]


@pytest.mark.product
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("version", [7, 6])
def test_switching_leaves_nothing_behind(version, dtype, checkpoint, tmp_path):
    """a -> b -> none -> a and so on: the bits of a fresh load each time, also in the decoder; without adapter
    those of the base, in its memory.
    """
    base = checkpoint(version, dtype, **SIZES)
    files = {
        name: train(base, tmp_path / f"{name}.pth", seed=i, **kind)
        for i, (name, kind) in enumerate(KINDS.items())
    }
    ids = some_ids(make_arch(version, **SIZES), 9)
    plain = Decoder(load(base, None, "bytes", accelerator="cpu")[0])
    fresh = {
        (name, scale): logits_with(base, {name: files[name]}, [name], scale, ids)
        for name in files
        for scale in (1, 0.5)
    }
    adapters, _ = load_with(base, files, "bytes", accelerator="cpu")
    decoder, before = Decoder(adapters.model), dict(adapters.model.named_parameters())
    places = {name: p.data_ptr() for name, p in before.items()}
    for name, scale in WALK:
        adapters.use([name] if name else [], scale)
        decoder.refresh()
        want = fresh[name, scale] if name else one_by_one(plain, ids)[0]
        assert torch.equal(one_by_one(decoder, ids)[0], want), (name, scale)
        if name is None:
            now = dict(adapters.model.named_parameters())
            assert now.keys() == before.keys()
            assert all(p is before[key] and p.data_ptr() == places[key] for key, p in now.items())
    assert len({tuple(logits[-1].tolist()) for logits in fresh.values()}) == len(fresh)


def logits_with(base, files, names, scale, ids):
    adapters, _ = load_with(base, files, "bytes", accelerator="cpu")
    adapters.use(names, scale)
    return one_by_one(Decoder(adapters.model), ids)[0]


def test_several_adapters_add_up(checkpoint, tmp_path):
    base = checkpoint(7, **SIZES)
    files = {
        name: train(base, tmp_path / f"{name}.pth", seed=i, **kind)
        for i, (name, kind) in enumerate(KINDS.items())
    }
    files["other"] = train(
        base, tmp_path / "other.pth", "miss", seed=9, rank=5, targets=["receptance", "head"]
    )
    files["third"] = train(base, tmp_path / "third.pth", "bat", seed=8)
    ids = some_ids(make_arch(7, **SIZES), 9)
    adapters, _ = load_with(base, files, "bytes", accelerator="cpu")
    decoder = Decoder(adapters.model)
    for names in (["vera", "other"], ["dora", "third"], ["state", "dora", "vera", "third", "other", "miss"]):
        adapters.use(names, 0.6)
        decoder.refresh()
        want = logits_of(merged_by_hand(base, [files[name] for name in names], tmp_path, 0.6), ids)
        close("torch", logits_of(adapters.model, ids), want, TOLERANCE)
        close("decoder", one_by_one(decoder, ids)[0], want[0], TOLERANCE)


@pytest.mark.product
@pytest.mark.parametrize("int8", [False, True], ids=["as they are", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("version", [7, 6])
@pytest.mark.parametrize("method, rank", [("miss", 1), ("miss", 7), ("lora", 3), ("lora", 17)])
def test_the_decoder_loses_nothing_of_an_adapter(
    method, rank, version, dtype, int8, checkpoint, tmp_path, monkeypatch
):
    """Against float64 with the same rounded base: A, B and their sums are fp32, whatever the base is. Any
    number of threads gives the same bits.
    """
    # panels round activations, too (test_cpu_decoder.py)
    monkeypatch.setattr(int8_panels, "instruction_is_there", lambda: False)
    base = checkpoint(version, dtype, n_layer=3, **SIZES)
    adapter = train(
        base, tmp_path / "a.pth", method, rank=rank, targets=["receptance", "key", "value", "output", "head"]
    )
    ids, results = some_ids(make_arch(version, **SIZES), 9), []
    adapters, _ = load_with(base, {"a": adapter}, "bytes", accelerator="cpu")
    exact = RWKV.load(base, torch.float64)
    for threads in (1, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        adapters.use()
        decoder = Decoder(adapters.model, int8=int8)
        if int8 and threads == 1:
            for name, tensors in decoder.kept.items():
                if len(tensors) == 2:
                    exact.get_parameter(name).data = tensors[0].double() * tensors[1].double().unsqueeze(1)
        adapters.use(["a"], 0.7)
        decoder.refresh()
        results.append(one_by_one(decoder, ids)[0])
        decoder.close()
    rwkv_miss.load_adapter(exact, adapter)
    for name, layer in rwkv_miss.adapter.adapted_linears(exact).items():
        for tensor in layer.own_tensors().values():
            tensor.data = tensor.double()
        exact.get_parameter(f"{name}.weight").data = layer.base_weight() + 0.7 * layer.delta().double()
        layer.forward = layer.base_forward
    close("logits", results[0], logits_of(exact, ids)[0], TOLERANCE)
    assert all(torch.equal(other, results[0]) for other in results[1:])


@pytest.mark.product
@pytest.mark.parametrize("version", [7, 6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_of_tokens_differ_by_row_and_are_those_of_each_merged_model(
    version, dtype, checkpoint, tmp_path
):
    """Beside factors of other ranks, in one batch, in both decoders, prompts and single tokens."""
    base = checkpoint(version, dtype, **SIZES)
    parts = {
        "a": ("emb,head", [1, 3, 66, 200]),
        "b": ("head", [3, 5]),
        "c": ("", []),
        "d": ("emb,head", [3, 7]),
    }
    files = {
        name: train(
            base, tmp_path / f"{name}.pth", "lora", seed, rank=2 + seed, train_parts=of, tokens=tokens
        )
        for seed, (name, (of, tokens)) in enumerate(parts.items())
    }
    adapters, _ = load_with(base, files, "bytes", accelerator="cpu")
    assert not any(adapters.by_name[name].reason_to_merge() for name in files)
    choices = [
        Applied(("a",), 0.7),
        BASE,
        Applied(("d",)),
        Applied(("b",), 1.5),
        Applied(("a", "d")),
        Applied(("c",)),
    ]
    rows = len(choices)
    ids = torch.tensor([[3, 1, 7, 9, 66, 200, 5, 3]]).expand(rows, -1)
    for decoder in (Decoder(adapters.model, rows, adapters), TorchDecoder(adapters.model, rows, adapters)):
        for row, applied in enumerate(choices):
            decoder.put(row, decoder.read(ids[:1, :4], None, applied)[1])
        for t in range(4, 8):
            logits = decoder.step(ids[:, t].tolist(), choices)
        tolerance = TOLERANCE if dtype == torch.float32 else 2e-2
        for row, applied in enumerate(choices):
            want = merged_by_hand(base, [files[name] for name in applied.names], tmp_path, applied.scale)
            close(f"{applied}", logits[row], logits_of(want, ids[:1])[0, -1], tolerance)


def test_a_switch_makes_no_copy_of_what_stays(checkpoint, tmp_path):
    """Neither the model's weights nor the decoder's int8 copies are made again, and equal random factors are
    there once.
    """
    base = checkpoint(7, torch.bfloat16, **SIZES)
    files = {name: train(base, tmp_path / f"{name}.pth", name) for name in ("miss", "vera")}
    adapters, _ = load_with(base, files, "bytes", accelerator="cpu")
    weights = {name: p.data_ptr() for name, p in adapters.model.named_parameters()}
    decoder = Decoder(adapters.model, int8=True)
    kept = {name: [tensor.data_ptr() for tensor in tensors] for name, tensors in decoder.kept.items()}
    for name in ("miss", "vera"):
        adapters.use([name])
        decoder.refresh()
        assert weights == {name: p.data_ptr() for name, p in adapters.model.named_parameters()}
        assert kept == {
            name: [tensor.data_ptr() for tensor in tensors] for name, tensors in decoder.kept.items()
        }
    changes = [[adapter.factors[name] for name in adapter.factors] for adapter in adapters.by_name.values()]
    assert [len(of_one) for of_one in changes] == [12, 12] and all(change.A is None for change in changes[0])
    assert len({change.A.data_ptr() for change in changes[1]}) == 2  # widths: 40 and ffn's


def test_a_model_in_bf16_reads_prompts_with_the_live_adapter(checkpoint, tmp_path):
    """In the way of training: activations in bf16, and an update that is far below a step of bf16 of the
    weights is not lost in them.
    """
    base = checkpoint(7, torch.bfloat16, vocab_size=257)
    adapter = train(base, tmp_path / "a.pth", "miss")
    live = RWKV.load(base)
    rwkv_miss.load_adapter(live, adapter)
    model, _ = load(base, adapter, "bytes", accelerator="cpu", precision="bf16", wkv="torch")
    ids = some_ids(model.arch, 20)
    assert model.dtype == torch.bfloat16
    close("logits", logits_of(model, ids), logits_of(live, ids), 0.02)


def test_an_adapted_head_gives_a_loss(checkpoint, tmp_path):
    base = checkpoint(7, vocab_size=257)
    adapter = train(base, tmp_path / "a.pth", "lora", targets=["head", "key"])
    model, ids = load(base, adapter, "bytes", accelerator="cpu")[0], some_ids(make_arch(7, vocab_size=257), 6)
    with torch.no_grad():
        want = torch.nn.functional.cross_entropy(model(ids)[0][0], ids[0], reduction="sum")
        close("loss", model.loss(model.features(ids)[0][0], ids[0]), want, 1e-5)
    assert isinstance(model.head, UnmergedLinear) and not any(module.training for module in model.modules())


def test_files_that_do_not_fit_change_nothing(checkpoint, tmp_path):
    base, other = checkpoint(7, **SIZES), checkpoint(7, seed=5, **SIZES)
    wider = checkpoint(7, seed=6, **{**SIZES, "n_embd": 48})
    good = train(base, tmp_path / "good.pth", "miss")
    cut = rwkv_miss.read_checkpoint(good)
    cut.pop("blocks.1.att.key.miss")
    rwkv_miss.write_checkpoint(tmp_path / "cut.pth", cut.items(), rwkv_miss.read_metadata(good))
    rwkv_miss.write_checkpoint(
        tmp_path / "run.pth", cut.items(), {"format": "rwkv-miss checkpoint", "step": 3}
    )
    bad = [
        (train(other, tmp_path / "other.pth", "miss"), "another base"),
        (train(wider, tmp_path / "wider.pth", "lora"), "another base"),
        (tmp_path / "cut.pth", "lacks blocks.1.att.key.miss"),
        (tmp_path / "run.pth", "checkpoint from which"),
        (base, "not an adapter"),
        (tmp_path / "nothing.pth", "does not exist"),
    ]
    for path, why in bad:
        model = RWKV.load(base)
        before = {
            name: (id(module), id(getattr(module, "weight", None))) for name, module in model.named_modules()
        }
        with pytest.raises(UserError, match=why):
            Adapters(model, {"good": good, "bad": path})
        assert before == {
            name: (id(module), id(getattr(module, "weight", None))) for name, module in model.named_modules()
        }
    adapters = Adapters(RWKV.load(base), {"good": good})
    with pytest.raises(UserError, match="no adapter 'god'; there are: good"):
        adapters.use(["god"])


def test_a_closed_decoder_takes_over_nothing(checkpoint, tmp_path):
    base = checkpoint(7, **SIZES)
    adapters, _ = load_with(base, {"a": train(base, tmp_path / "a.pth", "miss")}, "bytes", accelerator="cpu")
    decoder = Decoder(adapters.model)
    decoder.close()
    adapters.use(["a"])
    with pytest.raises(ValueError, match="closed"):
        decoder.refresh()


def test_a_base_with_a_state_moves_towards_the_adapters(checkpoint, tmp_path):
    """Scale 0.5 is half way between the two states, not half of the adapter's."""
    base = checkpoint(6)
    first = train(base, tmp_path / "first.pth", "state", seed=3)
    rwkv_miss.merge_file(base, first, tmp_path / "with.pth")
    second = train(tmp_path / "with.pth", tmp_path / "second.pth", "state", seed=4)
    adapters = Adapters(RWKV.load(tmp_path / "with.pth"), {"s": second})
    adapters.use(["s"], 0.5)
    names = [f"blocks.{i}.att.time_state" for i in range(2)]
    files = [rwkv_miss.read_checkpoint(path) for path in (first, second)]
    for name in names:
        close(name, adapters.model.get_parameter(name), (files[0][name] + files[1][name]) / 2, 1e-6)
    _, state = adapters.model.next_logits(torch.tensor([[1]]))
    assert isinstance(state[0], LayerState) and random_tensors(make_arch(6)).keys().isdisjoint(names)


def test_a_stopped_choice_leaves_the_base(checkpoint, tmp_path, monkeypatch):
    """Merged weights take a while; Ctrl-C in the middle of them must not leave some of each."""
    base = checkpoint(7, **SIZES)
    files = {name: train(base, tmp_path / f"{name}.pth", name) for name in ("miss", "dora")}
    adapters, _ = load_with(base, files, "bytes", accelerator="cpu")
    before, calls, ids = dict(adapters.model.named_parameters()), [], some_ids(adapters.model.arch, 5)
    want, merged = logits_of(adapters.model, ids), FittedAdapter.value

    def value(self, *rest):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return merged(self, *rest)

    monkeypatch.setattr(FittedAdapter, "value", value)
    with pytest.raises(KeyboardInterrupt):
        adapters.use(["miss", "dora"], 0.5)
    assert adapters.used == () and all(p is before[name] for name, p in adapters.model.named_parameters())
    assert torch.equal(logits_of(adapters.model, ids), want)


def test_a_stopped_refresh_is_finished_before_the_next_token(checkpoint, tmp_path, monkeypatch):
    base = checkpoint(7, **SIZES)
    files = {name: train(base, tmp_path / f"{name}.pth", name) for name in ("miss", "dora")}
    ids = some_ids(make_arch(7, **SIZES), 5)
    adapters, _ = load_with(base, files, "bytes", accelerator="cpu")
    decoder = Decoder(adapters.model)
    want = logits_with(base, files, ["dora"], 1, ids)
    adapters.use(["dora"])
    made, calls = Decoder._matrix, []

    def matrix(self, *rest):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return made(self, *rest)

    monkeypatch.setattr(Decoder, "_matrix", matrix)
    with pytest.raises(KeyboardInterrupt):
        decoder.refresh()
    assert torch.equal(one_by_one(decoder, ids)[0], want)
