"""Layers whose adapters are turned off in a thread."""

from __future__ import annotations

import threading

import torch


class Disabled(threading.local):
    """Layers that are disabled in a thread: id of the layer -> number of the thread's disabled() blocks."""

    def __init__(self) -> None:
        self.layers: dict[int, int] = {}


_DISABLED, KEY = Disabled(), "rwkv_miss.disabled"


def disabled_here() -> dict[int, int]:
    # A GPU's backward, which may compute layers again, runs in a thread of torch. That thread sees the layers
    # that its caller has stashed. torch.compile can only follow the attribute.
    if not torch.compiler.is_compiling() and torch._C._is_key_in_tls(KEY):
        return torch._C._get_obj_in_tls(KEY)
    return _DISABLED.layers
