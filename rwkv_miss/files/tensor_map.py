"""Maps between a checkpoint's tensors and another format's. One table of them serves both directions.

Shapes are torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

LARGE, LOW_RANK, VECTOR = "large matrix", "low-rank map", "vector"
VALUE_RESIDUAL = [f"blocks.0.att.v{i}" for i in range(3)]  # RWKV-7 tensors that nothing reads in block 0


class TensorForm(NamedTuple):
    """Conversion of the checkpoint's tensors to a stored one and back, up to shapes (C) and (1, 1, C)."""

    store: Callable[[list[Tensor]], Tensor]
    restore: Callable[[Tensor, int], list[Tensor]]  # arguments: the stored tensor and the head size


FORMS = {
    "same": TensorForm(lambda t: t[0], lambda t, size: [t]),
    "flat": TensorForm(lambda t: t[0].flatten(), lambda t, size: [t.reshape(1, 1, -1)]),
    "wide": TensorForm(lambda t: t[0].reshape(1, 1, -1), lambda t, size: [t.reshape(1, 1, -1)]),
    "heads": TensorForm(lambda t: t[0].flatten(), lambda t, size: [t.reshape(-1, size)]),
    # the checkpoint computes x @ w; the other format has a linear's weight, w transposed
    "transposed": TensorForm(lambda t: t[0].transpose(-1, -2), lambda t, size: [t.transpose(-1, -2)]),
    "fused": TensorForm(
        lambda t: torch.stack([part.reshape(1, 1, -1) for part in t]),
        lambda t, size: list(t.reshape(len(t), 1, 1, -1)),
    ),
}


class TensorMap(NamedTuple):
    """Stored tensor, and the checkpoint's tensors in it."""

    stored: str  # name of the stored tensor
    names: tuple[str, ...]  # names of the checkpoint's tensors
    form: str  # key in FORMS
    kind: str  # LARGE, LOW_RANK or VECTOR

    def at(self, layer: int, prefix: str) -> TensorMap:
        return self._replace(
            stored=f"{prefix}.{layer}.{self.stored}",
            names=tuple(f"blocks.{layer}.{name}" for name in self.names),
        )

    def store(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Make the stored tensor; only a form that joins several tensors makes a copy."""
        return FORMS[self.form].store([tensors[name] for name in self.names])


def restore(table: Iterable[TensorMap], stored: Mapping[str, Tensor], head_size: int) -> dict[str, Tensor]:
    """Restore the checkpoint's tensors as views of the stored ones."""
    restored = {}
    for mapped in table:
        restored |= zip(mapped.names, FORMS[mapped.form].restore(stored[mapped.stored], head_size))
    return restored
