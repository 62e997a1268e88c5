"""AdamW's moments as a checkpoint has them: `step`, and `exp_avg` and `exp_avg_sq` in fp32.

torch's AdamW keeps them so. bitsandbytes keeps a code of 8 bits for each number, and the largest size in each
block of numbers as its scale. Packing what was unpacked gives the same bits, whoever has which part.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256  # numbers with one scale
AT_ONCE = BLOCK << 12  # numbers that are packed at a time
SMALL = 4096  # tensors of fewer numbers keep their moments in fp32
MOMENTS = ("exp_avg", "exp_avg_sq")


def unpacked(state: Mapping, start: int = 0, size: int | None = None) -> dict[str, Tensor]:
    """Return the moments of `size` numbers from `start` on, flat and in fp32, and `step`.

    `state` is the optimizer's for a tensor; {} before its first step.
    """
    end = None if size is None else start + size
    if "state1" not in state:
        return {key: value.flatten()[start:end] if value.dim() else value for key, value in state.items()}
    moments = {"step": torch.tensor(float(state["step"]))}
    for number, name in enumerate(MOMENTS, 1):
        codes = state[f"state{number}"].flatten()
        if codes.dtype != torch.uint8:
            moments[name] = codes[start:end]
            continue
        first, stop = start // BLOCK, len(codes) if end is None else end
        last = max(-(-stop // BLOCK), first + 1)  # a share may be empty
        block, scales = codes[first * BLOCK : last * BLOCK], state[f"absmax{number}"][first:last]
        _, values = _maps(codes.device)[name]
        whole = torch.ops.bitsandbytes.dequantize_blockwise(block, scales, values, BLOCK, torch.float32)
        moments[name] = whole[start - first * BLOCK : stop - first * BLOCK]
    return moments


def packed(moments: Mapping[str, Tensor], device: torch.device) -> dict:
    """Invert unpacked(): return the state of bitsandbytes' AdamW8bit for a tensor on `device`."""
    if not moments:
        return {}
    state: dict = {"step": int(moments["step"])}
    for number, name in enumerate(MOMENTS, 1):
        moment = moments[name]
        if moment.numel() < SMALL:
            state[f"state{number}"] = moment.to(device, copy=True)
            continue
        codes, _ = _maps(device)[name]
        # a slice at a time: the work on one takes several times its bytes
        parts = [_nearest(part.to(device), codes) for part in moment.flatten().split(AT_ONCE)]
        nearest, scales = (torch.cat(kind) for kind in zip(*parts, strict=True))
        state |= {f"state{number}": nearest.view_as(moment), f"absmax{number}": scales}
        state[f"qmap{number}"] = codes
    return state


def _nearest(part: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Return (codes of these numbers, the scale of each block). The library's own quantisation takes the
    nearest code but for small numbers."""
    blocks = F.pad(part, (0, -len(part) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    shares = blocks / scales.clamp(min=torch.finfo().tiny)[:, None]
    nearest = torch.bucketize(shares, (codes[1:] + codes[:-1]) / 2, out_int32=True)
    return nearest.flatten()[: len(part)].to(torch.uint8), scales


def adamw_of_8_bits() -> type[torch.optim.Optimizer]:
    """Import bitsandbytes' optimizer."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # no warnings of kernels for other uses
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit


@functools.cache
def _maps(device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
    """Return each moment's values of the codes, to pack with and to unpack with.

    There is a code for 1 and none for -1, so a block whose largest number is negative would be unpacked
    smaller than its scale. The lowest code is unpacked as -1: packed again it gives the same scale and codes.
    """
    from bitsandbytes.functional import create_dynamic_map

    signed, unsigned = (create_dynamic_map(signed=signed).to(device) for signed in (True, False))
    whole = signed.clone()
    whole[0] = -1
    return {"exp_avg": (signed, whole), "exp_avg_sq": (unsigned, unsigned)}


def moment_bytes(optimizer: str, numel: float) -> float:
    """Count the bytes of both moments of a tensor under --optimizer."""
    packs = optimizer == "adamw8bit" and numel >= SMALL
    return 2 * (numel + 4 * math.ceil(numel / BLOCK)) if packs else 8 * numel
