"""Where a model runs and in which dtype."""

from __future__ import annotations

import torch

from rwkv_miss.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_accelerator(asked: str) -> str:
    """cpu or gpu."""
    if asked == "gpu" and not torch.cuda.is_available():
        raise UserError("--accelerator gpu: torch sees no CUDA GPU on this machine; use --accelerator cpu")
    return asked if asked != "auto" else "gpu" if torch.cuda.is_available() else "cpu"


def choose_precision(asked: str, accelerator: str) -> tuple[str, str]:
    """(fp32, bf16 or fp16; why)."""
    if asked != "auto":
        return asked, "as asked"
    if accelerator == "cpu":
        return "fp32", "auto: a CPU"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16", "auto: the GPU has bf16"
    return "fp16", "auto: the GPU has no bf16"
