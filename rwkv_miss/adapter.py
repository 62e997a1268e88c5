"""Base class of every adapter method, and the registry of methods.

An adapted linear is still an `nn.Linear`. Its `weight` keeps its name, and the adapter only adds parameters
(`blocks.0.att.key.weight` stays, `blocks.0.att.key.miss` is new). A method is one file in `methods/`.
"""

from __future__ import annotations

import contextlib
import copy
import math
import types
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional
from .disabled_layers import disabled_here
from .errors import UserError
from .options import About, NoOptions, Options, check_parts
from .options import option as option
from .quantised import dense, of_others, shape_of
from .sharding import unsharded
from .targets import READ, Target, View, put_linears, put_read, take_form

METHODS: dict[str, type[AdapterMethod]] = {}
GradientOf = Callable[[nn.Parameter], Tensor | None]
Class = TypeVar("Class", bound=type)
Gather = Callable[[list[nn.Parameter]], contextlib.AbstractContextManager]


def register(name: str) -> Callable[[Class], Class]:
    """Return a class decorator that makes a method known as `name` to inject(), the trainer and the merge."""

    def add(cls: Class) -> Class:
        cls.method = name
        METHODS[name] = cls
        return cls

    return add


# Share of their size by which the first step shall move the outputs. With this one number for all methods,
# small models learn in 600 steps of few rows (docs/worklog.md). For 7B it gives between a third and all of
# the published rates, which were chosen for larger batches.
FIRST_MOVE = 0.3


class AdapterMethod:
    """Interface of a method for inject(), the trainer and the merge.

    Methods that adapt linears derive from AdapterLinear.
    """

    method: ClassVar[str]
    about: ClassVar[About] = About()
    Options: ClassVar[type[NoOptions]] = Options
    adapts_linears: ClassVar[bool] = True
    default_lr: ClassVar[float] = 1e-4  # the published rate: train.py's --lr_init paper
    shared: ClassVar[tuple[str, ...]] = ()
    decays: ClassVar[bool] = True  # weight decay pulls towards the base, which the method is at zero

    @classmethod
    def sums_products(cls, options: Options) -> bool:
        """Tell whether an entry of dW is a sum of products, and not a copy of a trained number."""
        return True

    @classmethod
    def attach(cls, model: nn.Module, targets: dict[str, Target], options: Options) -> None:
        """Add the method's trainable parameters to a frozen model.

        targets: the weights to adapt, by the dotted names of their layers.
        """
        raise NotImplementedError

    @classmethod
    def first_rate(cls, layers: int, width: int, options: Options) -> float:
        """Choose the learning rate for a model with `layers` layers, each `width` wide.

        One step of Adam shall move the outputs of all layers together by FIRST_MOVE of their size.
        """
        return FIRST_MOVE / (layers * cls.step_reach(width, options))

    @classmethod
    def step_reach(cls, width: int, options: Options) -> float:
        """Estimate how far a step of Adam at rate 1 moves an output of a linear with `width` inputs of size
        1.

        Adam's first step moves every number by the rate, with the sign that the gradient gives it. The
        default is MiSS's: each of the rank's shard sums has a size of sqrt(width / rank), and they add up.
        """
        return math.sqrt(width * options.rank)


class AdapterLinear(AdapterMethod, nn.Linear):
    """A frozen linear with a trainable change of its weight, delta() of shape (out, in).

    A method implements setup() and delta(); it may override forward() by something faster with the same
    result. The life of a layer: setup(); then start() if it is new, or assign() with the tensors of a file;
    then prepare(). Tensors named in `shared` are the same in many layers: they live once in memory, once in
    the file, and once in state_dict(), under the first layer's name. The frozen weight depends on the tensors
    named in `constants`, so a resumed run begins with the ones it had.
    """

    constants: ClassVar[tuple[str, ...]] = ()
    original: nn.Module | None = None  # the module that stood here before, without weight and bias
    view: View | None = None  # the matrix inside the stored weight; None: the stored weight is the matrix
    owner: nn.Module | None = None  # the module that has the weight, if this one has not
    renewed: dict[int, Tensor] | None = None  # inside renewing(): the new memory of weights, by its address
    borrowed: frozenset[str] = frozenset()  # shared tensors that state_dict() has under another layer's name
    blocks: int = 0  # number of open disabled() blocks, in all threads
    outside: Callable | None = None  # this layer's own forward outside of those blocks; None: the class's

    @classmethod
    def make_shared(
        cls, shapes: dict[str, tuple[int, int]], options: Options, device: torch.device
    ) -> dict[str, Tensor]:
        """Make the tensors of `shared` by name, for linears of these (out, in) shapes.

        A parameter is trained, a plain tensor stays.
        """
        return {}

    @classmethod
    def shared_names(cls, out: int, width: int) -> dict[str, str]:
        """Name the shared tensors of a linear (out, in): name in the layer -> name in make_shared().

        A method whose tensors differ with the widths overrides it.
        """
        return {name: name for name in cls.shared}

    def setup(self, options: Options) -> None:
        """Register the layer's parameters (fp32) and buffers; the shared ones are registered before.

        Set the first values that do not depend on the weight. A tensor that prepare() derives is a buffer
        with persistent=False: it is not saved.
        """
        raise NotImplementedError

    def start(self) -> None:
        """Give a new adapter those initial values that follow from the frozen weight."""

    def prepare(self) -> None:
        """Derive what forward() needs from the layer's tensors, or change the frozen weight (PiSSA)."""

    def revert(self) -> None:
        """Give the frozen weight back as it was before prepare()."""

    def delta(self) -> Tensor:
        """Compute the change of the weight *of the base file*, (out, in), fp32. It defines the method."""
        raise NotImplementedError

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """Return (A (r, in), B (out, r)), fp32, with B A = delta(), or None if delta() has no such form."""
        return None

    @property
    def stored(self) -> nn.Parameter:
        """Return the frozen parameter of the model."""
        return self.weight if self.owner is None else self.owner._parameters[self.view.key.rpartition(".")[2]]

    @property
    def matrix(self) -> Tensor:
        """Return the frozen weight as a matrix (out, in)."""
        return self.weight if self.view is None else self.view.of(self.stored)

    @torch.no_grad()
    def put_matrix(self, matrix: Tensor) -> None:
        """Give the frozen weight other numbers, in new memory."""
        stored = self.stored.detach()
        if self.view is None:
            self.stored.data = matrix.to(stored.dtype)
        else:
            renewed = {} if self.renewed is None else self.renewed
            if stored.data_ptr() not in renewed:
                self.stored.data = stored = stored.clone()
                renewed[stored.data_ptr()] = stored
            self.view.of(stored).copy_(matrix)

    def key(self, name: str) -> str:
        """Return the name of the stored weight in the model, given the layer's name."""
        return f"{name}.weight" if self.view is None else self.view.key

    @classmethod
    def changes_frozen_weight(cls) -> bool:
        """Tell whether the stored weight differs from the base file's, as PiSSA's does."""
        return cls.base_weight is not AdapterLinear.base_weight

    def base_weight(self) -> Tensor:
        """Return the weight of the base file, (out, in), fp32 or float64.

        A method that changes the frozen weight overrides it.
        """
        weight = dense(self.matrix, self.in_features, torch.float32)
        return weight.to(torch.promote_types(weight.dtype, torch.float32))

    def add_delta_to(self, weight: Tensor) -> None:
        """Add delta() to a weight (out, in) fp32 in place; a method may do it without forming delta()."""
        weight.add_(self.delta())

    def forward(self, x: Tensor) -> Tensor:
        """Compute y = x (W + delta)^T + bias, x (..., in) -> (..., out)."""
        x = functional.autocast(x)
        with functional.without_autocast(x.device):
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, (self.base_weight() + self.delta()).to(x.dtype), bias)

    def plain_forward(self, x: Tensor) -> Tensor:
        """Compute the output of a plain module with the stored weight."""
        return functional.linear(x, self.matrix, self.bias)

    def base_forward(self, x: Tensor) -> Tensor:
        """Compute the base file's output. A method that changes the frozen weight overrides it."""
        return self.plain_forward(x)

    def forward_here(self, x: Tensor) -> Tensor:
        """Compute the output while some thread has disabled the layer: the base's if it is this thread."""
        if id(self) in disabled_here():
            return self.base_forward(x)
        return type(self).forward(self, x) if self.outside is None else self.outside(x)

    def merged_forward(self, x: Tensor) -> Tensor:
        """Compute plain_forward(), with the adapter's change already merged into the weight."""
        if self.training and torch.is_grad_enabled():
            raise UserError(
                "the adapter is merged into the model, so no gradient would reach it; call"
                " rwkv_miss.unmerge(model) before training, or model.eval() before an answer"
            )
        return self.plain_forward(x)

    @torch.no_grad()
    def changed_weight(self) -> Tensor:
        """Compute the weight with its change, in fp32 or float64: the sum that a merged file rounds."""
        weight = self.base_weight().clone()
        layer = copy.copy(self)  # the adapter's tensors may be in half precision, after model.bfloat16()
        for kind in ("_parameters", "_buffers"):
            exact = {
                key: t.to(weight.dtype) if key != "weight" and t is not None and t.is_floating_point() else t
                for key, t in getattr(self, kind).items()
            }
            layer.__dict__[kind] = exact
        layer.add_delta_to(weight)
        return weight

    def keep(self, original: nn.Module) -> None:
        """Remember the module that stood here; its weight and bias are this layer's alone."""
        original._parameters.update(dict.fromkeys(original._parameters))
        self.__dict__["original"] = original  # no submodule

    def plain(self) -> nn.Module:
        """Return the module that stood here, with this layer's weight and bias."""
        for key in self.original._parameters:
            self.original._parameters[key] = getattr(self, key)
        return self.original.train(self.training)

    @classmethod
    def penalty(cls, layers: list[AdapterLinear], gather: Gather) -> Tensor | None:
        """Compute a scalar to add to the loss, or None.

        ZeRO-3 may share the parameters out. They are whole inside gather(parameters), not in the backward.
        """
        return None

    @classmethod
    def before_step(
        cls, layers: list[AdapterLinear], step: int, total: int, gradient_of: GradientOf, gather: Gather
    ) -> None:
        """Act before optimizer step `step` (1-based) of `total`.

        gradient_of(parameter): the gradient of the whole step, equal on all ranks, or None. All ranks ask for
        gradients in the same order.
        """

    @classmethod
    def after_step(cls, layers: list[AdapterLinear], step: int, total: int, gather: Gather) -> None:
        """Act after optimizer step `step` (1-based) of `total`.

        The method must not write into a trained parameter: under ZeRO that would be lost.
        """

    def rate_factor(self, name: str) -> float:
        """Return the factor on the learning rate of one of the layer's tensors (LoRA+)."""
        return 1.0

    @classmethod
    def wrap(
        cls,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        options: Options,
        shared: dict[str, Tensor],
        target: Target | None = None,
    ) -> AdapterLinear:
        """Make the adapted layer of a linear. It takes over weight and bias without a copy.

        options: this linear's options. shared: its shared tensors. target: where the weight is, if it is not
        a linear's own (out, in).
        """
        adapted = cls.__new__(cls)
        nn.Module.__init__(adapted)  # not nn.Linear's, which would make a weight and initialise it
        if target and not target.view.is_weight_of(target.name):
            adapted.view = target.view
        if target and target.form == READ:
            adapted.__dict__.update(owner=target.owner, view=target.view)  # no submodule
        else:
            adapted.weight = weight
        adapted.bias = bias
        adapted.out_features, adapted.in_features = shape_of(adapted.matrix)
        adapted.requires_grad_(False)
        for key, tensor in shared.items():
            if isinstance(tensor, nn.Parameter):
                adapted.register_parameter(key, tensor)
            else:
                adapted.register_buffer(key, tensor)
        adapted.setup(options)
        return adapted

    @classmethod
    def attach(cls, model: nn.Module, targets: dict[str, Target], options: Any) -> None:
        if isinstance(options, Options):
            for option, value in vars(options).items():
                if isinstance(value, dict):
                    check_parts(option, value, targets)
        shapes = {name: tuple(shape_of(target.matrix)) for name, target in targets.items()}
        pool = cls.make_shared(shapes, options, next(iter(targets.values())).weight.device)
        adapted: dict[str, AdapterLinear] = {}
        for name, target in targets.items():
            bias = None if target.form == READ else getattr(target.owner, "bias", None)
            try:
                shared = {key: pool[of] for key, of in cls.shared_names(*shapes[name]).items()}
                layer = cls.wrap(target.weight, bias, options.at(name), shared, target)
            except UserError as error:
                raise UserError(f"{name}: {error}") from None
            take_form(layer, target.form)
            adapted[name] = layer.train(target.owner.training)
        for name, layer in adapted.items():  # only now, so that an error leaves the model unchanged
            if layer.owner is None:
                put_linears(model, {name: layer})
            else:
                put_read(targets[name], layer)
        share(adapted_linears(model).values())

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key in self.borrowed:
            del destination[prefix + key]
        quantised = of_others(self._parameters.get("weight"))
        destination.update({prefix + key: tensor for key, tensor in quantised.items()})

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, *others):
        before = {key: getattr(self, key) for key in self.shared}
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, *others)
        for key, own in of_others(self._parameters.get("weight")).items() if unexpected else ():
            name = prefix + key
            if name in unexpected and torch.equal(state_dict[name].to(own.device), own):  # equal base
                unexpected.remove(name)
        for key, old in before.items():
            if key not in self.borrowed:
                if getattr(self, key) is not old:  # load_state_dict(assign=True)
                    old.moved_to = getattr(self, key)
                continue
            if prefix + key not in state_dict and prefix + key in missing:
                missing.remove(prefix + key)
            own = self._parameters if key in self._parameters else self._buffers
            own[key] = getattr(old, "moved_to", old)

    def _apply(self, fn, recurse=True):
        # nn.Module moves buffers one by one, so every layer would get a copy of the shared ones
        before = {key: self._buffers[key] for key in self.shared if key in self._buffers}
        super()._apply(fn, recurse)
        for key, old in before.items():
            new, first = self._buffers[key], getattr(old, "moved_to", None)
            if first is not None and (first.device, first.dtype) == (new.device, new.dtype):
                self._buffers[key] = first
            elif new is not old:
                old.moved_to = new
        return self

    def _replicate_for_data_parallel(self) -> AdapterLinear:
        replica = super()._replicate_for_data_parallel()
        forward = self.__dict__.get("forward")
        if id(self) in disabled_here():  # a replica runs in a thread of its own
            replica.forward = replica.base_forward
        elif getattr(forward, "__self__", None) is self:
            replica.forward = types.MethodType(forward.__func__, replica)
        return replica

    def own_tensors(self) -> dict[str, Tensor]:
        """Return this layer's tensors in an adapter file: all saved ones but weight and bias."""
        buffers = {
            name: t
            for name, t in self.named_buffers(recurse=False)
            if name not in self._non_persistent_buffers_set
        }
        own = {**dict(self.named_parameters(recurse=False)), **buffers}
        return {name: tensor for name, tensor in own.items() if name not in ("weight", "bias")}

    @classmethod
    @torch.no_grad()
    def merged_weight(cls, weight: Tensor, tensors: dict[str, Tensor], options: Options) -> Tensor:
        """Merge a layer of an adapter file into the base's weight (out, in) fp32, in place.

        tensors, options: the layer's, in that file.
        """
        cls.of_file(weight, tensors, options).add_delta_to(weight)
        return weight

    @classmethod
    @torch.no_grad()
    def of_file(cls, weight: Tensor, tensors: dict[str, Tensor], options: Options) -> AdapterLinear:
        """Make the adapted layer of a base weight (out, in) fp32, which is not copied.

        tensors, options: the layer's, in an adapter file.
        """
        shared = {name: tensors[name].to(weight.dtype) for name in cls.shared}
        adapted = cls.wrap(nn.Parameter(weight, requires_grad=False), None, options, shared)
        adapted.assign(tensors)
        return adapted

    def check(self, tensors: dict[str, Tensor]) -> None:
        """Raise UserError unless the names and shapes are exactly setup()'s."""
        own = self.own_tensors()
        if own.keys() != tensors.keys():
            raise UserError(f"the adapter holds {sorted(tensors)}, method {self.method} needs {sorted(own)}")
        for name, tensor in tensors.items():
            if own[name].shape != tensor.shape:
                raise UserError(
                    f"{name} is {tuple(tensor.shape)} in the adapter, {tuple(own[name].shape)} in the model"
                )
            if own[name].is_floating_point() != tensor.is_floating_point():
                raise UserError(f"{name} is {tensor.dtype} in the adapter, {own[name].dtype} in the model")

    @torch.no_grad()
    def assign(self, tensors: dict[str, Tensor]) -> None:
        """Set the layer's own tensors to `tensors`."""
        self.check(tensors)
        for name, tensor in self.own_tensors().items():
            tensor.copy_(tensors[name])

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Set the tensors of a layer in use; one that does not fit changes nothing."""
        self.check(tensors)
        self.revert()
        self.assign(tensors)
        self.prepare()


def has_factors(method: type[AdapterMethod]) -> bool:
    """Tell whether the change of a weight by this method is a product of two factors, magnitudes apart."""
    return getattr(method, "low_rank", AdapterLinear.low_rank) is not AdapterLinear.low_rank


@torch.no_grad()
def prepare_again(layer: AdapterLinear, _: Any) -> None:
    """Prepare a layer again after load_state_dict(): it may derive tensors from the frozen weight."""
    with unsharded(layer):
        layer.prepare()


def adapted_linears(model: nn.Module) -> dict[str, AdapterLinear]:
    """Map dotted name -> layer, for every adapted linear of the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdapterLinear)}


def share(layers: Iterable[AdapterLinear]) -> None:
    """Let each shared tensor of these layers, in the model's order, stand once in its state_dict()."""
    seen: set[int] = set()
    for layer in layers:
        tensors = {key: id(getattr(layer, key)) for key in layer.shared}
        layer.borrowed = frozenset(key for key, place in tensors.items() if place in seen)
        seen |= set(tensors.values())


def trained_outside_linears(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters that no adapted linear has added, by their names."""
    added = {id(t) for layer in adapted_linears(model).values() for t in layer.own_tensors().values()}
    return {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in added}


def only_linears_change(model: nn.Module) -> bool:
    """Tell whether adapted linears are all that is trained: the rest of the model is its base."""
    return bool(adapted_linears(model)) and not trained_outside_linears(model)
