"""VeRA, Vector-based Random Matrix Adaptation (Kopiczko et al., arXiv 2310.11454)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from .. import adapter
from ..adapter import About, AdapterLinear, option, register
from ..errors import UserError
from .operators import vera_linear


@dataclasses.dataclass(frozen=True)
class Options(adapter.Options):
    """Options of VeRA. rank: r, the width of the random matrices."""

    rank: int = 256
    d_initial: float = option(0.1, "what the vector d starts with")


@register("vera")
class VeraLinear(AdapterLinear):
    """dW = diag(b) B diag(d) A, where d = `vera_lambda_d` (r) and b = `vera_lambda_b` (out) are trained.

    Both are fp32, and b starts at zero. A = `vera_A` (r, largest in) and B = `vera_B` (largest out, r) are
    random and frozen. All linears share this pair, and use its first columns and rows.

    A linear has out + r numbers. No useful rank has as many as MiSS, r out.
    """

    about = About(
        "VeRA",
        "diag(b) B diag(d) A, A and B random, frozen, one pair for all linears",
        "d + r",
        "b 0",
        "2310.11454",
    )
    Options = Options
    # the paper's for instruction tuning, ten times its LoRA's: the vectors scale random matrices
    default_lr = 4e-3
    shared = ("vera_A", "vera_B")

    @classmethod
    def make_shared(
        cls, shapes: dict[str, tuple[int, int]], options: Options, device: torch.device
    ) -> dict[str, Tensor]:
        rank = max(options.at(name).rank for name in shapes)
        A = torch.empty(rank, max(width for _, width in shapes.values()), device=device)
        B = torch.empty(max(out for out, _ in shapes.values()), rank, device=device)
        return {"vera_A": nn.init.kaiming_uniform_(A), "vera_B": nn.init.kaiming_uniform_(B)}

    @classmethod
    def step_reach(cls, width: int, options: Options) -> float:
        """Return a number chosen to give half of the published rate for 32 layers; it is not derived."""
        return 5.0

    def setup(self, options: Options) -> None:
        for name, needed in (
            ("vera_A", (options.rank, self.in_features)),
            ("vera_B", (self.out_features, options.rank)),
        ):
            shape = tuple(getattr(self, name).shape)
            if len(shape) != 2 or shape[0] < needed[0] or shape[1] < needed[1]:
                raise UserError(f"{name} is {shape}, expected at least {needed}")
        self.vera_lambda_d = nn.Parameter(
            torch.full((options.rank,), options.d_initial, device=self.stored.device)
        )
        self.vera_lambda_b = nn.Parameter(torch.zeros(self.out_features, device=self.stored.device))

    def _random(self) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r)."""
        rank = len(self.vera_lambda_d)
        return self.vera_A[:rank, : self.in_features], self.vera_B[: self.out_features, :rank]

    def low_rank(self) -> tuple[Tensor, Tensor]:
        A, B = self._random()
        return A, self.vera_lambda_b.unsqueeze(1) * B * self.vera_lambda_d

    def delta(self) -> Tensor:
        A, B = self.low_rank()
        return B @ A

    def forward(self, x: Tensor) -> Tensor:
        return vera_linear(x, self.matrix, self.bias, *self._random(), self.vera_lambda_d, self.vera_lambda_b)
