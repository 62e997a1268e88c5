"""Choice of a model's decoder, and of the number of prompt tokens that it reads at once."""

from __future__ import annotations

from rwkv_miss.errors import UserError

from ..common.formatting import counted
from ..model import RWKV
from . import bf16_products
from .adapters import Adapters
from .cpu_decoder import Decoder, problem
from .cuda_graph import GraphedDecoder
from .huge_pages import move_weights
from .row_decoder import RowDecoder
from .torch_decoder import TorchDecoder

# tokens of a prompt that are read at once, see prompt_chunk()
CPU_CHUNK = 256
GPU_CHUNK = 1024  # not measured yet


def fastest(
    model: RWKV,
    adapters: Adapters | None = None,
    rows: int = 1,
    *,
    int8: bool = False,
    huge_pages: str = "no",
    bf16_activations: bool = False,
) -> tuple[RowDecoder, str]:
    """Choose (the fastest decoder for the model, its description).

    `rows`: the number of answers that it makes at once; `adapters`: those that their requests choose from.
    `huge_pages`: yes, no or auto (huge_pages.py), for the CPU's own decoder; the model's matrices then lie in
    other memory. `bf16_activations`: rounded for its products with bf16 weights, which is faster for 8 rows
    and more. Raises UserError if int8, yes or bf16 activations are asked for where that decoder does not run,
    or the CPU has no instructions for the last.
    """
    flags = {
        "--quant int8": int8,
        "--huge_pages yes": huge_pages == "yes",
        "--activations bf16": bf16_activations,
    }
    if reason := problem(model):
        for flag, given in flags.items():
            if given:
                raise UserError(f"{flag} is for the CPU's own decoder, which does not run here: {reason}")
        if model.kernel.startswith("cuda"):
            graphed = GraphedDecoder(model, rows, adapters)
            try:
                graphed.check()
                return graphed, "one CUDA graph a token"
            except RuntimeError as error:
                reason = f"a CUDA graph does not work: {' '.join(str(error).split())}"
        return TorchDecoder(model, rows, adapters), f"token by token in torch, as {reason}"
    if bf16_activations and not bf16_products.instruction_is_there():
        raise UserError(
            "--activations bf16: this CPU has no instructions for it (avx512_bf16); drop the flag"
        )
    # the base's tensors, which an adapter may replace
    matrices = dict(model.named_parameters()) | (adapters.base if adapters else {})
    pages = "" if int8 else move_weights(matrices, huge_pages)
    decoder = Decoder(
        model, rows, adapters, int8=int8, huge_pages=huge_pages != "no", bf16_activations=bf16_activations
    )
    if decoder.region:
        pages = decoder.region.describe()
    weights = "int8" if int8 else " and ".join(_dtypes_of_matrices(model))
    reading = str(decoder.reading).removeprefix("torch.")
    parts = [f"{weights} weights", pages, f"prompts in {reading}", counted(decoder.threads, "thread")]
    return decoder, ", ".join(filter(None, parts))


def for_training(model: RWKV, rows: int) -> RowDecoder:
    """Make a decoder for `rows` answers of a model between two steps of its training, with its adapter.

    The next answers need another one: it may hold copies of trained tensors.
    """
    return TorchDecoder(model, rows) if problem(model) else Decoder(model, rows)


def _dtypes_of_matrices(model: RWKV) -> list[str]:
    matrices = [p for name, p in model.named_parameters() if name.endswith(".weight") and p.dim() == 2]
    return sorted({str(p.dtype).removeprefix("torch.") for p in matrices})


def prompt_chunk(decoder: RowDecoder) -> int:
    """Return how many tokens of a prompt are read at once, by the decoder's device alone.

    Prompts that are read in other chunks have other last bits. So nothing is timed here: a model answers the
    same after every start. Others wait for a chunk between two tokens: docs/serving.md has the figures.
    """
    return CPU_CHUNK if decoder.model.emb.weight.device.type == "cpu" else GPU_CHUNK
