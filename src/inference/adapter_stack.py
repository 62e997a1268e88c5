"""Stack of the adapters that lie side by side for a batch (unmerged_linear.py), with each row's scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .unmerged_linear import FactorColumns, LowRank, Owners, side_by_side

# changes of linears by an adapter, by the linears' names
Factors = Mapping[str, LowRank]


class Applied(NamedTuple):
    """The adapters of one row of a batch, by their names, each times `scale`."""

    names: tuple[str, ...] = ()
    scale: float = 1.0


# a row that asks for no adapter has what Adapters.use() chose for the whole model
BASE = Applied()


class Mix(NamedTuple):
    """Adapters side by side, and each row's share of them."""

    columns: Mapping[str, FactorColumns]  # by the names of linears
    shares: dict[Owners, Tensor]  # (B, R) fp32, or (1, R) where all rows have the same


def scales(applied: Sequence[Applied], names: Sequence[str | None]) -> Tensor:
    """Return (B, names) fp32: the scale of each adapter in every row."""
    return torch.tensor([[one.scale if name in one.names else 0.0 for name in names] for one in applied])


def columns_of(owners: Owners, of_rows: Tensor) -> Tensor:
    """Spread scales (B, adapters) over the columns: (B, R)."""
    return of_rows[:, [place for place, count in owners for _ in range(count)]]


def shares(
    columns: Mapping[str, FactorColumns], of_rows: Tensor, device: torch.device
) -> dict[Owners, Tensor]:
    """Spread scales (B, adapters) to (B, R), once for all linears with the same columns."""
    return {
        owners: columns_of(owners, of_rows).to(device) for owners in {one.owners for one in columns.values()}
    }


def form(factors: Factors) -> dict[str, tuple[bool, int]]:
    """Return the form that adapters must share to take each other's place."""
    return {name: (factor.A is None, factor.B.shape[1]) for name, factor in factors.items()}


class Stack:
    """Adapters side by side, in tensors of its own: another adapter of the same form can take one's place.

    So a CUDA graph, which has recorded the tensors' addresses, works with the new one.
    """

    def __init__(self, adapters: Mapping[str, Factors]):
        self.names: list[str | None] = list(adapters)  # None: a free place
        self.forms = [form(factors) for factors in adapters.values()]
        self.columns = {}
        for name in dict.fromkeys(name for factors in adapters.values() for name in factors):
            columns = side_by_side([factors.get(name) for factors in adapters.values()])
            if len(columns.owners) == 1:
                A = columns.A if columns.A is None else columns.A.clone()
                columns = columns._replace(A=A, B=columns.B.clone())
            self.columns[name] = columns

    def take_in(self, name: str, factors: Factors, needed: set[str]) -> bool:
        """Put an adapter into the place of an unneeded one of its form; returns False if there is none."""
        wanted = form(factors)
        free = [i for i, other in enumerate(self.names) if other not in needed and self.forms[i] == wanted]
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
        """Free the place of an adapter that no row has any more."""
        self.names = [None if other == name else other for other in self.names]
