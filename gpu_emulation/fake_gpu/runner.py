"""Runs the cases on the fake GPU; the stub has to be loaded before this is imported."""

import contextlib
import io
import json
import pathlib
import tempfile
import traceback
from unittest import mock

import torch
from torch import nn

import rwkv_miss
from rwkv_miss.progress import Progress
from src import config as configuration
from src import run
from src.data.tokenizer import load_tokenizer
from src.evaluation.answering import completed, engine_for
from src.evaluation.kl_divergence import sections
from src.evaluation.likelihood import log_likelihoods
from src.inference.cuda_graph import GraphedDecoder
from src.inference.engine import Engine, Request
from src.inference.generate import stream
from src.model import RWKV, default_arch
from src.planning import memory as planned_memory
from src.planning import throughput
from src.planning.step_memory import StepBytes, step_bytes
from src.sources import held_out_loss, source_of
from src.sources.estimates import Speed
from src.training import forgetting
from src.training.optimizer import parameter_groups
from src.training.trainer import FineTuning

from . import cases
from .device import FakeGpu, install
from .micro_batch import batch_on, config_of, layer, small_model_on
from .programs import budget, decode_adapted, decode_rows, harness, merged, quantised_chat
from .several_gpus import KIB, ddp, zero, zero_memory


def records(names: list[str]) -> dict[str, dict]:
    """Case -> its record for table.json, or {"error": traceback} where it raised."""
    torch.set_num_threads(1)
    install()
    work = [
        *((step, (method, version)) for method in cases.METHODS for version in cases.VERSIONS),
        *((step, ("miss", version, True)) for version in cases.VERSIONS),
        *((layer, (peft, version)) for peft in cases.LAYERS for version in cases.VERSIONS),
        *((memory, settings) for settings in cases.MEMORY),
        *((READING[what], (version,)) for what in cases.READING for version in cases.VERSIONS),
        *((quantised_chat, (quant, 7)) for quant in cases.QUANTS),
        *((decode_adapted, (peft, 7)) for peft in cases.BESIDE),
        (harness, (7,)),
        *((merged, (peft, 7)) for peft in cases.MERGED),
        (budget, (7,)),
        *((train, (flags,)) for flags in cases.RUNS.values()),
        (ddp, (7,)),
        *((zero, (stage, 7)) for stage in cases.STAGES),
        *((zero_memory, (stage, 7)) for stage in cases.STAGES),
    ]
    by_name = dict(zip(cases.ALL, work, strict=True))
    found = {}
    for name in names:
        case, arguments = by_name[name]
        try:
            found[name] = case(*arguments)
        except (Exception, SystemExit):
            found[name] = {"error": traceback.format_exc()}
    return found


def step(method: str, version: int, weighted: bool = False) -> dict:
    """An optimizer step on the second device: what asks for "cuda" gets the first one, and raises."""
    config, device = config_of(method), "cuda:1"
    with FakeGpu() as gpu:
        model, batch = small_model_on(device, version, config), batch_on(device, 2, 37, weighted)
        optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, 0.01), lr=1e-3)
        gpu.begin()
        loss = source_of(config).chunks.loss(model, batch)
        penalty = rwkv_miss.penalty(model)
        (loss if penalty is None else loss + penalty).backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert trained and all(p.grad.device == torch.device(device) for p in trained)
        counts = gpu.counts()
        optimizer.step()
    return counts | {
        "trained": sorted({_dtype(p) for p in trained}),
        "loss": _dtype(loss),
        "KiB": gpu.peak // KIB,
    }


def memory(version: int, peft: str, quant: str, grad_cp: int, chunk_ctx: int) -> dict:
    """Measure the peak of a forward and a backward pass without parameters and gradients, and its plan."""
    config = config_of(peft, 64, micro_bsz=2, ctx_len=512, quant=quant, grad_cp=grad_cp, chunk_ctx=chunk_ctx)
    planned = step_bytes(default_arch(version, 3, 512, 4096, 64), config, "cuda", "bf16", 512, 1024).peak
    with FakeGpu() as gpu:
        model = small_model_on("cuda:0", version, config, 3, 512, 4096)
        batch = batch_on("cuda:0", 2, 512, chunk=chunk_ctx)
        for p in model.parameters():
            p.grad = torch.empty_like(p) if p.requires_grad else None
        before = gpu.allocated
        source_of(config).chunks.loss(model, batch).backward()
    peak = gpu.peak - before
    return {"planned KiB": int(planned) // KIB, "KiB": peak // KIB, "ratio": round(peak / planned, 3)}


def reading(version: int) -> RWKV:
    model = small_model_on("cuda:0", version, config_of("none")).bfloat16().requires_grad_(False).eval()
    model.set_kernel("cuda")
    return model


@torch.no_grad()
def decode(version: int) -> dict:
    """The token that src/inference/cuda_graph.py has a CUDA graph record."""
    with FakeGpu() as gpu:
        decoder = GraphedDecoder(reading(version), 1)
        gpu.begin()
        decoder._move_on(decoder.ids)
    return gpu.counts()


def chat(version: int) -> dict:
    """A prompt, and the tokens of an answer one after another."""
    with FakeGpu() as gpu:
        decoder = GraphedDecoder(reading(version), 1)
        gpu.begin()
        list(stream(Engine(decoder, load_tokenizer("bytes", 512)), Request(range(1, 38), 4)))
    return gpu.counts()


def evaluation(version: int) -> dict:
    """Greedy answers to two prompts at once."""
    with FakeGpu() as gpu:
        model = reading(version)
        gpu.begin()
        requests = [Request(list(range(1, length)), 4) for length in (38, 21)]
        engine = engine_for(model, load_tokenizer("bytes", 512), len(requests))
        assert len(list(completed(engine, requests, Progress("answering")))) == 2
    return gpu.counts()


def likelihood(version: int) -> dict:
    """Two continuations of different length."""
    with FakeGpu() as gpu:
        model = reading(version)
        gpu.begin()
        log_likelihoods(model, [(list(range(1, 38)), [5, 6, 7]), (list(range(1, 21)), [5])])
    return gpu.counts()


READING = {
    "decode": decode,
    "decode 8 rows with adapters": decode_rows,
    "chat": chat,
    "evaluation": evaluation,
    "likelihood": likelihood,
}


def write_files(folder: pathlib.Path, n_layer: int) -> list[str]:
    """A small base and questions for it; returns the flags that name them and the run's folder."""
    base, data = folder / "base.pth", folder / "data.jsonl"
    model = RWKV(default_arch(7, n_layer, 64, 256, 64))
    for p in model.parameters():
        nn.init.normal_(p, std=0.02)
    torch.save({name: tensor.bfloat16() for name, tensor in model.state_dict().items()}, base)
    lines = []
    for word in ("kitchen", "house", "garden", "flower", "tree") * 30:
        question = {"role": "user", "content": f"sort {word * 5}"}
        answer = {"role": "assistant", "content": word}
        lines.append(json.dumps({"messages": [question, answer]}))
    data.write_text("\n".join(lines))
    return ["--load_model", str(base), "--data_file", str(data), "--proj_dir", str(folder / "out")]


@contextlib.contextmanager
def counted_steps(gpu: FakeGpu):
    """Context; yields the list of the counts at the beginning of each training step."""
    seen = []
    begin = FineTuning.on_train_batch_start

    def begin_counted(module, batch, index):
        seen.append(gpu.counts())
        begin(module, batch, index)

    FineTuning.on_train_batch_start = begin_counted
    try:
        yield seen
    finally:
        FineTuning.on_train_batch_start = begin


def run_quietly(flags: list[str]) -> str:
    """train.py with these flags; what it prints is returned, and shown where it fails."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            run.main(configuration.parse(flags))
    except BaseException:
        print(output.getvalue()[-2000:])
        raise
    return output.getvalue()


def train(flags: str) -> dict:
    """train.py to its end with Lightning's CUDA accelerator; counted from the third step to the fourth.

    The first step's numbers are read at once, those of the others a step later.
    """
    with tempfile.TemporaryDirectory() as folder, FakeGpu() as gpu:
        with counted_steps(gpu) as seen, mock.patch.object(held_out_loss, "SAMPLE_TOKENS", 4):
            train_in(folder, 4, flags)
    return _between(*seen[2:]) | {
        "KiB": gpu.peak // KIB,
        "waits of the run": sorted(gpu.waits),
        "copies of the run": sorted(gpu.copies),
    }


def _longest_section(tokenizer) -> dict[str, list[int]]:
    return dict([max(sections(tokenizer).items(), key=lambda section: len(section[1]))])


def train_in(folder: str, steps: int, flags: str, n_layer: int = 2) -> None:
    """Run train.py on small files. The memory of a step is memory()'s to count, not theirs.

    What is forgotten is measured on all sections in the run that evaluates. It took half of the others' time.
    """
    sizes = ["--tokenizer", "bytes", "--epoch_steps", str(steps), "--micro_bsz", "2"]
    whole = flags == cases.RUNS["bf16"]
    with (
        mock.patch.object(planned_memory, "step_bytes", return_value=StepBytes(1e6, 1e6, 1e6, 0)),
        mock.patch.object(throughput, "ENOUGH", 0.0),  # one row is timed, however long it takes
        contextlib.nullcontext() if whole else mock.patch.object(forgetting, "sections", _longest_section),
        contextlib.nullcontext() if whole else mock.patch.object(run, "speed_here", return_value=Speed(1e4)),
    ):
        output = run_quietly([*write_files(pathlib.Path(folder), n_layer), *sizes, *flags.split()])
    assert len(pathlib.Path(folder, "out/metrics.jsonl").read_text().splitlines()) == steps, output


def _between(first: dict, second: dict) -> dict:
    """Subtract the counts of `first` from those of `second`."""
    return {
        name: _difference(second[name], first[name]) for name in ("launches", "waits", "copies", "native")
    }


def _difference(more: dict, less: dict) -> dict:
    return {key: more[key] - less.get(key, 0) for key in more if more[key] != less.get(key, 0)}


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
