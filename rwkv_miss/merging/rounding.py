"""Rounding losses of a merge, tensor by tensor, measured in the same pass that rounds."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..files.checkpoint import blocks, is_finite

LOSS_LIMIT = 0.05  # share of the update that rounding may take before the user is warned
TABLE_ROWS = 5  # rows of a table without --layers


def percent(share: float) -> str:
    """Write a share for people, without exponents."""
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def text_table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Write the lines of a table: names on the left, numbers on the right under their titles."""
    widths = [max(len(name) for name, *_ in rows), *map(len, head[1:])]
    return [
        f"  {name:<{widths[0]}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths[1:]))
        for name, *cells in [head, *rows]
    ]


def bits(tensor: Tensor) -> Tensor:
    """View the elements as integers of equal size, which are compared 3 times as fast as bf16."""
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


@dataclasses.dataclass(frozen=True)
class Layer:
    """Rounding loss of one changed tensor.

    update, error: squared norms of the update, and of the part that rounding lost. changing: number of
    entries that should change. unchanged: number of these that rounding left as they were. broken: number of
    entries that are infinite or NaN in the base, which the other fields leave out.
    """

    name: str
    update: float
    error: float
    changing: int
    unchanged: int
    broken: int = 0

    @property
    def lost(self) -> float:
        """Compute ||(round(W + dW) - round(W)) - dW|| / ||dW||; 0 if dW is 0.

        If the output's dtype holds W exactly, this is the rounding error of W + dW. If not (an fp32 base
        written as bf16), the rounding of W itself is no loss of the update and is left out.
        """
        return (self.error / self.update) ** 0.5 if self.update else 0.0

    @property
    def unchanged_share(self) -> float:
        return self.unchanged / self.changing if self.changing else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "lost": self.lost,
            "unchanged": self.unchanged_share,
            "update_norm": self.update**0.5,
            "lost_norm": self.error**0.5,
            "entries": self.changing,
        }


@dataclasses.dataclass
class Rounding:
    """Rounding losses of all changed tensors of the base, in the order of the file."""

    layers: list[Layer] = dataclasses.field(default_factory=list)

    @property
    def total(self) -> Layer:
        """Sum all layers to one."""
        return Layer(
            "all",
            *(
                sum(getattr(layer, name) for layer in self.layers)
                for name in ("update", "error", "changing", "unchanged")
            ),
        )

    @property
    def lost(self) -> float:
        return self.total.lost

    def worst(self) -> list[Layer]:
        """Sort the layers, the largest loss first."""
        return sorted(self.layers, key=lambda layer: -layer.lost)

    def table(self, shown_rows: int | None = TABLE_ROWS) -> list[str]:
        """Return a table of the `shown_rows` layers (None: all) with the largest losses; [] if none."""
        worst = self.worst()[:shown_rows]
        if not worst or not worst[0].lost:
            return []
        return text_table(
            [f"worst of {len(self.layers)}", "lost of update", "entries unchanged"],
            [[layer.name, percent(layer.lost), percent(layer.unchanged_share)] for layer in worst],
        )


class Scratch:
    """Memory that is reused by name, because getting new pages from the system takes as long as the sums."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def get(self, name: str, shape: torch.Size, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a contiguous tensor with arbitrary values."""
        size = shape.numel() * dtype.itemsize
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers.pop(name, None)  # freed first, so that both are never in memory
            self.buffers[name] = torch.empty(size, dtype=torch.uint8)
        return self.buffers[name][:size].view(dtype).view(shape)


def round_into(out: Tensor, key: str, name: str, base: Tensor, merged: Tensor, scratch: Scratch) -> Layer:
    """Round `merged` into `out`, and measure the loss against the base's tensor, in one pass over them.

    An entry should change if it changes in fp32. Raises UserError for a value beyond fp16's range.
    """
    update = error = 0.0
    changing = moved = broken = 0
    for before, after, kept in zip(blocks(base), blocks(merged), blocks(out)):
        if kept.data_ptr() != after.data_ptr():
            kept.copy_(after)
            check_room(key, after, kept)
        change, missing = (scratch.get(part, before.shape) for part in ("change", "missing"))
        torch.sub(after, change.copy_(before), out=change)
        missing.copy_(kept).sub_(after)
        # compare with the rounded base, because the base's own rounding is no loss of the update
        if before.dtype != kept.dtype:
            same = before.to(kept.dtype)
            missing += before - same
            before = same
        size = float(change.dot(change))
        if not math.isfinite(size):
            unusable = before.isfinite().logical_not_()
            broken += int(unusable.count_nonzero())
            for values in (change, missing):
                values.masked_fill_(unusable, 0)
            size = float(change.dot(change))
        if not math.isfinite(size):
            raise UserError(
                f"{key} would change by values that are infinite, or beyond 1e19, in which nothing can be"
                " reckoned; look at the weights of the adapters, and whether their training diverged"
            )
        update += size
        error += float(missing.dot(missing))
        difference = bits(scratch.get("moved", kept.shape, kept.dtype))
        moved += int(torch.sub(bits(kept), bits(before), out=difference).count_nonzero())
        ones = change.sign_()  # the sum of its squares counts the changes, faster than count_nonzero()
        changing += int(ones.dot(ones))
    # `moved` also counts entries that only went from -0 to 0
    return Layer(name, update, error, changing, max(changing - moved, 0), broken)


def check_room(key: str, exact: Tensor, rounded: Tensor) -> None:
    """Raise UserError for a value beyond fp16's range.

    Values that were infinite or NaN before are allowed.
    """
    if (
        rounded.dtype == torch.float16
        and not is_finite(rounded)
        and bool((rounded.isinf() & exact.isfinite()).any())
    ):
        raise UserError(
            f"{key} has values beyond fp16's largest, 65504; merge in bf16 or fp32 (--dtype of the command)"
        )


def round_to(key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a tensor to the file's dtype; integers stay.

    Raises UserError for a value beyond fp16's range.
    """
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    rounded = tensor.to(dtype)
    check_room(key, tensor, rounded)
    return rounded
