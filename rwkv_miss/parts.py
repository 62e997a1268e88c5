"""Parts of an RWKV model that are trained as whole tensors beside an adapter: emb, head, ln and time.

`time` is what RWKV-6 calls time_*: the token-shift mixes, the decay and the bonus of the current token, of time mix and channel mix, the
low-rank maps of mixes and decay included. RWKV-7 has x_* in their place, w0 w1 w2 for the decay and r_k for the bonus, and the rest of what
shapes its recurrence: the in-context learning rate a0 a1 a2 with k_k and k_a, and the value residual v0 v1 v2. Its g1 and g2 are not among
them, because the gate of RWKV-6 is a linear. Block 0 never reads its v0 v1 v2, so they are in no part.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from .errors import UserError

PARTS = {
    "emb": r"emb\.weight",
    "head": r"head\.weight",
    "ln": r"(.+\.)?ln(\d|_x|_out)\.(weight|bias)",
    "time": r"blocks\.\d+\.(att|ffn)\.(time_(maa|decay|faaaa).*|x_[rwkvag]|[wa][012]|k_k|k_a|r_k)|blocks\.(?!0\.)\d+\.att\.v[012]",
}


def split_parts(text: str) -> list[str]:
    """"ln,time" or "ln time" -> ["ln", "time"], in the order of PARTS; a UserError names what is no part."""
    given = re.split(r"[,\s]+", text.strip()) if text.strip() else []
    for part in given:
        if part not in PARTS:
            raise UserError(f"part {part!r} is unknown; choose from: {', '.join(PARTS)}")
    return [part for part in PARTS if part in given]


def in_parts(names: Iterable[str], parts: list[str]) -> list[str]:
    """The tensors among `names` that belong to these parts, in their order. A part without any is a UserError."""
    names = list(names)
    patterns = {part: re.compile(PARTS[part]) for part in parts}
    for part, pattern in patterns.items():
        if not any(map(pattern.fullmatch, names)):
            raise UserError(f"part {part!r} matches no tensor of this model; parts belong to RWKV-6 and RWKV-7")
    return [name for name in names if any(pattern.fullmatch(name) for pattern in patterns.values())]
