"""Linear with unmerged adapters, for rows of a batch with different adapters.

The factors of all adapters in the batch lie side by side, as columns of one B and rows of one A. Every row
computes the changes by all of them, each times the row's share: the adapter's scale, or 0. So a mix of any
methods and ranks takes two more products, and each factor is read once for the batch. (Gathering each row's
own factors would read, write and read them again for every row.) MiSS needs no A: its shard sums are made
once for each rank.

The rows that have no adapter add zeros: they get the base's numbers. Other rows' adapters change a row only
by the order in which its own products are summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_miss.adapter import AdapterLinear
from rwkv_miss.functional import flat_tokens, linear, product_matrix, shard_index, shard_sum
from rwkv_miss.gemm import product, product_exact, product_plus
from rwkv_miss.methods.token_rows import TokenRows

from ..model.layers import Head, Linear


class LowRank(NamedTuple):
    """Change of a weight (out, in): scale B A."""

    # (r, in); None for MiSS: its A x is the sums of strided shards, x[j] + x[j + r] + ... Of the embedding
    # (r, 1) int64: the token whose row each column of B is added to
    A: Tensor | None
    B: Tensor  # (out, r), a view of a contiguous (r, out)
    scale: float


# owners of the columns: (the adapter's place among those of the batch, its number of columns), one after
# another
Owners = tuple[tuple[int, int], ...]


class FactorColumns(NamedTuple):
    """Factors of several adapters of one linear: a token's x adds (h * shares) B^T.

    h (R,) are the shard sums of x for each of `ranks`, then A x.
    """

    ranks: tuple[int, ...]  # ranks of the adapters that have no A
    A: Tensor | None  # (R - sum of the ranks, in): the rows of the other adapters
    B: Tensor  # (out, R), a view of a contiguous (R, out)
    owners: Owners

    def place(self, owner: int) -> tuple[slice, slice | None]:
        """Return (the adapter's columns of B, its rows of A)."""
        start = 0
        for other, count in self.owners:
            if other == owner:
                break
            start += count
        first = start - sum(self.ranks)
        return slice(start, start + count), slice(first, first + count) if first >= 0 else None


def factors_of(layer: AdapterLinear, dtype: torch.dtype = torch.float32) -> LowRank | None:
    """Return the change of a layer of any method as factors in `dtype`; None if it has no such form.

    Factors already in `dtype` are shared, not copied, so they follow further training.
    """
    if isinstance(layer, TokenRows) and layer.is_lookup:
        return LowRank(layer.ids[:, None], layer.token_rows.detach().to(dtype).contiguous().t(), 1.0)
    factors = layer.low_rank()
    if factors is None:
        return None
    A, B = (factor.detach().to(dtype) for factor in factors)
    A, B = A.contiguous(), B.t().contiguous().t()
    is_miss = torch.equal(A, strided_shards(*A.shape, A.device).to(dtype))
    return LowRank(None if is_miss else A, B, 1.0)


def side_by_side(factors: Sequence[LowRank | None]) -> FactorColumns | None:
    """Join the columns of adapters of one linear; None without any. A single one is not copied."""
    have = [(place, factor) for place, factor in enumerate(factors) if factor is not None]
    # MiSS first; sorted() keeps the order of the others
    have = sorted(have, key=lambda one: one[1].A is not None)
    if not have:
        return None
    A = [factor.A for _, factor in have if factor.A is not None]
    B = [factor.B for _, factor in have]
    return FactorColumns(
        tuple(factor.B.shape[1] for _, factor in have if factor.A is None),
        None if not A else A[0] if len(A) == 1 else torch.cat(A),
        B[0] if len(B) == 1 else columns_together(B),
        tuple((place, factor.B.shape[1]) for place, factor in have),
    )


class UnmergedLinear(Linear):
    """Linear of the model that adds the changes of adapters, or nothing, to its product."""

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)  # not nn.Linear's, which would make a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.is_head = isinstance(linear, Head)
        # choice of use(), for the CPU's decoder
        self.low_rank: LowRank | None = None
        self.columns: FactorColumns | None = None
        # (B, R) fp32 for an x (B, T, in), or (B, in) of one token of every row; (1, R) for any x
        self.shares: Tensor | None = None
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        exact = self.is_head and x.is_cuda  # as in Head
        if self.columns is None:
            return linear(x, self.weight, exact=exact)
        tokens, h, B = flat_tokens(x), self._inner(x), self.columns.B.to(x.dtype)
        weight = product_matrix(self.weight, x.shape[-1], x.dtype)
        if exact:
            y = product_exact(tokens, weight).add_(product_exact(h, B))
        else:
            y = product_plus(tokens, weight, None, h, B.t())
        return y.view(*x.shape[:-1], self.out_features)

    def _inner(self, x: Tensor) -> Tensor:
        """Compute (tokens, R): the shard sums and A x, each times the row's share of its adapter."""
        tokens, (ranks, A, *_) = flat_tokens(x), self.columns
        sums = {rank: shard_sum(tokens, rank) for rank in {*ranks}}
        parts = [sums[rank] for rank in ranks]
        if A is not None:
            parts.append(product(tokens, A.to(x.dtype)))
        h = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        # in place, fp32 shares leave h in the dtype of x, rounded once
        h.view(*x.shape[:-1], h.shape[1]).mul_(self.shares if x.dim() == 2 else self.shares.unsqueeze(1))
        return h


class UnmergedEmbedding(nn.Embedding):
    """Embedding of the model that adds the rows of adapters, or nothing, to its own."""

    def __init__(self, embedding: nn.Embedding):
        nn.Module.__init__(self)  # not nn.Embedding's, which would make a weight
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.in_features = 1  # the width of A, which has a token's id in each row
        self.weight = embedding.weight
        self.low_rank: LowRank | None = None
        self.columns: FactorColumns | None = None
        self.shares: Tensor | None = None  # (B, R) fp32, or (1, R) for any ids (B, T)
        self.train(embedding.training)

    def forward(self, ids: Tensor) -> Tensor:
        rows = F.embedding(ids, self.weight)
        if self.columns is None:
            return rows
        h = (ids.unsqueeze(-1) == self.columns.A.view(-1)) * self.shares.unsqueeze(1)
        exact = torch.promote_types(rows.dtype, self.columns.B.dtype)
        return rows + h.to(exact) @ self.columns.B.t().to(exact)


def unmerged(module: nn.Module) -> UnmergedLinear | UnmergedEmbedding:
    """Make a linear or an embedding that can add the changes of adapters."""
    return (UnmergedEmbedding if isinstance(module, nn.Embedding) else UnmergedLinear)(module)


def strided_shards(rank: int, width: int, device) -> Tensor:
    """Build MiSS's A (r, in), of ones and zeros."""
    return F.one_hot(shard_index(width, rank, device=device), rank).t().float()


def together(changes: list[LowRank], width: int, scale: float) -> LowRank | None:
    """Join the changes of a weight (out, in = width) by several adapters, times `scale`."""
    if not changes:
        return None
    if len(changes) == 1:
        return changes[0]._replace(scale=scale)
    A = []
    for change in changes:
        rank = change.B.shape[1]
        A.append(strided_shards(rank, width, change.B.device) if change.A is None else change.A)
    return LowRank(torch.cat(A), columns_together([change.B for change in changes]), scale)


def columns_together(parts: Sequence[Tensor]) -> Tensor:
    """Join B's (out, r) to (out, sum of r), in memory column by column."""
    return torch.cat([B.t() for B in parts]).t()
