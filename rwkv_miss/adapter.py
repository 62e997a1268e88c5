"""The base of every adapter method and their registry.

An adapted linear is still an `nn.Linear`: its `weight` keeps its name, the adapter only adds parameters beside it
(`blocks.0.att.key.weight` stays, `blocks.0.att.key.miss` is new). A method is one file in `methods/`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional
from .errors import UserError
from .quantised import dense

METHODS: dict[str, type[AdapterMethod]] = {}


def register(name: str):
    """Class decorator: make a method known as `name` to inject(), to the trainer and to the merge."""

    def add(cls):
        cls.method = name
        METHODS[name] = cls
        return cls

    return add


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """What a user may set for a method; subclasses add fields. `aliases` maps the names of neighbouring projects to fields."""

    aliases: ClassVar[dict[str, str]] = {}

    @classmethod
    def parse(cls, values: dict[str, Any]) -> NoOptions:
        """Options from a dictionary; an unknown key or a value of the wrong kind is a UserError that lists what exists."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        known: dict[str, Any] = {}
        for key, value in values.items():
            name = cls.aliases.get(key, key)
            if name not in fields:
                short = {field: alias for alias, field in cls.aliases.items() if len(alias) == 1}
                known_names = ", ".join(f"{field} ({short[field]})" if field in short else field for field in sorted(fields))
                raise UserError(f"adapter option {key!r} is unknown; this method has: {known_names or 'no options'}")
            kind = type(fields[name].default)
            if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
                raise UserError(f"adapter option {key} must be {kind.__name__}, got {value!r}")
            known[name] = kind(value)
        return cls(**known)


@dataclasses.dataclass(frozen=True)
class Options(NoOptions):
    """The options of most methods; subclasses add fields."""

    rank: int = 64
    aliases: ClassVar[dict[str, str]] = {"r": "rank"}


class AdapterMethod:
    """What inject(), the trainer and the merge ask of a method. Methods that adapt linears derive from AdapterLinear."""

    method: ClassVar[str]
    Options: ClassVar[type[NoOptions]] = Options
    adapts_linears: ClassVar[bool] = True
    default_lr: ClassVar[float] = 1e-4

    @classmethod
    def attach(cls, model: nn.Module, linears: dict[str, nn.Linear], options: Options) -> None:
        """Add the method's trainable parameters to a frozen model. `linears` maps dotted names to the chosen layers."""
        raise NotImplementedError


class AdapterLinear(AdapterMethod, nn.Linear):
    """A frozen linear with a trainable change of its weight, delta() of shape (out, in).

    A method implements setup() and delta(); forward() may be overridden by something faster that means the same.
    Parameters named in `shared` are created by the first layer that needs them, live once in memory and once in the file.
    """

    shared: ClassVar[tuple[str, ...]] = ()

    def setup(self, options: Options, pool: dict[str, Tensor]) -> None:
        """Register the adapter's parameters (fp32). `pool` is one dictionary for the whole model, for tensors in `shared`.

        The frozen weight may be changed here (PiSSA); what the merge then needs must be kept in a parameter or buffer.
        """
        raise NotImplementedError

    def delta(self) -> Tensor:
        """The change of the weight *of the base file*, (out, in), fp32. This is the meaning of the method."""
        raise NotImplementedError

    def add_delta_to(self, weight: Tensor) -> None:
        """weight += delta(), in place, (out, in) fp32; a method may do it without forming delta()."""
        weight.add_(self.delta())

    def forward(self, x: Tensor) -> Tensor:
        """y = x (W + delta)^T + bias, x (..., in) -> (..., out)."""
        return F.linear(x, (dense(self.weight, self.in_features, x.dtype) + self.delta()).to(x.dtype), self.bias)

    def base_forward(self, x: Tensor) -> Tensor:
        """forward() of the base file's linear. A method that changes the frozen weight overrides it."""
        return functional.linear(x, self.weight, self.bias)

    def penalty(self) -> Tensor | None:
        """A scalar to add to the loss, or None."""
        return None

    def on_step(self, step: int, total: int) -> None:
        """Called after optimizer step `step` (1-based) of `total`."""

    @classmethod
    def wrap(cls, weight: nn.Parameter, bias: nn.Parameter | None, options: Options, pool: dict[str, Tensor]) -> AdapterLinear:
        """The adapted layer that takes over a linear's weight (out, in) and bias without a copy."""
        adapted = cls.__new__(cls)
        nn.Module.__init__(adapted)  # not nn.Linear's, which would make a weight and initialise it
        adapted.out_features, adapted.in_features = weight.shape
        adapted.weight, adapted.bias = weight, bias
        adapted.requires_grad_(False)
        adapted.setup(options, pool)
        return adapted

    @classmethod
    def attach(cls, model, linears, options) -> None:
        pool: dict[str, Tensor] = {}
        adapted: dict[str, AdapterLinear] = {}
        for name, linear in linears.items():
            try:
                adapted[name] = cls.wrap(linear.weight, linear.bias, options, pool)
            except UserError as error:
                raise UserError(f"{name}: {error}") from None
        for name, layer in adapted.items():  # all of them or none
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer)

    def own_tensors(self) -> dict[str, Tensor]:
        """Everything the method added to this layer: its parameters and buffers without the base's weight and bias."""
        own = {**dict(self.named_parameters(recurse=False)), **dict(self.named_buffers(recurse=False))}
        return {name: tensor for name, tensor in own.items() if name not in ("weight", "bias")}

    @classmethod
    @torch.no_grad()
    def merged_weight(cls, weight: Tensor, tensors: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
        """Base weight (out, in) fp32 + the layer's adapter tensors -> merged weight (out, in) fp32, in the memory of `weight`."""
        pool = {name: nn.Parameter(tensors[name], requires_grad=False) for name in cls.shared}
        adapted = cls.wrap(nn.Parameter(weight, requires_grad=False), None, cls.Options.parse(options), pool)
        adapted.assign(tensors)
        adapted.add_delta_to(weight)
        return weight

    @torch.no_grad()
    def assign(self, tensors: dict[str, Tensor]) -> None:
        """Set the layer's own tensors to `tensors`; names and shapes must be exactly those that setup() made."""
        own = self.own_tensors()
        if own.keys() != tensors.keys():
            raise UserError(f"the adapter holds {sorted(tensors)}, method {self.method} needs {sorted(own)}")
        for name, tensor in tensors.items():
            if own[name].shape != tensor.shape:
                raise UserError(f"{name} is {tuple(tensor.shape)} in the adapter, {tuple(own[name].shape)} in the model")
            own[name].copy_(tensor)


def adapted_linears(model: nn.Module) -> dict[str, AdapterLinear]:
    """Dotted name -> layer, for every adapted linear of the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdapterLinear)}


def penalty(model: nn.Module) -> Tensor | None:
    """Sum of the layers' penalties, or None when no layer has one."""
    terms = [term for layer in adapted_linears(model).values() if (term := layer.penalty()) is not None]
    return torch.stack(terms).sum() if terms else None


def on_step(model: nn.Module, step: int, total: int) -> None:
    """Tell every adapted layer that optimizer step `step` of `total` is done."""
    for layer in adapted_linears(model).values():
        layer.on_step(step, total)


def only_linears_change(model: nn.Module) -> bool:
    """Whether the model is its base but for adapted linears: nothing else of it is trained."""
    own = {id(tensor) for layer in adapted_linears(model).values() for tensor in layer.own_tensors().values()}
    return bool(own) and all(id(p) in own for p in model.parameters() if p.requires_grad)


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Context in which the model is its base: adapted linears compute without their adapter, which is as before afterwards.

    Raises UserError where tensors of the base itself are trained, or an initial state is: their first values are not in the model.
    """
    if not only_linears_change(model):
        raise UserError("disabled() gives back the base of adapted linears only; this model "
                        + ("trains other tensors, too" if adapted_linears(model) else "has none"))
    layers = adapted_linears(model).values()
    shadowed = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = layer.base_forward
    try:
        yield
    finally:
        for layer, before in zip(layers, shadowed, strict=True):
            del layer.forward
            if before is not None:
                layer.forward = before
