"""Variants of MiSS (miss.py): other shards of the input, a trained magnitude, shards of outputs.

In general dW = D^T P. The rows of P are the shards: P[j, i] is the factor of column i in shard j, 0 or 1 for
plain MiSS.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import adapter
from ..adapter import AdapterLinear, option, prepare_again
from ..errors import UserError
from ..functional import (
    add_expanded_,
    miss_linear,
    shard_index,
    shard_signs,
    shard_sum,
    without_autocast,
)
from .operators import expand_linear, output_shard_index, times_columns

CHOICES = {"layout": ("stride", "contiguous"), "shards": ("plain", "balanced"), "scale": ("sum", "sqrt")}
VARIANTS = ("layout", "shards", "scale", "mini_r", "magnitude", "expand")  # options beyond plain MiSS


@dataclasses.dataclass(frozen=True)
class Options(adapter.Options):
    """Options of MiSS. The defaults are plain MiSS. rank: the number r of shards, from 1 to the input width.

    With balanced shards the last row of D is for the mean of all inputs, the sum of all columns / sqrt(in),
    which `scale` does not multiply. `expand` can't be combined with the other variants.
    """

    layout: str = option(
        "stride",
        "`stride` (every released file): column i is in shard i mod r; `contiguous` (the paper's equations"
        " 2-3): neighbouring columns",
    )
    shards: str = option(
        "plain",
        "`plain`; `balanced`, this project's own: alternating signs and one row for the mean of all inputs,"
        " r + 1 rows",
    )
    scale: str = option("sum", "`sum`; `sqrt`: the sums divided by sqrt(k / r), the size of one input")
    mini_r: int = option(0, "0; m, which divides d: D is (r, m), the same for every m outputs (peft's mini)")
    magnitude: bool = option(False, "true: the norm of each row is trained apart from its direction (DoRA)")
    expand: bool = option(
        False, "true: the paper's equation 1, shards of outputs; for comparisons, it keeps the whole input"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(
                    f"{name} {getattr(self, name)!r} is unknown; choose one of: {', '.join(choices)}"
                )
        if self.expand and (other := beyond_plain(self, "expand")):
            raise UserError(
                f"{other} is about shards of inputs, expand has shards of outputs; drop one of the two"
            )

    def shard_scale(self, width: int) -> float:
        """Return the factor on the shard sums of an input of this width."""
        return (self.rank / width) ** 0.5 if self.scale == "sqrt" else 1.0


def beyond_plain(options: Options, *allowed: str) -> str:
    """Return the first option beyond plain MiSS that is not allowed, as "scale=sqrt"; "" if there is none."""
    for name in VARIANTS:
        if name not in allowed and (value := getattr(options, name)) != getattr(Options, name):
            return f"{name}={value}"
    return ""


def variant_of(options: Options) -> type[AdapterLinear] | None:
    """Return the class of a layer with these options. None: plain MiSS."""
    if options.expand:
        return ExpandedMiss
    if options.magnitude:
        return MissWithMagnitude
    return ShardedMiss if beyond_plain(options) else None


def check_rank(rank: int, side: str, width: int) -> None:
    """Raise UserError for a rank beyond the width of the side with the shards, "input" or "output"."""
    if rank > width:
        raise UserError(f"rank {rank} does not fit MiSS: it must be from 1 to the {side} width, {width}")


class ShardedMiss(AdapterLinear):
    """dW = D^T P with D = `miss` (r, out), fp32, zero at the start, and P (r, in).

    Balanced shards have one row more in both. With mini_r D has mini_r columns, which repeat.
    """

    method = "miss"

    def setup(self, options: Options) -> None:
        check_rank(options.rank, "input", self.in_features)
        if options.mini_r < 0 or options.mini_r and self.out_features % options.mini_r:
            raise UserError(f"mini_r {options.mini_r} does not divide the output width, {self.out_features}")
        self.contiguous = options.layout == "contiguous"
        self.balanced = options.shards == "balanced"
        self.scale = options.shard_scale(self.in_features)
        shape = options.rank + self.balanced, options.mini_r or self.out_features
        self.miss = nn.Parameter(torch.zeros(shape, device=self.stored.device))

    def forward(self, x: Tensor) -> Tensor:
        return self._linear(x, self.bias)

    def _linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Compute x (W + D^T P)^T + bias."""
        return miss_linear(x, self.matrix, bias, self.miss, self.contiguous, self.balanced, self.scale)

    def delta(self) -> Tensor:
        D = self._columns().t()
        delta = self.scale * D[:, self._shard_of_column()]
        if self.balanced:
            delta = delta * self._sign_of_column() + D[:, -1:] * self.in_features**-0.5
        return delta

    def add_delta_to(self, weight: Tensor) -> None:
        D = self._columns().t().contiguous()
        if self.scale != 1:
            D = torch.cat((self.scale * D[:, : self._rank], D[:, self._rank :]), 1)
        add_expanded_(weight, D, self.contiguous, self.balanced)

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """Return P and D^T."""
        shards = F.one_hot(self._shard_of_column(), self._rank)
        if self.balanced:
            shards = shards * self._sign_of_column().unsqueeze(1)
        P = self.scale * shards.t().to(self.miss.dtype)
        if self.balanced:
            P = torch.cat((P, P.new_full((1, self.in_features), self.in_features**-0.5)))
        return P, self._columns().t()

    @property
    def _rank(self) -> int:
        return len(self.miss) - self.balanced

    def _columns(self) -> Tensor:
        """Return D with a column for every output, (r or r + 1, out)."""
        columns = self.miss.shape[1]
        return (
            self.miss if columns == self.out_features else self.miss.repeat(1, self.out_features // columns)
        )

    def _shard_of_column(self) -> Tensor:
        return shard_index(self.in_features, self._rank, self.contiguous, self.miss.device)

    def _sign_of_column(self) -> Tensor:
        return shard_signs(self.in_features, self._rank, self.contiguous, self.miss.device)


class MissWithMagnitude(ShardedMiss):
    """W + dW = m V / ||V|| row by row, V = W + D^T P, with m = `magnitude` (out), fp32.

    m starts as the norms of W's rows.

    The gradient takes the norms for constants, as DoRA's does. They are computed in O(r out), without V, from
    ||w||^2, W P^T, and the diagonal and the last row of P P^T, which prepare() derives.
    """

    def setup(self, options: Options) -> None:
        super().setup(options)
        out, shards, device = self.out_features, len(self.miss), self.stored.device
        self.magnitude = nn.Parameter(torch.ones(out, device=device))
        self.register_buffer("squares", torch.zeros(out, device=device), persistent=False)  # ||w||^2
        self.register_buffer("folded", torch.zeros(shards, out, device=device), persistent=False)  # (W P^T)^T
        # the diagonal of P P^T, and its last row
        self.register_buffer("counts", torch.zeros(shards, 1, device=device), persistent=False)
        self.register_buffer("cross", torch.zeros(shards, device=device), persistent=False)
        self.register_load_state_dict_post_hook(prepare_again)

    def start(self) -> None:
        norms = self.base_weight().norm(dim=1)
        if not norms.all():
            raise UserError(
                f"{int((norms == 0).sum())} rows of the weight are zero and have no direction; drop the"
                " target, or magnitude"
            )
        self.magnitude.copy_(norms)

    def prepare(self) -> None:
        weight = self.base_weight()
        ones = weight.new_ones(self.in_features)
        self.squares = weight.square().sum(1)
        self.folded = self._shard_sum(weight).t().contiguous()
        self.cross = self._shard_sum(ones) * self.in_features**-0.5
        self.counts = self.scale**2 * shard_sum(ones, self._rank, self.contiguous).unsqueeze(1)
        if self.balanced:
            self.counts = torch.cat((self.counts, self.counts.new_ones(1, 1)))

    def _shard_sum(self, x: Tensor) -> Tensor:
        """Compute x P^T: (..., in) -> (..., r or r + 1)."""
        sums = shard_sum(x, self._rank, self.contiguous, self.balanced)
        sums[..., : self._rank] *= self.scale
        return sums

    def _norms(self) -> Tensor:
        """Compute ||V|| row by row, (out)."""
        if self.stored.requires_grad:  # a trained weight changes with every step
            with torch.no_grad():
                self.prepare()
        D = self._columns().detach()
        squares = self.squares + 2 * (D * self.folded).sum(0) + (self.counts * D.square()).sum(0)
        if self.balanced:
            squares += 2 * D[-1] * (self.cross[:-1] @ D[:-1])
        return squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        y = self._linear(x, None)
        with without_autocast(y.device):
            factor = self.magnitude / self._norms()
        return times_columns(y, factor, self.bias)

    def delta(self) -> Tensor:
        weight = self.base_weight()
        V = weight + super().delta()
        return (self.magnitude / V.detach().norm(dim=1)).unsqueeze(1) * V - weight

    def add_delta_to(self, weight: Tensor) -> None:
        super().add_delta_to(weight)
        weight.mul_((self.magnitude / weight.norm(dim=1)).unsqueeze(1))

    def low_rank(self) -> None:
        return None


class ExpandedMiss(AdapterLinear):
    """dW[o, i] = D[shard of output o, i] with D = `miss` (r, in), fp32, zero at the start (equation 1)."""

    method = "miss"

    def setup(self, options: Options) -> None:
        check_rank(options.rank, "output", self.out_features)
        self.miss = nn.Parameter(torch.zeros(options.rank, self.in_features, device=self.stored.device))

    def forward(self, x: Tensor) -> Tensor:
        return expand_linear(x, self.matrix, self.bias, self.miss)

    def delta(self) -> Tensor:
        return self.miss[self._shard_of_output()]

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """Return D, and the fixed B (out, r) of zeros and ones."""
        return self.miss, F.one_hot(self._shard_of_output(), len(self.miss)).to(self.miss.dtype)

    def _shard_of_output(self) -> Tensor:
        return output_shard_index(self.out_features, len(self.miss), self.miss.device)
