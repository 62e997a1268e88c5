"""MiSS, Matrix Shard Sharing (Kang and Yin, arXiv 2409.15371)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from .. import adapter
from ..adapter import AdapterLinear, register
from ..errors import UserError
from ..functional import add_expanded_, miss_linear, shard_index

LAYOUTS = ("stride-r", "contiguous")


@dataclasses.dataclass(frozen=True)
class Options(adapter.Options):
    """rank r: the number of shards, from 1 to the input width. layout: "stride-r" (every released file) or "contiguous"."""

    layout: str = LAYOUTS[0]

    def __post_init__(self):
        if self.layout not in LAYOUTS:
            raise UserError(f"layout {self.layout!r} is unknown; choose one of: {', '.join(LAYOUTS)}")


@register("miss")
class MissLinear(AdapterLinear):
    """dW[o, i] = D[i mod r, o] with D = `miss`, (r, out), fp32, zero at the start."""

    Options = Options
    default_lr = 2e-5  # the paper's

    def setup(self, options: Options) -> None:
        if not 1 <= options.rank <= self.in_features:
            raise UserError(f"rank {options.rank} does not fit MiSS: it must be from 1 to the input width, {self.in_features}")
        self.contiguous = options.layout == "contiguous"
        self.miss = nn.Parameter(torch.zeros(options.rank, self.out_features, device=self.weight.device))

    def delta(self) -> Tensor:
        return self.miss.t()[:, shard_index(self.in_features, self.miss.shape[0], self.contiguous, self.miss.device)]

    def add_delta_to(self, weight: Tensor) -> None:
        add_expanded_(weight, self.miss.t().contiguous(), self.contiguous)

    def forward(self, x: Tensor) -> Tensor:
        return miss_linear(x, self.weight, self.bias, self.miss, self.contiguous)
