"""Work of a method around the optimizer steps of a training."""

from __future__ import annotations

import contextlib
import operator

from torch import Tensor, nn

from .adapter import METHODS, AdapterLinear, Gather, GradientOf, adapted_linears
from .errors import UserError
from .sharding import is_sharded


def whole(parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager:
    """Return the `gather` of a model whose parameters are always whole."""
    return contextlib.nullcontext()


class AroundSteps:
    """Work of a method around the optimizer steps of a training, for a model's adapted linears.

    The linears are looked up once, because a look-up in each step would take as long as a layer on a GPU.
    Make a new object whenever an adapter was added or taken off.
    """

    def __init__(self, model: nn.Module) -> None:
        # without trained rows of tokens, which belong to no method and do nothing around a step
        self.layers = [layer for layer in adapted_linears(model).values() if layer.method in METHODS]
        idle = AdapterLinear.before_step.__func__
        acts = any(type(layer).before_step.__func__ is not idle for layer in self.layers[:1])
        if acts and any(map(is_sharded, model.parameters())):
            raise UserError(
                f"{self.layers[0].method} looks at whole parameters around each step, and fully_shard() has"
                " shared them out; train it under DDP, or take another method"
            )

    def penalty(self, gather: Gather = whole) -> Tensor | None:
        """Return the method's penalty on the loss of a step, or None."""
        return type(self.layers[0]).penalty(self.layers, gather) if self.layers else None

    def before(
        self,
        step: int,
        total: int,
        gradient_of: GradientOf = operator.attrgetter("grad"),
        gather: Gather = whole,
    ) -> None:
        """Show the method the gradients of step `step` (1-based) of `total`, before they are used."""
        if self.layers:
            type(self.layers[0]).before_step(self.layers, step, total, gradient_of, gather)

    def after(self, step: int, total: int, gather: Gather = whole) -> None:
        """Tell the method that step `step` (1-based) of `total` is done."""
        if self.layers:
            type(self.layers[0]).after_step(self.layers, step, total, gather)


def penalty(model: nn.Module, gather: Gather = whole) -> Tensor | None:
    """Call AroundSteps.penalty() of a model."""
    return AroundSteps(model).penalty(gather)


def before_step(
    model: nn.Module,
    step: int,
    total: int,
    gradient_of: GradientOf = operator.attrgetter("grad"),
    gather: Gather = whole,
) -> None:
    """Call AroundSteps.before() of a model."""
    AroundSteps(model).before(step, total, gradient_of, gather)


def after_step(model: nn.Module, step: int, total: int, gather: Gather = whole) -> None:
    """Call AroundSteps.after() of a model."""
    AroundSteps(model).after(step, total, gather)
