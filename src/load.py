"""A model ready to answer: file, adapter and tokenizer put together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rwkv_miss import Arch, load_adapter
from rwkv_miss.adapter import adapted_linears, put_linears

from . import ops
from .device import DTYPES, choose_accelerator, choose_precision
from .model import RWKV, read_model_file
from .tokenizer import Tokenizer, recorded_tokenizer


def load(
    path, adapter=None, tokenizer: str = "auto", eod: str = "", accelerator: str = "auto", precision: str = "auto", wkv: str = "auto"
) -> tuple[RWKV, Tokenizer]:
    """(model, tokenizer). "auto" is the GPU where there is one, bf16 on it, and the tokenizer that the files record.

    On a CPU with its native kernels "auto" leaves a bf16 file as it is, mapped, and an adapter is merged, in fp32 unless another precision is
    asked for; other files, and other kernels there, are taken in fp32. The decoder computes single tokens in fp32 from bf16 weights, too, and
    loses nothing. Prompts are read with activations in bf16 then, if the CPU has instructions for it: after 2 to 96 tokens the logits of a
    real v6 model are off by 6e-4 in the mean and 4e-3 at most (7e-8 and 2e-7 with "fp32"; |error| / |logits|), a KL of 1e-5, at most 9e-5.
    """
    accelerator = choose_accelerator(accelerator)
    device = "cuda" if accelerator == "gpu" else "cpu"
    tensors = read_model_file(path)
    kernel, _ = ops.choose(wkv, device, Arch.detect(tensors).head_size)
    if precision == "auto" and kernel == "cpu" and in_bf16(tensors):
        dtype = None
    else:
        dtype = DTYPES[choose_precision(precision, accelerator)[0]]
    model = RWKV.load(path, dtype, device, kernel).eval()
    if adapter:
        load_adapter(model, adapter)
        if kernel == "cpu":
            merge_adapter(model, dtype or torch.float32)
    return model, recorded_tokenizer(tokenizer, eod, model.arch.vocab_size, adapter, path)


def in_bf16(tensors: dict[str, Tensor]) -> bool:
    """Whether all large matrices of a model are bf16."""
    return all(tensor.dtype == torch.bfloat16 for name, tensor in tensors.items() if name.endswith(".weight") and tensor.dim() == 2)


@torch.no_grad()
def merge_adapter(model: RWKV, dtype: torch.dtype) -> None:
    """Adapted linears become plain ones of the merged weight: added in fp32, then rounded to `dtype`, as merge does."""
    with torch.device("meta"):
        plain = RWKV(model.arch, model.blocks[0].att.kernel).train(model.training)
    for name, layer in adapted_linears(model).items():
        merged = layer.base_weight()
        layer.add_delta_to(merged)
        linear = plain.get_submodule(name)
        linear.weight = nn.Parameter(merged.to(dtype), requires_grad=False)
        put_linears(model, {name: linear})
