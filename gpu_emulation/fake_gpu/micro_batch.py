"""A micro-batch on the fake GPU, as a run has it: model, batch, and what a layer of it asks for."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import nn

from benchmarks.op_counts import TRAFFIC, difference
from rwkv_miss.files.checkpoint import Arch
from rwkv_miss.quantised import empty
from src.common.batch import Batch
from src.common.device import PRECISIONS
from src.config import Config
from src.data.collate import trained_tokens
from src.model import RWKV, default_arch
from src.model.dtypes import dtype_of
from src.model.rwkv import replace_tensors
from src.planning.step_memory import model_on_meta
from src.sources import source_of

from .device import FakeGpu

# counted layers: RWKV-7's first one differs from the others, the last one runs on the trained
# tokens only; tokens and sizes are those of a 1.5B model's run, but the head's, which is no part of a layer
FEW, MORE = 2, 3
ROWS, WIDTH, N_EMBD, VOCAB, RANK = 8, 1024, 2048, 512, 64


def config_of(peft: str, rank: int = 8, **settings) -> Config:
    return Config(
        peft=peft,
        peft_config={} if peft in ("none", "state") else {"rank": rank},
        **{"precision": "bf16", "grad_cp": 0, **settings},
    )


def model_on(device: str, arch: Arch, config: Config) -> RWKV:
    """A model as a run in half precision has it: the frozen base in it or quantised, what is trained fp32."""
    model = model_on_meta(arch, config.adapter)
    half = PRECISIONS[config.precision]
    quantised, model.computes_in = set(), dtype_of(config.peft, config.precision)
    if config.quant != "none":
        quantised, model.computes_in = {f"{name}.weight" for name in model.layer_linears()}, half

    def on_device(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name in quantised:
            return empty(config.quant, *tensor.shape, device=device)
        of_base = isinstance(tensor, nn.Parameter) and not tensor.requires_grad and config.peft != "none"
        return torch.empty(tensor.shape, dtype=half if of_base else tensor.dtype, device=device)

    replace_tensors(model, on_device)
    model.grad_cp = config.grad_cp
    model.set_kernel("cuda")
    return model


def small_model_on(
    device: str, version: int, config: Config, n_layer: int = 2, n_embd: int = 128, vocab: int = 512
) -> RWKV:
    return model_on(device, default_arch(version, n_layer, n_embd, vocab, 64), config)


def batch_on(device: str, rows: int, width: int, weighted: bool = False, chunk: int = 0) -> Batch:
    """As src.data.collate.collate makes it, of tokens that are all trained."""
    ids = torch.zeros(rows, width, dtype=torch.int64)
    trained = trained_tokens(ids.numpy(), np.full(ids.shape, 0.5 if weighted else 1), chunk)
    reset = torch.zeros(rows, width, dtype=torch.bool)
    return Batch(ids=ids, reset=reset, **trained, width=width).to(torch.device(device))


def tallied(arch: Arch, config: Config, rows: int, width: int) -> dict[str, dict[str, int]]:
    """Launches, bytes and multiply-adds by kind of a micro-batch, forward and backward."""
    with FakeGpu() as gpu:
        model, batch = model_on("cuda:0", arch, config), batch_on("cuda:0", rows, width)
        if config.peft != "none":
            gpu.tell_base(p for p in model.parameters() if not p.requires_grad)
        gpu.begin()
        source_of(config).chunks.loss(model, batch).backward()
    return gpu.tally.as_dict()


def layer_tallied(
    arch: Arch, config: Config, rows: int, width: int
) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, int]]]:
    """(what one layer adds, what a model of FEW layers has)."""
    few, more = (
        tallied(dataclasses.replace(arch, n_layer=count), config, rows, width) for count in (FEW, MORE)
    )
    return difference(more, few), few


def activations(counts: dict[str, dict[str, int]], rows: int, width: int, n_embd: int) -> float:
    """Elementwise traffic in tensors of (B, T, C) in half precision."""
    return sum(counts["bytes"].get(kind, 0) for kind in TRAFFIC) / (2 * rows * width * n_embd)


def layer(peft: str, version: int) -> dict:
    """Launches of a layer by kind, forward and backward, and the tensors that its elementwise part moves."""
    arch = default_arch(version, MORE, N_EMBD, VOCAB, 64)
    counts, _ = layer_tallied(arch, config_of(peft, RANK), ROWS, WIDTH)
    launches = counts["launches"]
    return {
        "launches": {"total": sum(launches.values()), **launches},
        "tensors": round(activations(counts, ROWS, WIDTH, N_EMBD), 1),
    }


def trained_numbers(arch: Arch, config: Config) -> int:
    """Count the trained parameters."""
    return sum(p.numel() for p in model_on_meta(arch, config.adapter).parameters() if p.requires_grad)
