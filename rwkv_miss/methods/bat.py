"""Bat, Block Affine Transformation: MiSS's sibling, whose update depends on the frozen weight.

Kang and Yin, arXiv 2409.15371.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from .. import adapter
from ..adapter import About, AdapterLinear, option, register
from ..errors import UserError
from .operators import bat_linear

ORDERS = ("col", "row")


@dataclasses.dataclass(frozen=True)
class Options(adapter.Options):
    """Options of Bat. rank: r, the width of a block."""

    order: str = option(
        "col",
        "`col`: a matrix for every r outputs (Hugging Face peft); `row`: for every r inputs (RWKV-PEFT, once"
        " called Bone). In a square linear the tensors look alike, so the file says which one it is",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in ORDERS:
            raise UserError(f"order {self.order!r} is unknown; choose one of: {', '.join(ORDERS)}")


@register("bat")
class BatLinear(AdapterLinear):
    """dW[a, b] = (W[a, b] + I) D[a] for the r x r blocks of W, with D = `bat` (out / r, r, r).

    With the order "row" it is D[b], and D is (in / r, r, r). D is fp32 and starts at zero. It has r out
    numbers, as MiSS's D of the same rank; r in with the order "row".
    """

    about = About(
        "Bat",
        "(W + I) D, r x r blocks of W times a matrix for each block of outputs (`order` row: of inputs)",
        "r d (row: r k)",
        "0",
        "2409.15371",
    )
    Options = Options
    default_lr = 2e-5  # the paper's, as for MiSS

    def setup(self, options: Options) -> None:
        rank = options.rank
        if self.in_features % rank or self.out_features % rank:
            raise UserError(
                f"rank {rank} does not fit Bat: its blocks of {rank} x {rank} must divide the weight,"
                f" {self.out_features} outputs and {self.in_features} inputs"
            )
        self.by_row = options.order == "row"
        count = (self.in_features if self.by_row else self.out_features) // rank
        self.bat = nn.Parameter(torch.zeros(count, rank, rank, device=self.stored.device))

    def delta(self) -> Tensor:
        rank = self.bat.shape[1]
        weight = self.base_weight()
        blocks = weight.unflatten(1, (-1, rank)).unflatten(0, (-1, rank)).transpose(1, 2)  # (a, b, r, r)
        D = self.bat if self.by_row else self.bat.unsqueeze(1)
        return (blocks @ D + D).transpose(1, 2).reshape(weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        return bat_linear(x, self.matrix, self.bias, self.bat, self.by_row)
