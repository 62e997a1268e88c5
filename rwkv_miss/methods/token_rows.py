"""Training of some tokens' rows of the embedding and the head, together with any method.

A token that the base never saw needs its own row in both, and changes no other row. The trained numbers are
the changes of these rows: `emb.token_rows` and `head.token_rows`, (tokens, C). The ids of the tokens are in
the metadata of the adapter's file.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from ..adapter import METHODS, AdapterLinear, NoOptions
from ..errors import UserError
from ..functional import without_autocast
from ..targets import layers_text

LAYERS = ("emb", "head")  # names of the layers, and of their parts


@dataclasses.dataclass(frozen=True)
class TokenOptions(NoOptions):
    """Ids of the tokens; is_lookup: the layer is the embedding, whose matrix is (C, V)."""

    ids: tuple[int, ...] = ()
    is_lookup: bool = False

    def at(self, name: str) -> TokenOptions:
        return dataclasses.replace(self, is_lookup=name == "emb")


class TokenRows(AdapterLinear):
    """dW = `token_rows` (n, C) fp32, zero at first, in the rows of n tokens, and zero in all other rows.

    The class is not in METHODS, because it is used together with a method.
    """

    method = "token_rows"
    Options = TokenOptions

    def setup(self, options: TokenOptions) -> None:
        self.is_lookup = options.is_lookup  # forward() looks rows up, and needs no form (targets.take_form)
        width, tokens = (
            (self.out_features, self.in_features) if self.is_lookup else (self.in_features, self.out_features)
        )
        if not options.ids or options.ids[-1] >= tokens:
            last = max(options.ids, default="none")
            raise UserError(f"there is no row for token {last}; the vocabulary has {tokens:,} tokens")
        device = self.stored.device
        self.register_buffer("ids", torch.tensor(options.ids, device=device), persistent=False)
        self.token_rows = nn.Parameter(torch.zeros(len(options.ids), width, device=device))

    @classmethod
    def sums_products(cls, options: TokenOptions) -> bool:
        return False

    def delta(self) -> Tensor:
        zeros = self.token_rows.new_zeros(self.out_features, self.in_features)
        return zeros.index_copy(*self._place())

    def add_delta_to(self, weight: Tensor) -> None:
        weight.index_add_(*self._place())

    def _place(self) -> tuple[int, Tensor, Tensor]:
        """Return the axis of tokens in the matrix, the ids, and the changes in the matrix's orientation."""
        return (1, self.ids, self.token_rows.t()) if self.is_lookup else (0, self.ids, self.token_rows)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        tokens = self.in_features if self.is_lookup else self.out_features
        one_hot = F.one_hot(self.ids, tokens).to(self.token_rows.dtype)
        if self.is_lookup:
            return one_hot, self.token_rows.t()
        return self.token_rows, one_hot.t()

    def forward(self, x: Tensor) -> Tensor:
        if self.is_lookup:
            return self.changed_rows(x)
        x = functional.autocast(x)
        with without_autocast(x.device):
            change = functional.linear(x, self.token_rows, exact=x.is_cuda)
            y = self.plain_forward(x)
            return y.index_add(-1, self.ids, change.to(y.dtype))

    def changed_rows(self, ids: Tensor) -> Tensor:
        """Look up the rows of tokens (...) with their changes: (..., C), at least fp32."""
        place = torch.searchsorted(self.ids, ids.contiguous()).clamp_(max=len(self.ids) - 1)
        is_changed = (self.ids[place] == ids).unsqueeze(-1)
        return self.plain_forward(ids) + F.embedding(place, self.token_rows) * is_changed

    def plain_forward(self, x: Tensor) -> Tensor:
        if self.is_lookup:
            return F.embedding(x, self.stored)
        return functional.linear(x, self.matrix, self.bias, exact=x.is_cuda)  # as in the model's Head


def layers_of_rows(tokens: Sequence[int], train_parts: Sequence[str]) -> list[str]:
    """Name the layers of which only rows of tokens are trained."""
    return [name for name in train_parts if tokens and name in LAYERS]


def method_of(metadata: Mapping[str, Any], name: str) -> tuple[type[AdapterLinear], NoOptions]:
    """Return class and options of an adapted layer, by an adapter's metadata."""
    if name in layers_of_rows(metadata["tokens"], metadata["train_parts"]):
        return TokenRows, TokenOptions(tuple(metadata["tokens"])).at(name)
    cls = METHODS[metadata["method"]]
    return cls, cls.Options.parse(metadata["options"]).at(name)


def token_ids(text: str) -> list[int]:
    """Read "10,97-122" as sorted ids. Raises UserError for other texts."""
    found: set[int] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise UserError(f"tokens {part!r}: expected ids and ranges of ids, such as 10,97-122")
        if int(match[2] or match[1]) > 1 << 24:
            raise UserError(f"tokens {part!r}: expected ids of a vocabulary, below 2^24")
        found |= {*range(int(match[1]), int(match[2] or match[1]) + 1)}
    return sorted(found)


def tokens_text(ids: Sequence[int]) -> str:
    """Write ids as token_ids() reads them."""
    return layers_text(ids)
