"""Base class of every adapter method, and the registry of methods.

An adapted linear is still an `nn.Linear`. Its `weight` keeps its name, and the adapter only adds parameters
(`blocks.0.att.key.weight` stays, `blocks.0.att.key.miss` is new). A method is one file in `methods/`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import operator
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional
from .errors import UserError
from .quantised import dense, of_others, shape_of
from .sharding import is_sharded, unsharded
from .targets import READ, Target, View, put_read, take_form, take_read
from .wrappers import unwrapped

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


@dataclasses.dataclass(frozen=True)
class About:
    """A method's row in docs/methods.md, for a weight W of d outputs and k inputs, and rank r.

    title: the method's name in text. change: the change of W. numbers: the number of trained parameters.
    start: their first values. paper: the number at arXiv.
    """

    title: str = ""
    change: str = ""
    numbers: str = ""
    start: str = ""
    paper: str = ""


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """Settings of a method; subclasses add fields.

    `aliases` maps the names of neighbouring projects to fields.
    """

    aliases: ClassVar[dict[str, str]] = {}

    @classmethod
    def parse(cls, values: dict[str, Any]) -> NoOptions:
        """Read options from a dictionary. Raises UserError for an unknown key or a wrong value."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        default = cls()
        known: dict[str, Any] = {}
        for key, value in values.items():
            name = cls.aliases.get(key, key)
            if name not in fields:
                short = {field: alias for alias, field in cls.aliases.items() if len(alias) == 1}
                known_names = ", ".join(
                    f"{field} ({short[field]})" if field in short else field for field in sorted(fields)
                )
                raise UserError(
                    f"adapter option {key!r} is unknown; this method has: {known_names or 'no options'}"
                )
            if name in known:
                raise UserError(
                    f"adapter option {name} is given twice, by two of its names; drop one of them"
                )
            kind = type(getattr(default, name))
            if kind is dict:
                known[name] = _by_name(key, value, fields[name].metadata["of"])
            else:
                known[name] = _scalar(key, value, kind)
        return cls(**known)

    def at(self, name: str) -> NoOptions:
        """Return the options of one linear, by its dotted name."""
        return self


def _scalar(key: str, value: Any, kind: type) -> Any:
    """Convert an option's value to the type of its default; 0 and 1 stand for false and true."""
    if kind is bool:
        fits = isinstance(value, bool) or value in (0, 1)
    elif kind is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    else:
        fits = isinstance(value, kind) and not isinstance(value, bool)
    if not fits or isinstance(value, float) and not math.isfinite(value):
        expected = {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "a text")
        raise UserError(f"adapter option {key} must be {expected}, got {value!r}")
    return kind(value)


def _by_name(key: str, value: Any, of: str) -> dict[str, Any]:
    """Check a map from parts of names to numbers; `of` names them: "ranks", or positive factors."""
    kinds = (int,) if of == "ranks" else (int, float)
    if not isinstance(value, dict) or not all(
        type(number) in kinds and 0 < number < math.inf for number in value.values()
    ):
        raise UserError(
            f'adapter option {key} must be names with {of}, such as {{"ffn": 32, "blocks.0": 8}}, got'
            f" {value!r}"
        )
    return dict(value)


def option(default: Any, meaning: str) -> Any:
    """Make the field of an option; `meaning` is its row in docs/methods.md."""
    return dataclasses.field(default=default, metadata={"meaning": meaning})


def names_with(of: str, meaning: str = "") -> Any:
    """Make the field of an option that is a map from parts of names to ranks or factors; empty by default."""
    return dataclasses.field(default_factory=dict, metadata={"of": of, "meaning": meaning})


def most_specific(by_name: dict[str, Any], name: str, default: Any) -> Any:
    """Look a dotted name up in a map from parts of names: the longest part that is in the name counts.

    Examples of parts: "ffn", "att.key", "blocks.0".
    """
    found = [part for part in by_name if f".{part}." in f".{name}."]
    return by_name[max(found, key=len)] if found else default


def check_parts(what: str, by_name: dict[str, Any], names: Iterable[str]) -> None:
    """Raise UserError for a part of a name that is in none of `names`."""
    for part in by_name:
        if not any(f".{part}." in f".{name}." for name in names):
            raise UserError(
                f"{what} {part!r} is in no name; the names are such as {', '.join(list(names)[:3])}"
            )


@dataclasses.dataclass(frozen=True)
class Options(NoOptions):
    """The options of most methods; subclasses add fields.

    `rank_map` gives linears a rank of their own, by parts of their names: {"ffn": 32, "blocks.0.att": 8}; the
    longest part counts.
    """

    rank: int = 64
    rank_map: dict[str, int] = names_with("ranks")
    aliases: ClassVar[dict[str, str]] = {"r": "rank", "rank_pattern": "rank_map"}

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"rank {self.rank} must be at least 1")

    def at(self, name: str) -> Options:
        return self.with_rank(most_specific(self.rank_map, name, self.rank))

    def with_rank(self, rank: int, **others: Any) -> Options:
        """Copy the options for one linear of this rank; `others` are options that change with it."""
        return dataclasses.replace(self, rank=rank, rank_map={}, **others)


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
        if id(self) in _disabled_here():
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
        if id(self) in _disabled_here():  # a replica runs in a thread of its own
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

        tensors, options: the layer's in that file.
        """
        cls.of_file(weight, tensors, options).add_delta_to(weight)
        return weight

    @classmethod
    @torch.no_grad()
    def of_file(cls, weight: Tensor, tensors: dict[str, Tensor], options: Options) -> AdapterLinear:
        """Make the adapted layer of a base weight (out, in) fp32, which is not copied.

        tensors, options: the layer's in an adapter file.
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


@contextlib.contextmanager
def renewing(layers: Iterable[AdapterLinear]) -> Iterator[None]:
    """Let put_matrix() of these layers copy a weight that several have a part of, such as experts, once."""
    renewed = {}
    for layer in layers:
        layer.renewed = renewed
    try:
        yield
    finally:
        for layer in layers:
            layer.renewed = None


def take_off(model: nn.Module, names: Iterable[str]) -> None:
    """Put plain modules into the place of adapted layers."""
    for name in names:
        layer = model.get_submodule(name)
        if layer.owner is None:
            put_linears(model, {name: layer.plain()})
        else:
            take_read(layer.owner, layer.view)


def put_linears(model: nn.Module, linears: dict[str, nn.Linear]) -> None:
    """Replace the linears with these dotted names in a model."""
    for name, linear in linears.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, linear)


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


def trained_outside_linears(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters that no adapted linear has added, by their names."""
    added = {id(t) for layer in adapted_linears(model).values() for t in layer.own_tensors().values()}
    return {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in added}


def only_linears_change(model: nn.Module) -> bool:
    """Tell whether adapted linears are all that is trained: the rest of the model is its base."""
    return bool(adapted_linears(model)) and not trained_outside_linears(model)


def put_parameters(
    model: nn.Module, parameters: Mapping[str, nn.Parameter | None]
) -> dict[str, nn.Parameter | None]:
    """Replace parameters of a model by their names; returns the old ones. None stands for no parameter.

    A parameter with several names is replaced under all of them.
    """
    before, places = {}, {}
    for module in model.modules() if parameters else ():
        for leaf, p in module._parameters.items():
            places.setdefault(id(p), []).append((module, leaf))
    for name, p in parameters.items():
        owner, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner)
        before[name] = old = owner._parameters[leaf]
        if p is not None and old is not None and p.device != old.device:
            p = nn.Parameter(p.to(old.device), p.requires_grad)
        for module, key in [(owner, leaf)] if old is None else places[id(old)]:
            module._parameters[key] = p
    return before


class Disabled(threading.local):
    """Layers that are disabled in a thread: id of the layer -> number of the thread's disabled() blocks."""

    def __init__(self) -> None:
        self.layers: dict[int, int] = {}


_DISABLED, _KEY = Disabled(), "rwkv_miss.disabled"
_SWITCHING = threading.Lock()


def _disabled_here() -> dict[int, int]:
    # A GPU's backward, which may compute layers again, runs in a thread of torch. That thread sees the layers
    # that its caller has stashed. torch.compile can only follow the attribute.
    if not torch.compiler.is_compiling() and torch._C._is_key_in_tls(_KEY):
        return torch._C._get_obj_in_tls(_KEY)
    return _DISABLED.layers


def _switch(layers: list[AdapterLinear], here: dict[int, int], by: int) -> None:
    """Begin (by=1) or end (by=-1) a block of disabled(). Outside of blocks a layer has its usual forward."""
    for layer in layers:
        here[id(layer)] = here.get(id(layer), 0) + by
        if not here[id(layer)]:
            del here[id(layer)]
        layer.blocks += by
        if by == layer.blocks == 1:
            layer.outside = layer.__dict__.get("forward")
            layer.forward = layer.forward_here
        elif not layer.blocks:
            layer.__dict__.pop("forward", None)
            if layer.outside is not None:
                layer.forward = layer.outside


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Turn the adapters off inside the block: adapted linears compute as in the base.

    That holds in this thread, in a backward that it calls, and in DataParallel's replicas; for other threads
    nothing changes. The tensors that inject(train_parts=...) trains as a whole have their first values
    inside, in all threads. Raises UserError where other parameters are trained, because their first values
    are not in the model; also for a merged model, and for whole tensors that are sharded.
    """
    model = unwrapped(model)
    injection, layers = getattr(model, "injection", None), list(adapted_linears(model).values())
    first = injection.first if injection else {}
    trained = trained_outside_linears(model)
    if not layers and not first or trained.keys() - first.keys():
        raise UserError(
            "disabled() gives back the base of adapted linears and of train_parts only; this model "
            + (f"trains {min(trained.keys() - first.keys())}, too" if layers or first else "has none")
        )
    if injection and injection.kept is not None:
        raise UserError("the adapter is merged into the model; call rwkv_miss.unmerge(model) first")
    if any(map(is_sharded, trained.values())):
        raise UserError(f"{min(trained)} is sharded, and its first value is not; load the base a second time")
    here = _disabled_here()  # looked up once, because another thread may end the block
    torch._C._stash_obj_in_tls(_KEY, here)
    with _SWITCHING:
        if first and not injection.blocks:
            injection.replaced = put_parameters(model, first)
        if first:
            injection.blocks += 1
        _switch(layers, here, 1)
    try:
        yield
    finally:
        with _SWITCHING:
            _switch(layers, here, -1)
            if first:
                injection.blocks -= 1
            if first and not injection.blocks:
                replaced, injection.replaced = injection.replaced, {}
                put_parameters(model, replaced)
