"""Parts of an RWKV model that are trained as whole tensors, with or without an adapter: emb, head, ln, time
and state.

`time` are the tensors time_* of RWKV-6: the token-shift mixes, the decay and the bonus of the current token,
in time mix and channel mix, with the low-rank maps of mixes and decay. In RWKV-7 it is x_* for the mixes, w0
w1 w2 for the decay, r_k for the bonus, and the other tensors of the recurrence: the in-context learning rate
a0 a1 a2 with k_k and k_a, and the value residual v0 v1 v2. g1 and g2 are not included, because the gate of
RWKV-6 is a linear. Block 0 never reads its v0 v1 v2, so they are in no part.

`state` is the WKV state that every document starts from, `blocks.i.att.time_state` (H, N, N), [value, key]
for both versions, as in released state files. A layer that takes a state has a slot of that name, which is
None until the state is trained or read from a file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import nn

from ..errors import UserError

PARTS = {
    "emb": r"emb\.weight",
    "head": r"head\.weight",
    "ln": r"(.+\.)?ln(\d|_x|_out)\.(weight|bias)",
    "time": (
        r"blocks\.\d+\.(att|ffn)\.(time_(maa|decay|faaaa).*|x_[rwkvag]|[wa][012]|k_k|k_a|r_k)|blocks\.(?!0\.)\d+\.att\.v[012]"
    ),
    "state": r"blocks\.\d+\.att\.time_state",
}


def split_parts(text: str) -> list[str]:
    """Split "ln,time" or "ln time" into ["ln", "time"], in PARTS's order. Raises UserError for others."""
    names = re.split(r"[,\s]+", text.strip()) if text.strip() else []
    for part in names:
        if part not in PARTS:
            raise UserError(f"part {part!r} is unknown; choose from: {', '.join(PARTS)}")
    return [part for part in PARTS if part in names]


def in_parts(names: Iterable[str], parts: list[str]) -> list[str]:
    """Select the tensors among `names` that belong to these parts, in their order.

    Raises UserError for a part that has none of them.
    """
    names = list(names)
    patterns = {part: re.compile(PARTS[part]) for part in parts}
    for part, pattern in patterns.items():
        if not any(map(pattern.fullmatch, names)):
            raise UserError(
                f"part {part!r} matches no tensor of this model; parts belong to RWKV-6 and RWKV-7"
            )
    return [name for name in names if any(pattern.fullmatch(name) for pattern in patterns.values())]


def train_whole(model: nn.Module, name: str) -> None:
    """Replace a parameter by a trainable one in fp32; a float64 parameter stays float64."""
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    p = getattr(owner, leaf)
    setattr(owner, leaf, nn.Parameter(p.detach().to(torch.promote_types(p.dtype, torch.float32))))


def state_names(model: nn.Module) -> list[str]:
    """Name the initial states of all layers that take one, also those that do not exist yet."""
    return [f"{name}.time_state" for name, module in model.named_modules() if hasattr(module, "time_state")]


def add_states(model: nn.Module) -> None:
    """Add a frozen initial state of zeros, fp32, to every layer that takes one and has none.

    Outputs do not change.
    """
    for name in state_names(model):
        layer = model.get_submodule(name.rpartition(".")[0])
        if layer.time_state is None:
            size = model.arch.n_head, model.arch.head_size, model.arch.head_size
            layer.time_state = nn.Parameter(
                torch.zeros(size, device=next(layer.parameters()).device), requires_grad=False
            )
