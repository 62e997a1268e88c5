"""MiSS, Matrix Shard Sharing (Kang and Yin, arXiv 2409.15371)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from .. import adapter
from ..adapter import AdapterLinear, register
from ..errors import UserError
from ..functional import add_expanded_, miss_linear, shard_index, shard_signs

CHOICES = {"layout": ("stride", "contiguous"), "shards": ("plain", "balanced")}


@dataclasses.dataclass(frozen=True)
class Options(adapter.Options):
    """rank r: the number of shards, from 1 to the input width.

    layout: "stride", column i in shard i mod r (the paper's code and every released file), or "contiguous", neighbouring columns (equations 2-3).
    shards: "plain" sums, or "balanced": sums with alternating signs and one row for the mean of all columns, so r + 1 rows in all.
    """

    layout: str = "stride"
    shards: str = "plain"

    def __post_init__(self):
        object.__setattr__(self, "layout", self.layout.replace("stride-r", "stride"))  # its name in older files
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"{name} {getattr(self, name)!r} is unknown; choose one of: {', '.join(choices)}")


@register("miss")
class MissLinear(AdapterLinear):
    """dW[o, i] = D[i mod r, o] with D = `miss`, (r, out), fp32, zero at the start. Balanced: D is (r + 1, out), and
    dW[o, i] = +-D[i mod r, o] + D[r, o] / sqrt(in), minus in every other block of r columns."""

    Options = Options
    default_lr = 2e-5  # the paper's

    def setup(self, options: Options) -> None:
        if not 1 <= options.rank <= self.in_features:
            raise UserError(f"rank {options.rank} does not fit MiSS: it must be from 1 to the input width, {self.in_features}")
        self.contiguous, self.balanced = options.layout == "contiguous", options.shards == "balanced"
        self.miss = nn.Parameter(torch.zeros(options.rank + self.balanced, self.out_features, device=self.weight.device))

    def delta(self) -> Tensor:
        rank, device = len(self.miss) - self.balanced, self.miss.device
        delta = self.miss.t()[:, shard_index(self.in_features, rank, self.contiguous, device)]
        if self.balanced:
            mean = self.miss[rank:].t() * self.in_features**-0.5
            delta = delta * shard_signs(self.in_features, rank, self.contiguous, device) + mean
        return delta

    def add_delta_to(self, weight: Tensor) -> None:
        add_expanded_(weight, self.miss.t().contiguous(), self.contiguous, self.balanced)

    def forward(self, x: Tensor) -> Tensor:
        return miss_linear(x, self.weight, self.bias, self.miss, self.contiguous, self.balanced)
