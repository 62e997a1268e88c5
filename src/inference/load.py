"""Loading of a model that can answer: file, adapters and tokenizer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rwkv_miss import Arch, UserError, read_metadata

from .. import ops
from ..common.device import PRECISIONS, choose_accelerator, choose_precision
from ..data.recorded_tokenizer import recorded_tokenizer
from ..data.tokenizer import Tokenizer
from ..model import RWKV, read_model_file
from .adapters import Adapters


def load(
    path, adapter=None, tokenizer: str = "auto", eod: str = "", **options: str
) -> tuple[RWKV, Tokenizer]:
    """Load (model, tokenizer) as load_with() does, with the adapter in use if there is one.

    `options` are its accelerator, precision and wkv.
    """
    adapters, tokenizer = load_with(path, {"adapter": adapter} if adapter else {}, tokenizer, eod, **options)
    adapters.use(list(adapters.by_name))
    return adapters.model, tokenizer


def refuse_folders(files: Mapping[str, str]) -> None:
    """Raise UserError for an adapter, name -> path, that is a folder."""
    for folder in filter(os.path.isdir, files.values()):
        raise UserError(
            f"{folder} is a folder, and an adapter here is one .pth; "
            f"python -m rwkv_miss convert {folder} adapter.pth --to native makes it"
        )


def load_with(
    path,
    files: Mapping[str, Any],
    tokenizer: str = "auto",
    eod: str = "",
    accelerator: str = "auto",
    precision: str = "auto",
    wkv: str = "auto",
) -> tuple[Adapters, Tokenizer]:
    """Load (model with the adapter files, none of them in use yet; tokenizer).

    "auto" is the GPU if there is one, bf16 on it, and the tokenizer that the files record. On a CPU with its
    native kernels "auto" leaves a bf16 file as it is, mapped. Other files are converted to fp32, and with
    other kernels all are.

    The decoder computes single tokens in fp32 from bf16 weights, too, and loses nothing. Prompts are then
    read with activations in bf16, if the CPU has instructions for it. After 2 to 96 tokens of a real v6 model
    the relative error of the logits, |error| / |logits|, is 6e-4 in the mean and 4e-3 at most. With "fp32" it
    is 7e-8 and 2e-7. The KL divergence is 1e-5 in the mean and 9e-5 at most. An adapter never changes the
    weights, whatever their precision (adapters.py).
    """
    refuse_folders(files)
    accelerator = choose_accelerator(accelerator)
    device = "cuda" if accelerator == "gpu" else "cpu"
    tensors = read_model_file(path)
    kernel, _ = ops.choose(wkv, device, Arch.detect(tensors).head_size)
    if precision == "auto" and kernel == "cpu" and in_bf16(tensors):
        dtype = None
    else:
        dtype = PRECISIONS[choose_precision(precision, accelerator)[0]]
    _check_tokenizers(tokenizer, files)
    model = RWKV.load(path, dtype, device, kernel).eval()
    adapters = Adapters(model, files)
    return adapters, recorded_tokenizer(tokenizer, eod, model.arch.vocab_size, *files.values(), path)


def _check_tokenizers(tokenizer: str, files: Mapping[str, Any]) -> None:
    """Raise UserError if adapters that are to be switched record different tokenizers, and none is given."""
    records = {name: (read_metadata(path) or {}).get("tokenizer") for name, path in files.items()}
    different = {record for record in records.values() if record}
    if tokenizer == "auto" and len(different) > 1:
        named = ", ".join(f"{name}: {record}" for name, record in records.items())
        raise UserError(
            f"the adapters were trained with different tokenizers ({named}); give --tokenizer, or chat with"
            " them one by one"
        )


def in_bf16(tensors: dict[str, Tensor]) -> bool:
    """Tell whether all large matrices of a model are bf16."""
    matrices = [tensor for name, tensor in tensors.items() if name.endswith(".weight") and tensor.dim() == 2]
    return all(matrix.dtype == torch.bfloat16 for matrix in matrices)
