"""Programs other than train.py: a chat on a quantised base, the harness, an adapter and its merge."""

from __future__ import annotations

import contextlib
import io
import pathlib
import tempfile
import types

import torch
from torch import nn

import rwkv_miss
from benchmarks import gpu_budget
from src.data.tokenizer import load_tokenizer
from src.inference.adapters import BASE, Adapters, Applied
from src.inference.cuda_graph import GraphedDecoder
from src.inference.engine import Engine, Request
from src.inference.generate import stream
from src.inference.load import load
from src.model import RWKV, default_arch

from .device import FakeGpu
from .micro_batch import config_of, small_model_on

TOKENS = list(range(1, 38))


def reading(version: int, quant: str = "none") -> RWKV:
    """A model that answers."""
    model = small_model_on("cuda:0", version, config_of("state", quant=quant)).requires_grad_(False).eval()
    for name, tensor in model.named_parameters():
        assert quant != "none" or tensor.dtype == torch.bfloat16 or "time_state" in name, name
    return model


@torch.no_grad()
def quantised_chat(quant: str, version: int) -> dict:
    """A prompt and tokens of an answer, by a model whose weights are expanded for each product."""
    with FakeGpu() as gpu:
        decoder = GraphedDecoder(reading(version, quant), 1)
        gpu.begin()
        list(stream(Engine(decoder, load_tokenizer("bytes", 512)), Request(TOKENS, 4)))
    return gpu.counts()


def write_adapter(folder: str, name: str, version: int, peft: str, **options) -> pathlib.Path:
    """A file of an adapter of a model as reading() has it, without numbers that matter."""
    trained, path = RWKV(default_arch(version, 2, 128, 512, 64)), pathlib.Path(folder, f"{name}.pth")
    for linear in trained.layer_linears().values():
        nn.init.normal_(linear.weight)  # for DoRA, rows have directions
    rwkv_miss.inject(trained, peft, **options)
    rwkv_miss.save_adapter(trained, path)
    return path


def recorded_token(gpu: FakeGpu, decoder: GraphedDecoder, rows: int) -> dict:
    """Count what the graph of a token does, with adapters on the linears where the decoder has some."""
    with decoder._showing(rows, decoder.stack is not None):
        gpu.begin()
        decoder._move_on(decoder.ids[:rows])
        return gpu.counts()


@torch.no_grad()
def decode_adapted(peft: str, version: int) -> dict:
    """The token that a CUDA graph records, with an adapter of a file, and norms and vectors of its own."""
    with tempfile.TemporaryDirectory() as folder:
        adapter = write_adapter(folder, "a", version, peft, rank=8, train_parts="ln,time")
        with FakeGpu() as gpu:
            adapters = Adapters(reading(version), {"a": adapter})
            adapters.use(["a"])
            decoder = GraphedDecoder(adapters.model, 1, adapters)
            decoder.step([1], [BASE])
            return recorded_token(gpu, decoder, 1)


@torch.no_grad()
def decode_rows(version: int) -> dict:
    """Count a token of 8 rows with three adapters, of two ranks, or none: the work of its graph, and of a
    step outside of the graph, where the rows have the adapters that they had, and other ones.

    All by MiSS: whether an A is MiSS's is asked of its numbers, and here any would be.
    """
    ranks = {"a": 8, "b": 8, "c": 4, "d": 8, "e": 8}
    with tempfile.TemporaryDirectory() as folder:
        files = {
            name: write_adapter(folder, name, version, "miss", rank=rank) for name, rank in ranks.items()
        }
        with FakeGpu() as gpu:
            adapters = Adapters(reading(version), files)
            decoder = GraphedDecoder(adapters.model, 8, adapters)
            mix = [Applied((name,)) for name in "abc"] * 2
            found = {}
            for what, applied in {
                "first step": mix,
                "step": mix,
                "step of another mix": [*mix[1:], BASE],
                "step of another adapter": [Applied(("e",)), *mix[1:3]] * 2,
            }.items():
                gpu.begin()
                decoder.step([1] * 6, applied)
                found[what] = gpu.counts()
            del found["first step"]
            return recorded_token(gpu, decoder, 8) | found


@torch.no_grad()
def harness(version: int) -> dict:
    """lm-evaluation-harness: two continuations, a whole text, a greedy answer."""
    from src.evaluation.lm_eval_model import HarnessModel

    def requests(*arguments):
        return [types.SimpleNamespace(args=args) for args in arguments]

    with FakeGpu() as gpu:
        model = HarnessModel(reading(version), load_tokenizer("bytes", 512))
        gpu.begin()
        assert len(model.loglikelihood(requests(("the sum of", " two"), ("a", "b")))) == 2
        assert len(model.loglikelihood_rolling(requests(("a whole text",)))) == 1
        assert len(model.generate_until(requests(("ask", {"until": ["\n"], "max_gen_toks": 3})))) == 1
    return gpu.counts()


@torch.no_grad()
def merged(peft: str, version: int) -> dict:
    """An adapter of a base on the GPU is saved, merged, and both are loaded there: the same tensors."""
    with tempfile.TemporaryDirectory() as folder, FakeGpu() as gpu:
        base, adapter, out = (str(pathlib.Path(folder, f"{name}.pth")) for name in ("base", "adapter", "out"))
        model = RWKV(default_arch(version, 2, 128, 512, 64))
        for p in model.parameters():
            nn.init.normal_(p, std=0.02)
        rwkv_miss.write_checkpoint(base, [(k, t.bfloat16()) for k, t in model.state_dict().items()])
        model = RWKV.load(base, torch.bfloat16, "cuda", "cuda")
        config_of(peft).adapter.inject(model)
        assert all(p.device.type == "cuda" for p in model.parameters())
        rwkv_miss.save_adapter(model, adapter)
        rwkv_miss.merge_file(base, adapter, out)
        live, _ = load(base, adapter, "bytes", accelerator="gpu", precision="bf16", wkv="cuda")
        whole, _ = load(out, None, "bytes", accelerator="gpu", precision="bf16", wkv="cuda")
        gpu.begin()
        ids = torch.tensor([TOKENS], device="cuda")
        one, other = live.next_logits(ids, None)[0], whole.next_logits(ids, None)[0]
        kinds = [(tensor.shape, tensor.dtype, tensor.device) for tensor in (one, other)]
        assert kinds[0] == kinds[1], kinds
    return gpu.counts()


def budget(version: int) -> dict:
    """benchmarks.gpu_budget of a small model."""
    sizes = "--n_layer 4 --n_embd 256 --vocab 1024 --micro_bsz 2 --ctx_len 128 --card 4090 --operators"
    with contextlib.redirect_stdout(io.StringIO()):
        figures = gpu_budget.report(gpu_budget.parse(["--model", str(version), *sizes.split()]))
    assert all(part["ms"] >= 0 for part in figures["parts"].values())
    return {name: figures[name] for name in ("parts", "gpu_ms", "layer")}
