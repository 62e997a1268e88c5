"""MoS, Mixture of Shards (Wang et al., arXiv 2410.00938)."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import About, option, register
from ..errors import UserError
from .lora import LoraLinear, ScaledOptions, check_rank


@dataclasses.dataclass(frozen=True)
class Options(ScaledOptions):
    """Options of MoS. rank: r of every linear.

    Ranks of the budget that are not private are in pools that all linears of a width share.
    """

    budget: int = option(
        0, "e: all linears together have as many numbers as LoRA of this rank. 0: a quarter of r, at least 1"
    )
    shards: int = option(4, "parts that a row of A and a column of B are put together from")
    private: int = option(-1, "ranks of the budget that a linear has for itself. -1: a quarter of e")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "budget", self.budget or max(1, self.rank // 4))
        object.__setattr__(self, "private", self.budget // 4 if self.private == -1 else self.private)
        if not 0 <= self.private < self.budget <= self.rank:
            raise UserError(
                f"private {self.private}, budget {self.budget}, rank {self.rank}: expected 0 <= private <"
                " budget <= rank"
            )
        if self.shards < 1:
            raise UserError(f"shards {self.shards} must be at least 1")

    def with_rank(self, rank: int) -> Options:
        budget = max(1, self.budget * rank // self.rank)
        return super().with_rank(rank, budget=budget, private=self.private * budget // self.budget)


@register("mos")
class MosLinear(LoraLinear):
    """dW = scale B A, with r - p ranks out of shared pools and p private ones. All fp32.

    A: every shared row is l shards of the pool `mos_A` (shards, in / l), at the places `mos_A_index` (r - p,
    l). The private rows are `mos_A_private` (p, in). A starts Kaiming uniform.
    B: the same for its columns, with `mos_B` (shards, out / l), `mos_B_index` and `mos_B_private` (out, p).
    B starts at zero.

    The places are drawn once, every shard equally often, and are in the file. Where l does not divide a
    width, the last shard is cut off. A linear has e (in + out) numbers: as many as MiSS of rank R, R out, at
    e = R out / (in + out).
    """

    about = About(
        "MoS",
        "s B A, assembled from pools of shards that all linears draw from",
        "e (d + k)",
        "B 0",
        "2410.00938",
    )
    Options = Options
    # default_lr is LoRA's: every trained number is an entry of A or B
    shared = ("mos_A", "mos_B")

    @classmethod
    def shared_names(cls, out: int, width: int) -> dict[str, str]:
        return {"mos_A": f"mos_A.{width}", "mos_B": f"mos_B.{out}"}

    @classmethod
    def make_shared(
        cls, shapes: dict[str, tuple[int, int]], options: Options, device: torch.device
    ) -> dict[str, Tensor]:
        shards: dict[str, int] = {}
        widths: dict[str, int] = {}
        for name, (out, width) in shapes.items():
            own = options.at(name)
            names = cls.shared_names(out, width)
            widths |= {names["mos_A"]: width, names["mos_B"]: out}
            for pool in names.values():
                shards[pool] = shards.get(pool, 0) + (own.budget - own.private) * own.shards
        pools = {}
        for pool, count in shards.items():
            width = widths[pool]
            pools[pool] = nn.Parameter(torch.zeros(count, -(-width // options.shards), device=device))
            if pool.startswith("mos_A"):
                # as kaiming_uniform_(a=sqrt(5)) for a whole row
                nn.init.uniform_(pools[pool], -(width**-0.5), width**-0.5)
        return pools

    def setup(self, options: Options) -> None:
        check_rank(self, options.rank)
        self.scale, self.dropout = options.scale, options.dropout
        device, public = self.stored.device, options.rank - options.private
        if options.private:
            self.mos_A_private = nn.Parameter(torch.empty(options.private, self.in_features, device=device))
            self.mos_B_private = nn.Parameter(torch.zeros(self.out_features, options.private, device=device))
            nn.init.uniform_(self.mos_A_private, -(self.in_features**-0.5), self.in_features**-0.5)
        for name, width in (("mos_A", self.in_features), ("mos_B", self.out_features)):
            pool = getattr(self, name)
            size = -(-width // options.shards)
            if pool.dim() != 2 or not len(pool) or pool.shape[1] != size:
                raise UserError(
                    f"the pool {name} is {tuple(pool.shape)}, expected rows of {size}, of which"
                    f" {options.shards} cover {width}"
                )
            self.register_buffer(
                f"{name}_index", _places(len(getattr(self, name)), public, options.shards, device)
            )

    def check(self, tensors: dict[str, Tensor]) -> None:
        super().check(tensors)
        for name in ("mos_A", "mos_B"):
            index, pool = tensors[f"{name}_index"], len(tensors[name])
            if not index.is_meta and index.numel() and (index.min() < 0 or index.max() >= pool):
                raise UserError(
                    f"{name}_index has places from {int(index.min())} to {int(index.max())}, and the pool"
                    f" {name} has {pool} rows"
                )

    def factors(self) -> tuple[Tensor, Tensor]:
        A = F.embedding(self.mos_A_index, self.mos_A).flatten(1)[:, : self.in_features]
        B = F.embedding(self.mos_B_index, self.mos_B).flatten(1)[:, : self.out_features].t()
        if hasattr(self, "mos_A_private"):
            A, B = torch.cat((A, self.mos_A_private)), torch.cat((B, self.mos_B_private), 1)
        return A, B


def _places(pool: int, rank: int, shards: int, device) -> Tensor:
    """Draw random places (rank, shards) in a pool, int64; none is drawn twice before all are drawn once."""
    times = -(-rank * shards // pool)
    return torch.cat([torch.randperm(pool, device=device) for _ in range(times)])[: rank * shards].view(
        rank, shards
    )
