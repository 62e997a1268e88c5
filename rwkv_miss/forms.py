"""Forms of a target: how an adapted layer computes in the place of a module, or beside it.

linear      nn.Linear, and transformers' Conv1D, whose weight is (in, out): an adapted linear replaces it
wrapped     a linear with a forward of its own, such as rwkv7-hf's RWKV7Linear, or one in a model with
            accelerate's hooks: replaced as well, but that forward runs, and the change is added to it
embedding   nn.Embedding, the linear of a one-hot input, whose weight is (in, out): likewise replaced
read        a parameter that its model reads, such as the experts of Mixtral (experts, out, in), each a
            target of its own, or a linear of torch's MultiheadAttention: the module stays, and code that
            reads the parameter gets the weight with its change, in the weight's dtype
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UserError
from .functional import autocast, without_autocast

LINEAR, WRAPPED, EMBEDDING, READ = "linear", "wrapped", "embedding", "read"
LINEARS = LINEAR, WRAPPED
# attributes in which torch keeps the hooks of a module's forward and backward
HOOKS = """
    _forward_hooks _forward_hooks_with_kwargs _forward_hooks_always_called _forward_pre_hooks
    _forward_pre_hooks_with_kwargs _backward_hooks _backward_pre_hooks _is_full_backward_hook
""".split()


def share_hooks(module: nn.Module, other: nn.Module) -> None:
    """Let `other` run the hooks of a module, also those that are registered or removed later."""
    for hooks in HOOKS:
        setattr(other, hooks, getattr(module, hooks))


def is_offloaded(module: nn.Module) -> bool:
    """Tell whether accelerate loads a module's weights for each forward, and has them elsewhere meanwhile."""
    return hasattr(getattr(module, "original", None) or module, "_hf_hook")


@contextlib.contextmanager
def at_hand(module: nn.Module) -> Iterator[None]:
    """Give an offloaded module its weights inside the block."""
    hook = module._hf_hook if is_offloaded(module) and module.weight.is_meta else None
    if hook:
        hook.pre_forward(module)
    try:
        yield
    finally:
        if hook:
            hook.post_forward(module, None)


class WrappedForm:
    """Forward of an adapted layer that stands around a linear with a forward of its own."""

    dropout: float = 0.0  # share of the adapter's inputs left out, in training

    def forward(self, x: Tensor) -> Tensor:
        """Compute its own output plus x delta^T, x (..., in) -> (..., out), in the dtype of that output."""
        y = self.base_forward(x)
        x = autocast(x.to(y.device))
        with without_autocast(x.device):
            x = F.dropout(x, self.dropout, self.training)
            for factor in self.low_rank() or (self.delta(),):
                x = F.linear(x, factor.to(x.dtype))
        return y + x.to(y.dtype)

    def base_forward(self, x: Tensor) -> Tensor:
        if not self.changes_frozen_weight():
            return self.plain_forward(x)
        weight = self.base_weight() if self.view is None else self.view.of(self.base_weight())
        return self._own_forward(x, weight.to(self.stored.dtype))

    def plain_forward(self, x: Tensor) -> Tensor:
        return self._own_forward(x, self.stored)

    def _own_forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """Run the linear's own forward with a weight of the stored shape, and this layer's bias."""
        lent, own = {"weight": weight, "bias": self.bias}, self.original._parameters
        self.original.training = self.training
        if weight.is_meta:  # accelerate's hook loads it
            return self.original.forward(x)
        own.update((key, lent[key]) for key in own)
        try:
            return self.original.forward(x)
        finally:
            own.update(dict.fromkeys(own))


class EmbeddingForm:
    """Forward of an adapted layer that stands for an nn.Embedding."""

    def forward(self, ids: Tensor) -> Tensor:
        """Compute rows of W^T + delta^T, ids (...) -> (..., out), by low_rank() if the method has factors."""
        with without_autocast(ids.device):
            if (factors := self.low_rank()) is None:
                return self._rows(ids, (self.base_weight() + self.delta()).t()).to(self.stored.dtype)
            A, B = factors
            rows = self.base_forward(ids)
            return (rows + F.linear(self._rows(ids, A.t()), B)).to(rows.dtype)

    def base_forward(self, ids: Tensor) -> Tensor:
        if self.changes_frozen_weight():
            return self._rows(ids, self.base_weight().t()).to(self.stored.dtype)
        return self.plain_forward(ids)

    def plain_forward(self, ids: Tensor) -> Tensor:
        return self._rows(ids, self.stored)

    def _rows(self, ids: Tensor, table: Tensor) -> Tensor:
        return F.embedding(ids, table, self.original.padding_idx)


class ReadForm:
    """Forward of an adapted layer whose weight is a parameter that other modules read."""

    def forward(self, matrix: Tensor) -> Tensor:
        """Compute the matrix with its change, in its dtype."""
        with without_autocast(matrix.device):
            return (self.base_weight() + self.delta()).to(matrix.dtype)

    def base_forward(self, matrix: Tensor) -> Tensor:
        return self.base_weight().to(matrix.dtype) if self.changes_frozen_weight() else matrix

    def plain_forward(self, matrix: Tensor) -> Tensor:
        return matrix


def take_form(layer: nn.Module, form: str) -> None:
    """Replace the linear forward of an adapted layer by its target's form, unless its class handles that."""
    if form != LINEAR and not getattr(layer, "is_lookup", False):
        forms = {WRAPPED: WrappedForm, EMBEDDING: EmbeddingForm, READ: ReadForm}
        layer.__class__ = with_form(forms[form], type(layer))


@functools.cache
def with_form(form: type, cls: type) -> type:
    """Make a subclass of `form` and `cls`; a pickle of its modules records both classes."""
    names = {"__module__": cls.__module__, "plain_class": cls}
    names["__reduce__"] = lambda self: (_unmade, (form, cls), self.__dict__)
    return type(cls.__name__, (form, cls), names)


def _unmade(form: type, cls: type) -> nn.Module:  # pickles of modules record this name
    made = with_form(form, cls)
    return made.__new__(made)


def refuse_in_form(layer: nn.Module, form: str) -> None:
    """Raise UserError for a method whose change is computed with a weight that this form does not have."""
    if form != WRAPPED or layer.low_rank() is not None and not layer.changes_frozen_weight():
        return
    if layer.weight.is_meta:
        raise UserError(
            f"the weight is offloaded, and method {layer.method} computes with it; take a method of two"
            " factors, such as miss or lora, or load the model without offload"
        )
    if layer.low_rank() is None and getattr(layer, "dropout", 0.0):
        raise UserError(
            f"{layer.method}'s dropout acts inside its product, and this linear has a forward of its own;"
            " give dropout 0, or take the method lora"
        )
