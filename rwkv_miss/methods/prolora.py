"""PRoLoRA, partially rotation-enhanced LoRA (Wang et al., arXiv 2402.16902)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from ..adapter import About, option, register
from ..errors import UserError
from .lora import LoraLinear, ScaledOptions, check_rank


@dataclasses.dataclass(frozen=True)
class Options(ScaledOptions):
    """Options of PRoLoRA. rank: r."""

    unshared: int = option(-1, "u, the ranks that are plain LoRA's. -1: an eighth of r")
    shares: int = option(4, "m: of the other ranks one of m parts of A and B is trained")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "unshared", self.rank // 8 if self.unshared == -1 else self.unshared)
        if not 0 <= self.unshared < self.rank:
            raise UserError(
                f"unshared {self.unshared} must be from 0 to below the rank, {self.rank}; with all ranks"
                " unshared it would be LoRA"
            )
        if self.shares < 1:
            raise UserError(f"shares {self.shares} must be at least 1")

    def with_rank(self, rank: int) -> Options:
        return super().with_rank(rank, unshared=self.unshared * rank // self.rank)


@register("prolora")
class ProloraLinear(LoraLinear):
    """dW = scale B A, where r - u ranks of A and B are m rotated copies of a part. All fp32.

    A: `prolora_A0` (r - u, in / m) m times side by side, each copy rotated by (r - u) / m ranks more, and the
    unshared `prolora_A` (u, in). A starts Kaiming uniform, by the whole input width (the paper's rectified
    initialisation).
    B: likewise `prolora_B0` (out / m, r - u), copies below each other, and `prolora_B` (out, u). B starts at
    zero.

    Where m does not divide a width, the last copy is cut off. A linear has (u + (r - u) / m) (in + out)
    numbers: as many as MiSS of rank R, R out, at u + (r - u) / m = R out / (in + out).
    """

    about = About(
        "PRoLoRA",
        "s B A, of which u ranks are free and the others rotated copies of one of m parts",
        "(u + (r - u) / m) (d + k)",
        "B 0",
        "2402.16902",
    )
    Options = Options
    # default_lr is LoRA's: PRoLoRA is LoRA with tied parts

    def setup(self, options: Options) -> None:
        check_rank(self, options.rank)
        self.scale, self.dropout, self.shares = options.scale, options.dropout, options.shares
        width, out = self.in_features, self.out_features
        unshared, shared = options.unshared, options.rank - options.unshared

        def make(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, device=self.stored.device))

        self.prolora_A0 = make(shared, -(-width // self.shares))
        self.prolora_B0 = make(-(-out // self.shares), shared)
        starting = [self.prolora_A0]
        if unshared:
            self.prolora_A, self.prolora_B = make(unshared, width), make(out, unshared)
            starting.append(self.prolora_A)
        for A in starting:
            # as kaiming_uniform_(a=sqrt(5)), but for the whole input width
            nn.init.uniform_(A, -(width**-0.5), width**-0.5)

    def factors(self) -> tuple[Tensor, Tensor]:
        rank = len(self.prolora_A0)
        steps = [-copy * max(1, rank // self.shares) for copy in range(self.shares)]
        A = torch.cat([self.prolora_A0.roll(step, 0) for step in steps], 1)[:, : self.in_features]
        B = torch.cat([self.prolora_B0.roll(step, 1) for step in steps], 0)[: self.out_features]
        if hasattr(self, "prolora_A"):
            A, B = torch.cat((A, self.prolora_A)), torch.cat((B, self.prolora_B), 1)
        return A.contiguous(), B.contiguous()
