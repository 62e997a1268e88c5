"""Functions that run on the device with numbers; the stub has to be loaded before this is imported."""

from __future__ import annotations

import ctypes
import importlib
import json
import multiprocessing
import os
import pathlib
import tempfile
from multiprocessing import util

import pytest
import torch
import torch.distributed as dist

from gpu_emulation.ptx.library import load, readable
from src.inference.adapters import BASE, Applied
from src.inference.decoders import fastest
from src.inference.engine import Engine, Request
from src.inference.load import load_with
from src.inference.sampling import GREEDY, Sampling
from src.ops import native
from tests import program
from tests.recorded_graph import Graph

from .device import answer
from .serve import FINDING


def install() -> None:
    """Let torch.cuda be two cards of sm_80 whose kernels are cuda/*.cu, executed as PTX on this CPU.

    What processes send each other goes by gloo. Imports what they all need, before they are forked.
    """
    answer((8, 0), Graph, lambda graph: graph)
    torch.cuda.device_count = lambda: 2
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *_: None
    kernels = load("80")
    native.cuda_library = lambda architectures: kernels._name
    take, forget = (
        ctypes.cast(getattr(kernels, f"ptx_{name}"), ctypes.c_void_p).value
        for name in ("register", "unregister")
    )
    torch.ops.fake_gpu.kernels(take, forget)
    util.register_after_fork(
        kernels, lambda kernels: util.Finalize(kernels, report, (kernels,), exitpriority=1)
    )
    start = dist.init_process_group
    dist.init_process_group = lambda backend=None, *given, **named: start("gloo", *given, **named)
    os.environ["DS_ACCELERATOR"] = "cuda"
    for name in program.PRELOADED:
        importlib.import_module(name)
    program.CONTEXT = multiprocessing.get_context("fork")


def report(kernels: ctypes.CDLL) -> None:
    """Say what the interpreter found, at the end of a process."""
    for f in json.loads(kernels.ptx_findings()):
        print(
            FINDING, f["kind"], readable(f["kernel"]), f["where"], f["instruction"], f["example"], flush=True
        )


def train(flags: list[str], stopped_at: str = "") -> tuple[int, str]:
    """train.py with these flags, in --devices processes; Ctrl-C comes before a file with this in its path."""
    proj_dir = flags[flags.index("--proj_dir") + 1]
    stop = program.at_file(stopped_at, 1, proj_dir, program.interrupt)
    return program.run(flags, stop if stopped_at else None)


def train_out_of_memory(flags: list[str], place: str, rows: int) -> tuple[int, str]:
    """train.py on a card whose memory does not suffice for more than `rows` rows at once."""
    return program.run(flags, program.out_of_memory(place, rows))


def call(words: list[str]) -> tuple[int, str]:
    """python WORDS."""
    return program.call(words)


def work(name: str, *arguments) -> tuple[int, str]:
    """A function of this module."""
    with tempfile.NamedTemporaryFile() as log:
        process = program.CONTEXT.Process(target=program.logged, args=(log.name, globals()[name], *arguments))
        process.start()
        process.join()
        return process.exitcode, pathlib.Path(log.name).read_text()


def check_device() -> None:
    """Check memory, copies and devices of a card, as the runs rely on them."""
    x = torch.arange(6.0).view(2, 3).to("cuda")
    view = x.t()[1]
    view.mul_(10)
    assert x.tolist() == [[0, 10, 2], [3, 40, 5]] and view.device == x.device == torch.device("cuda:0")
    grown = torch.empty(0, device="cuda")
    torch.cat([x, x], out=grown)
    assert grown.shape == (4, 3) and grown.sum().item() == 120
    assert torch.empty(8, device="cuda").isnan().all(), "memory without contents"

    late = x.to("cpu", non_blocking=True)
    early = late.clone()
    torch.cuda.synchronize()
    assert early.isnan().all() and late.tolist() == x.tolist(), "numbers are there after a wait"

    sent, event = torch.ones(3).pin_memory(), torch.cuda.Event()
    copy = sent.to("cuda", non_blocking=True)
    event.record()
    event.synchronize()
    sent.fill_(2)
    assert copy.tolist() == [1, 1, 1], "written to after its copy"
    sent.to("cuda", non_blocking=True)
    sent.fill_(3)
    with pytest.raises(RuntimeError, match=r"pinned memory of \[3\] was written to before its copy"):
        copy.sum().item()

    for wrong in (lambda: x @ torch.ones(3, 3), lambda: x + torch.ones(3), lambda: x.to("cuda:1").add_(x)):
        with pytest.raises(RuntimeError, match="all tensors"):
            wrong()

    graph = torch.cuda.CUDAGraph()
    static = torch.ones(3, device="cuda")
    with torch.cuda.graph(graph):
        doubled = static * 2
    assert doubled.isnan().all(), "a recording computes nothing"
    static.fill_(5)
    graph.replay()
    assert doubled.tolist() == [10, 10, 10]


def write_answers(accelerator: str, folder: str, out: str) -> None:
    """The engine's answers to ten requests in five rows, with one of four adapters, two of them or none."""
    torch.set_num_threads(1)
    paths = {path.stem: path for path in sorted(pathlib.Path(folder).glob("adapter-*.pth"))}
    adapters, tokenizer = load_with(
        pathlib.Path(folder, "base.pth"), paths, "bytes", accelerator=accelerator, precision="fp32"
    )
    decoder, how = fastest(adapters.model, adapters, rows=5)
    names = list(paths)
    chosen = [BASE, *(Applied((name,)) for name in names), Applied((names[0], names[2]), 0.5)]
    requests = [
        Request(
            [(7 * i + j) % 200 + 1 for j in range(1 + 3 * i)],
            4 + i % 3,
            Sampling(temperature=1.0, top_p=0.9) if i % 4 == 3 else GREEDY,
            seed=i,
            applied=chosen[i % len(chosen)],
            logprobs=1,
        )
        for i in range(10)
    ]
    done = {answers[0].request.seed: answers[0] for answers in Engine(decoder, tokenizer).run(requests)}
    said = {
        seed: {"tokens": answer.tokens, "ln p": [drawn.logprob for drawn in answer.logprobs]}
        for seed, answer in sorted(done.items())
    }
    graphs = sorted(getattr(decoder, "graphs", ()))
    pathlib.Path(out).write_text(json.dumps({"how": how, "graphs": graphs, "said": said}))
