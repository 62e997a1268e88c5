"""What a tensor of another form is made of: rows of a table that is read in both directions. Shapes as torch
has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

LARGE, MAP, VECTOR = "large matrix", "low-rank map", "vector"


class Form(NamedTuple):
    """`store` makes the stored tensor of the checkpoint's; `restore`, given the head size, is its inverse, up
    to the shapes (C) and (1, 1, C).
    """

    store: Callable[[list[Tensor]], Tensor]
    restore: Callable[[Tensor, int], list[Tensor]]


FORMS = {
    "same": Form(lambda t: t[0], lambda t, size: [t]),
    "flat": Form(lambda t: t[0].flatten(), lambda t, size: [t.reshape(1, 1, -1)]),
    "wide": Form(lambda t: t[0].reshape(1, 1, -1), lambda t, size: [t.reshape(1, 1, -1)]),
    "heads": Form(lambda t: t[0].flatten(), lambda t, size: [t.reshape(-1, size)]),
    # x @ w in the checkpoint, a linear's weight elsewhere
    "transposed": Form(lambda t: t[0].transpose(-1, -2), lambda t, size: [t.transpose(-1, -2)]),
    "fused": Form(
        lambda t: torch.stack([part.reshape(1, 1, -1) for part in t]),
        lambda t, size: list(t.reshape(len(t), 1, 1, -1)),
    ),
}


class Row(NamedTuple):
    """The name of a stored tensor, those of the checkpoint's tensors in it, their form, and LARGE, MAP or
    VECTOR.
    """

    stored: str
    names: tuple[str, ...]
    form: str
    kind: str

    def at(self, layer: int, prefix: str) -> Row:
        return self._replace(
            stored=f"{prefix}.{layer}.{self.stored}",
            names=tuple(f"blocks.{layer}.{name}" for name in self.names),
        )

    def store(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The stored tensor; without a copy but for vectors in one."""
        return FORMS[self.form].store([tensors[name] for name in self.names])


def restore(rows: Iterable[Row], stored: Mapping[str, Tensor], head_size: int) -> dict[str, Tensor]:
    """The checkpoint's tensors, views of the stored ones."""
    return {
        name: tensor
        for row in rows
        for name, tensor in zip(row.names, FORMS[row.form].restore(stored[row.stored], head_size))
    }
