"""The adapters that lie side by side for a batch (unmerged_linear.py), and how much of each a row has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .unmerged_linear import Columns, LowRank, Owners, side_by_side

# what an adapter adds to linears, by their names
Factors = Mapping[str, LowRank]


class Applied(NamedTuple):
    """The adapters of one row of a batch, by their names, each times `scale`."""

    names: tuple[str, ...] = ()
    scale: float = 1.0


# a row that asks for no adapter has what Adapters.use() chose for the whole model
BASE = Applied()


class Mix(NamedTuple):
    """What the rows of a batch have of the adapters that lie side by side."""

    columns: Mapping[str, Columns]  # by the names of linears
    shares: dict[Owners, Tensor]  # (B, R) fp32, or (1, R) where all rows have the same


def scales(applied: Sequence[Applied], names: Sequence[str | None]) -> Tensor:
    """(B, names) fp32: how much of each adapter every row has."""
    return torch.tensor([[one.scale if name in one.names else 0.0 for name in names] for one in applied])


def columns_of(owners: Owners, of_rows: Tensor) -> Tensor:
    """Scales (B, adapters) -> (B, R), of every column."""
    return of_rows[:, [place for place, count in owners for _ in range(count)]]


def shares(columns: Mapping[str, Columns], of_rows: Tensor, device: torch.device) -> dict[Owners, Tensor]:
    """Scales (B, adapters) -> (B, R), once for all linears with the same columns."""
    return {
        owners: columns_of(owners, of_rows).to(device) for owners in {one.owners for one in columns.values()}
    }


def form(factors: Factors) -> dict[str, tuple[bool, int]]:
    """What adapters have in common that can take each other's place."""
    return {name: (factor.A is None, factor.B.shape[1]) for name, factor in factors.items()}


class Stack:
    """Adapters side by side, in tensors of its own: another adapter of the same form can take one's place.

    So what has recorded the tensors' addresses, as a CUDA graph has, goes on with the new one.
    """

    def __init__(self, adapters: Mapping[str, Factors]):
        self.names: list[str | None] = list(adapters)  # None: it is there no more
        self.forms = [form(factors) for factors in adapters.values()]
        self.columns = {}
        for name in dict.fromkeys(name for factors in adapters.values() for name in factors):
            columns = side_by_side([factors.get(name) for factors in adapters.values()])
            if len(columns.owners) == 1:
                A = columns.A if columns.A is None else columns.A.clone()
                columns = columns._replace(A=A, B=columns.B.clone())
            self.columns[name] = columns

    def take_in(self, name: str, factors: Factors, needed: set[str]) -> bool:
        """Put an adapter into the place of one of its form that is not needed; False: there is none."""
        own = form(factors)
        free = [i for i, other in enumerate(self.names) if other not in needed and self.forms[i] == own]
        if not free:
            return False
        for linear, (A, B, _) in factors.items():
            columns = self.columns[linear]
            of_B, of_A = columns.place(free[0])
            columns.B[:, of_B].copy_(B)
            if A is not None:
                columns.A[of_A].copy_(A)
        self.names[free[0]] = name
        return True

    def forget(self, name: str) -> None:
        """Another adapter may take the place of this one, which no row has any more."""
        self.names = [None if other == name else other for other in self.names]
