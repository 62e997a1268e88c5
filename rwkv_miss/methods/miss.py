"""MiSS, Matrix Shard Sharing (Kang and Yin, arXiv 2409.15371)."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import adapter
from ..adapter import AdapterLinear, prepare_again, register
from ..errors import UserError
from ..functional import (
    add_expanded_,
    miss_linear,
    shard_index,
    shard_signs,
    shard_sum,
    times_columns,
    without_autocast,
)
from .operators import expand_linear, output_shard_index

CHOICES = {"layout": ("stride", "contiguous"), "shards": ("plain", "balanced"), "scale": ("sum", "sqrt")}


@dataclasses.dataclass(frozen=True)
class Options(adapter.Options):
    """rank r: the number of shards, from 1 to the input width.

    layout: "stride", column i in shard i mod r (the paper's code and every released file), or "contiguous",
    neighbouring columns (equations 2-3). shards: "plain" sums, or "balanced": sums with alternating signs and
    one row for the mean of all columns, so r + 1 rows in all. scale: "sum", the paper's, or "sqrt", the sums
    / sqrt(in / r), of the size of one column. A mean's row has that size already. mini_r: 0, or m that
    divides the output width: D is (r, m), the same for every m outputs (HF peft's "mini"). magnitude: the
    norm of each row of the weight is trained apart from its direction, as in DoRA (arXiv 2402.09353). expand:
    equation 1 as it stands: shards of outputs instead of inputs, D is (r, in). It goes with none of the
    others.
    """

    layout: str = "stride"
    shards: str = "plain"
    scale: str = "sum"
    mini_r: int = 0
    magnitude: bool = False
    expand: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        # its name in older files
        object.__setattr__(self, "layout", self.layout.replace("stride-r", "stride"))
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(
                    f"{name} {getattr(self, name)!r} is unknown; choose one of: {', '.join(choices)}"
                )
        if self.expand:
            for name in ("layout", "shards", "scale", "mini_r", "magnitude"):
                if getattr(self, name) != getattr(Options, name):
                    raise UserError(
                        f"{name}={getattr(self, name)} is about shards of inputs, expand has shards of"
                        " outputs; drop one of the two"
                    )


@register("miss")
class MissLinear(AdapterLinear):
    """dW[o, i] = D[i mod r, o] with D = `miss`, (r, out), fp32, zero at the start.

    In general dW = D^T P, where the rows of P (r or r + 1, in) are the shards. With a magnitude the weight is
    m (W + dW) / ||W + dW||, row by row, with m = `magnitude` (out), the norms of W's rows at the start; the
    gradient takes the norm for a constant, as DoRA's does.
    """

    Options = Options
    default_lr = 2e-5  # the paper's

    def setup(self, options: Options) -> None:
        side, width = ("output", self.out_features) if options.expand else ("input", self.in_features)
        if options.rank > width:
            raise UserError(
                f"rank {options.rank} does not fit MiSS: it must be from 1 to the {side} width, {width}"
            )
        if options.mini_r < 0 or options.mini_r and self.out_features % options.mini_r:
            raise UserError(f"mini_r {options.mini_r} does not divide the output width, {self.out_features}")
        self.contiguous, self.balanced, self.expand = (
            options.layout == "contiguous",
            options.shards == "balanced",
            options.expand,
        )
        self.scale = (options.rank / self.in_features) ** 0.5 if options.scale == "sqrt" else 1.0
        rows, columns = (
            options.rank + self.balanced,
            self.in_features if self.expand else options.mini_r or self.out_features,
        )
        self.miss = nn.Parameter(torch.zeros(rows, columns, device=self.weight.device))
        if options.magnitude:
            self.magnitude = nn.Parameter(torch.ones(self.out_features, device=self.weight.device))
            # what the norms of the rows of W + dW follow from in O(r out): ||w||^2, W P^T, and the diagonal
            # and the last row of P P^T
            for name, shape in {
                "squares": (self.out_features,),
                "folded": (rows, self.out_features),
                "counts": (rows, 1),
                "cross": (rows,),
            }.items():
                self.register_buffer(name, torch.zeros(shape, device=self.weight.device), persistent=False)
            self.register_load_state_dict_post_hook(prepare_again)
        else:
            self.magnitude = None

    def start(self) -> None:
        if self.magnitude is not None:
            norms = self.base_weight().norm(dim=1)
            if not norms.all():
                raise UserError(
                    f"{int((norms == 0).sum())} rows of the weight are zero and have no direction; drop the"
                    " target, or magnitude"
                )
            self.magnitude.copy_(norms)

    def prepare(self) -> None:
        if self.magnitude is not None:
            weight = self.base_weight()
            ones = weight.new_ones(self.in_features)
            self.squares, self.folded = weight.square().sum(1), self._shard_sum(weight).t().contiguous()
            self.cross = self._shard_sum(ones) * self.in_features**-0.5
            self.counts = self.scale**2 * shard_sum(ones, self._rank, self.contiguous).unsqueeze(1)
            if self.balanced:
                self.counts = torch.cat((self.counts, self.counts.new_ones(1, 1)))

    @property
    def _rank(self) -> int:
        return len(self.miss) - self.balanced

    def _shard_sum(self, x: Tensor) -> Tensor:
        """x P^T: (..., in) -> (..., rows of D)."""
        sums = shard_sum(x, self._rank, self.contiguous, self.balanced)
        sums[..., : self._rank] *= self.scale
        return sums

    def _columns(self) -> Tensor:
        """D with a column for every output."""
        return (
            self.miss
            if self.miss.shape[1] == self.out_features
            else self.miss.repeat(1, self.out_features // self.miss.shape[1])
        )

    def _norms(self) -> Tensor:
        """Those of the rows of W + dW, (out)."""
        if self.weight.requires_grad:  # it moves with every step
            with torch.no_grad():
                self.prepare()
        D = self._columns().detach()
        squares = self.squares + 2 * (D * self.folded).sum(0) + (self.counts * D.square()).sum(0)
        if self.balanced:
            squares += 2 * D[-1] * (self.cross[:-1] @ D[:-1])
        return squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()

    def _direction(self) -> Tensor:
        """dW before a magnitude, (out, in)."""
        if self.expand:
            return self.miss[output_shard_index(self.out_features, len(self.miss), self.miss.device)]
        D = self._columns().t()
        delta = self.scale * D[:, shard_index(self.in_features, self._rank, self.contiguous, D.device)]
        if self.balanced:
            delta = (
                delta * shard_signs(self.in_features, self._rank, self.contiguous, D.device)
                + D[:, -1:] * self.in_features**-0.5
            )
        return delta

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """P and D^T: MiSS is LoRA with a fixed A of zeros and ones, or with an expansion, a fixed B."""
        if self.magnitude is not None:
            return None
        if self.expand:
            return self.miss, F.one_hot(
                output_shard_index(self.out_features, len(self.miss), self.miss.device), len(self.miss)
            ).to(self.miss.dtype)
        shards = F.one_hot(
            shard_index(self.in_features, self._rank, self.contiguous, self.miss.device), self._rank
        )
        if self.balanced:
            shards = shards * shard_signs(
                self.in_features, self._rank, self.contiguous, self.miss.device
            ).unsqueeze(1)
        P = self.scale * shards.t().to(self.miss.dtype)
        if self.balanced:
            P = torch.cat((P, P.new_full((1, self.in_features), self.in_features**-0.5)))
        return P, self._columns().t()

    def delta(self) -> Tensor:
        if self.magnitude is None:
            return self._direction()
        weight = self.base_weight()
        changed = weight + self._direction()
        return (self.magnitude / changed.detach().norm(dim=1)).unsqueeze(1) * changed - weight

    def add_delta_to(self, weight: Tensor) -> None:
        if self.expand:
            weight.add_(self._direction())
            return
        D = self._columns().t().contiguous()
        if self.scale != 1:
            D = torch.cat((self.scale * D[:, : self._rank], D[:, self._rank :]), 1)
        add_expanded_(weight, D, self.contiguous, self.balanced)
        if self.magnitude is not None:
            weight.mul_((self.magnitude / weight.norm(dim=1)).unsqueeze(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.expand:
            return expand_linear(x, self.weight, self.bias, self.miss)
        if self.magnitude is None:
            return miss_linear(
                x, self.weight, self.bias, self.miss, self.contiguous, self.balanced, self.scale
            )
        y = miss_linear(x, self.weight, None, self.miss, self.contiguous, self.balanced, self.scale)
        with without_autocast(y.device):
            factor = self.magnitude / self._norms()
        return times_columns(y, factor, self.bias)
