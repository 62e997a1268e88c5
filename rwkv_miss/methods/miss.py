"""MiSS, Matrix Shard Sharing (Kang and Yin, arXiv 2409.15371).

    S[j] = sum of x[i] over i = j (mod r)       the input x (in), summed in r shards
    y    = W x + D^T S                          so dW[o, i] = D[i mod r, o]

W (out, in) is frozen. D (r, out) is trained and starts at zero. r is the rank of dW at most. Where r does not
divide `in`, some shards have one column less.

The paper's code and every released file have these shards. The paper's equations 2 and 3 sum neighbouring
columns: layout "contiguous" in miss_variants.py, which implements all options beyond plain MiSS.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import About, AdapterLinear, register
from ..functional import add_expanded_, miss_linear, shard_index
from ..targets import Target
from .miss_variants import Options, check_rank, variant_of


@register("miss")
class MissLinear(AdapterLinear):
    """dW[o, i] = D[i mod r, o] with D = `miss` (r, out), fp32, zero at the start."""

    about = About("MiSS", "dW[o, i] = D[i mod r, o]", "r d", "0", "2409.15371")
    Options = Options
    default_lr = 2e-5  # the paper's

    def setup(self, options: Options) -> None:
        check_rank(options.rank, "input", self.in_features)
        self.shard_rank = options.rank  # read by the function that makes the input and can sum its shards
        self.miss = nn.Parameter(torch.zeros(options.rank, self.out_features, device=self.stored.device))

    def forward(self, x: Tensor) -> Tensor:
        """Compute y = x W^T + S(x) D + bias, x (..., in) -> (..., out)."""
        return miss_linear(x, self.matrix, self.bias, self.miss)

    def delta(self) -> Tensor:
        """Compute dW (out, in): column i is row i mod r of D."""
        return self.miss.t()[:, self._shard_of_column()]

    def add_delta_to(self, weight: Tensor) -> None:
        add_expanded_(weight, self.miss.t().contiguous())

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """Return P (r, in), with a 1 where column i is in shard j, and D^T: MiSS is LoRA with this frozen
        A."""
        P = F.one_hot(self._shard_of_column(), len(self.miss)).t().to(self.miss.dtype)
        return P, self.miss.t()

    def _shard_of_column(self) -> Tensor:
        """Return i mod r for every input column i, int64 (in,)."""
        return shard_index(self.in_features, len(self.miss), device=self.miss.device)

    @classmethod
    def sums_products(cls, options: Options) -> bool:
        return variant_of(options) is not None

    @classmethod
    def wrap(
        cls,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        options: Options,
        shared: dict[str, Tensor],
        target: Target | None = None,
    ) -> AdapterLinear:
        """Make a plain MiSS layer, or the variant for the options."""
        variant = variant_of(options)
        if variant is not None:
            return variant.wrap(weight, bias, options, shared, target)
        return super().wrap(weight, bias, options, shared, target)
