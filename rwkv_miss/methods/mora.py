"""MoRA (Jiang et al., arXiv 2405.12130)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import adapter
from ..adapter import About, AdapterLinear, register
from ..errors import UserError
from ..functional import add_expanded_, miss_linear, shard_index


@register("mora")
class MoraLinear(AdapterLinear):
    """dW[o, i] = M[i mod q, o mod q] with M = `mora` (q, q), fp32, zero at the start.

    q = floor(sqrt(rank (in + out))), so that q^2 is LoRA's number of parameters at this rank. MiSS's number,
    r out, needs rank r out / (in + out).

    This is the paper's sharing form (type 1): the input is folded into q sums, M maps them to q numbers, and
    these repeat over the outputs, as in MiSS of rank q with mini_r q.
    """

    about = About(
        "MoRA",
        "M[i mod q, o mod q], q = floor(sqrt(r (d + k)))",
        "floor(sqrt(r (d + k)))^2",
        "0",
        "2405.12130",
    )
    Options = adapter.Options
    default_lr = 2e-5  # MiSS's: in both a step of Adam moves every entry of W by the learning rate

    def setup(self, options: adapter.Options) -> None:
        size = math.isqrt(options.rank * (self.in_features + self.out_features))
        smaller = min(self.in_features, self.out_features)
        if size > smaller:
            most = smaller**2 // (self.in_features + self.out_features)
            raise UserError(
                f"rank {options.rank} does not fit MoRA: its square matrix would be {size} wide, more than"
                f" the smaller width, {smaller}; the largest rank is {most}"
            )
        self.mora = nn.Parameter(torch.zeros(size, size, device=self.stored.device))

    def _columns(self) -> Tensor:
        """Return M with a column for every output, (q, out)."""
        return self.mora[:, shard_index(self.out_features, len(self.mora), device=self.mora.device)]

    def low_rank(self) -> tuple[Tensor, Tensor]:
        size = len(self.mora)
        folds = F.one_hot(shard_index(self.in_features, size, device=self.mora.device), size)
        return folds.t().to(self.mora.dtype), self._columns().t()

    def delta(self) -> Tensor:
        return self._columns()[shard_index(self.in_features, len(self.mora), device=self.mora.device)].t()

    def add_delta_to(self, weight: Tensor) -> None:
        add_expanded_(weight, self._columns().t().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return miss_linear(x, self.matrix, self.bias, self.mora)
