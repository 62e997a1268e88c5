"""A model ready to answer: file, adapter and tokenizer put together."""

from __future__ import annotations

from rwkv_miss import Arch, load_adapter

from . import ops
from .device import DTYPES, choose_accelerator, choose_precision
from .model import RWKV, read_model_file
from .tokenizer import Tokenizer, recorded_tokenizer


def load(
    path, adapter=None, tokenizer: str = "auto", eod: str = "", accelerator: str = "auto", precision: str = "auto", wkv: str = "auto"
) -> tuple[RWKV, Tokenizer]:
    """(model, tokenizer). "auto" is the GPU where there is one, bf16 on it and fp32 on a CPU, and the tokenizer that the files record."""
    accelerator = choose_accelerator(accelerator)
    device = "cuda" if accelerator == "gpu" else "cpu"
    precision, _ = choose_precision(precision, accelerator)
    kernel, _ = ops.choose(wkv, device, Arch.detect(read_model_file(path)).head_size)
    model = RWKV.load(path, DTYPES[precision], device, kernel).eval()
    if adapter:
        load_adapter(model, adapter)
    return model, recorded_tokenizer(tokenizer, eod, model.arch.vocab_size, adapter, path)
