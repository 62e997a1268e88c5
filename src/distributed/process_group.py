"""Processes of a run, for common work that Lightning does not do."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Processes:
    """Processes that share the rows: their number, the rank of this one, and the sum of a tensor over all."""

    world: int = 1
    rank: int = 0
    total: Callable[[Tensor], Tensor] = lambda tensor: tensor

    def gathered(self, mine: T) -> list[T]:
        """Return the values of all processes, by rank. It is for small things, which are pickled."""
        if self.world == 1:
            return [mine]
        everyone: list[T | None] = [None] * self.world
        torch.distributed.all_gather_object(everyone, mine)
        return everyone


ALONE = Processes()


def processes_of(trainer) -> Processes:
    """Return the processes of a trainer that are connected already."""

    def total(tensor: Tensor) -> Tensor:
        return trainer.strategy.reduce(tensor, reduce_op="sum")

    return Processes(trainer.world_size, trainer.global_rank, total)


def over_ranks(
    numbers: Tensor, summed: int, joined: Callable[[Tensor, Tensor], Tensor], world: int
) -> Tensor:
    """Join numbers (n,) of all ranks: the first `summed` are added, the others are joined two by two."""
    if world == 1:
        return numbers
    gathered = [torch.empty_like(numbers) for _ in range(world)]
    torch.distributed.all_gather(gathered, numbers)
    both = torch.stack(gathered)
    return torch.cat([both[:, :summed].sum(0), functools.reduce(joined, both[:, summed:])])
