"""The dtypes of a run's model."""

from __future__ import annotations

import torch

from ..common.device import PRECISIONS


def dtype_of(peft: str, precision: str) -> torch.dtype | None:
    """Return the dtype that full training computes in, on parameters in fp32. None for an adapter: the
    base's.

    It is the model's `computes_in`. There is no torch.autocast: it would decide for each operator, and return
    fp32 from some on a GPU, so that all after them is fp32.
    """
    return PRECISIONS[precision] if peft == "none" else None


def dtype_of_base(peft: str, quant: str, dtype: torch.dtype) -> torch.dtype | None:
    """Choose the dtype in which a base is read: full training keeps fp32, because everything is trained.

    None: the file's dtype, as quantise() converts the other tensors.
    """
    if quant != "none":
        return None
    return torch.float32 if peft == "none" else dtype
