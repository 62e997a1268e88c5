"""Which decoder answers for a model, and how much of a prompt it reads at once."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

from rwkv_miss.errors import UserError

from ..common.formatting import counted
from ..model import RWKV
from .adapters import Adapters
from .cpu_decoder import Decoder, problem
from .cuda_graph import GraphedDecoder
from .torch_decoder import TorchDecoder

CHUNKS = [2**i for i in range(4, 13)]  # tokens


def fastest(
    model: RWKV, adapters: Adapters | None = None, rows: int = 1, int8: bool = False
) -> tuple[Decoder | TorchDecoder, str]:
    """(the fastest decoder that answers for the model, what it is in words).

    `rows` are the answers that it makes at once; `adapters` is what their requests choose from. UserError if
    int8 is asked for where the CPU's own decoder does not run.
    """
    if found := problem(model):
        if int8:
            raise UserError(f"--quant int8 is for the CPU's own decoder, which does not run here: {found}")
        if model.blocks[0].att.kernel.startswith("cuda"):
            graphed = GraphedDecoder(model, rows, adapters)
            try:
                graphed.check()
                return graphed, "one CUDA graph a token"
            except RuntimeError as error:
                found = f"a CUDA graph does not work: {' '.join(str(error).split())}"
        return TorchDecoder(model, rows, adapters), f"token by token in torch, as {found}"
    decoder = Decoder(model, rows, adapters, int8)
    weights = "int8" if int8 else " and ".join(_dtypes_of_matrices(model))
    reading = str(decoder.reading).removeprefix("torch.")
    return decoder, f"{weights} weights, prompts in {reading}, {counted(decoder.threads, 'thread')}"


def _dtypes_of_matrices(model: RWKV) -> list[str]:
    matrices = [p for name, p in model.named_parameters() if name.endswith(".weight") and p.dim() == 2]
    return sorted({str(p.dtype).removeprefix("torch.") for p in matrices})


def measured_chunk(decoder, seconds: float = 0.06) -> int:
    """The most tokens, a power of two, that the decoder reads within so many seconds here and now.

    At least 16, also where these take longer. It is measured on prompts of 16, 32, ... tokens, three times
    each, after one that is not counted; a step of all rows then comes on top. Prompts that are read in other
    chunks have other last bits: give a server its chunk where it is to answer as another one did.
    """
    best = CHUNKS[0]
    for size in CHUNKS:
        ids = torch.arange(size)[None] % decoder.model.arch.vocab_size
        _seconds(decoder, ids)
        if statistics.median(_seconds(decoder, ids) for _ in range(3)) > seconds:
            break
        best = size
    return best


def _seconds(decoder, ids: Tensor) -> float:
    """Of one chunk. The logits are read, so that a GPU is through with it."""
    start = time.perf_counter()
    decoder.read(ids, None)[0].cpu()
    return time.perf_counter() - start
