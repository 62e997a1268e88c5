"""Files of Ai00, a server on web-rwkv: safetensors in fp16, of a whole model or of initial states alone.

Names and turned matrices are those of assets/scripts/convert_safetensors.py in Ai00-X/ai00_server, and what
src/runtime/loader.rs of cryscan/web-rwkv asks for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from rwkv_miss.errors import UserError
from rwkv_miss.files.checkpoint import Arch
from rwkv_miss.files.provenance import Provenance
from rwkv_miss.files.safetensors_io import write_safetensors

from ..common.formatting import counted

RENAMED = {"time_faaaa": "time_first", "time_maa": "time_mix"}
# x @ w in the checkpoint; a state is (heads, value, key)
TURNED = re.compile(r".*\.((time_(maa|decay)_)?[wavg][12]|time_state)")
LARGEST = torch.finfo(torch.float16).max


def check(arch: Arch) -> None:
    """Raise UserError for a model that web-rwkv's loader takes for another one."""
    if arch.dim_att != arch.n_embd or (arch.version == 7 and arch.n_layer == 1):
        raise UserError(
            f"Ai00: {arch.describe()}; its loader expects heads that are as wide as the model in all, and the"
            " value residual of a second layer"
        )


def write(out, tensors: Mapping[str, Tensor], provenance: Provenance) -> list[str]:
    """Write a checked model, or initial states, whole or not at all; returns notes.

    Raises UserError for a value beyond fp16.
    """
    stored = {}
    for name, tensor in tensors.items():
        if not all(-LARGEST <= end <= LARGEST for end in tensor.aminmax()):
            raise UserError(f"Ai00: {name} has values beyond fp16's largest, {LARGEST:g}")
        turned = tensor.mT if TURNED.fullmatch(name) else tensor
        for ours, theirs in RENAMED.items():
            name = name.replace(ours, theirs)
        stored[name] = turned
    write_safetensors(out, stored, {"format": "pt"}, torch.float16)
    rounded = provenance.rounded(dict.fromkeys(tensors, torch.float16))
    if not rounded:
        return []
    return [f"{counted(len(rounded), 'tensor')}, {rounded[0]} first, had to be rounded to fp16"]
