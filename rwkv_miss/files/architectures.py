"""Newer architectures whose files look like RWKV-7's, each recognised by the names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..errors import UserError

# name of a tensor -> its architecture; RWKV-7b has the tensors of RWKV-7a too, so it comes first
NEWER = {
    r"blocks\.\d+\.qkv\..+": "RWKV-7b (DEA: attention in addition to the time mix, and DeepEmbed)",
    r"blocks\.\d+\.ffn\.(s_emb(_x)?\..+|s[012])": "RWKV-7a (DeepEmbed: embeddings in the channel mix)",
    r"(.*[._])?rosa.*": "RWKV-8 (ROSA: suffix automata in the place of attention)",
    r"blocks\.\d+\.ffn\.enn\..+": "a preview of RWKV-8 (an embedding in the channel mix)",
}


def refuse_newer(names: Iterable[str], path: str = "") -> None:
    """Raise UserError, with the tensor's name, for a model of an architecture that is not supported."""
    names, where = list(names), f"{path}: " if path else ""
    for pattern, architecture in NEWER.items():
        for name in names:
            if re.fullmatch(pattern, name, re.IGNORECASE):
                raise UserError(
                    f"{where}{name[:100]} belongs to {architecture}, which is not supported; RWKV-6 and"
                    " RWKV-7 (x070, as G1 to G1k) are"
                )
