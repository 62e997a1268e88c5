"""Targets of an adapter: the weights of a model that it can change, each seen as a matrix (out, in).

A target is a view of a parameter, so all methods work on all of them. In training there are three forms:

    linear      nn.Linear, and transformers' Conv1D, whose weight is (in, out): an adapted linear replaces it
    embedding   nn.Embedding, the linear of a one-hot input, whose weight is (in, out): likewise replaced
    read        a parameter that its model reads, such as the experts of Mixtral (experts, out, in), each a
                target of its own, or a linear of torch's MultiheadAttention: the module stays, and code that
                reads the parameter gets the weight with its change, in the weight's dtype
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UserError
from .functional import without_autocast
from .sharding import is_sharded

LINEAR, EMBEDDING, READ = "linear", "embedding", "read"
ALL_LINEAR = "all-linear"
# the linears that the paper counts; RWKV-7 has no gate and no ffn.receptance
DEFAULT_TARGETS = ("receptance", "key", "value", "gate", "output")
HEADS = ("head", "lm_head", "score", "classifier")  # "all-linear" leaves these out, at the top of a model
Layers = int | str | list[int]  # the argument `layers` of inject()
HOLDER = "adapted"  # name of the child that holds the adapted layers of a module's read parameters
# modules that pass their weights to an operator in another order than (out, in), or as flat copies
OPAQUE = nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase, nn.EmbeddingBag, nn.Bilinear
# class of transformers -> its linears whose weights it passes to a kernel in training
READ_BY = {
    **dict.fromkeys(("MambaMixer", "FalconMambaMixer"), ("dt_proj", "x_proj", "out_proj")),
    "JambaMambaMixer": ("dt_proj",),
    **dict.fromkeys(
        ("Mamba2Mixer", "BambaMixer", "FalconH1Mixer", "GraniteMoeHybridMambaLayer", "NemotronHMamba2Mixer"),
        ("out_proj",),
    ),
    "Zamba2MambaMixer": ("out_proj",),
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
}


@dataclasses.dataclass(frozen=True)
class View:
    """Matrix (out, in) in a tensor of a model.

    key: the tensor's name. transposed: stored as (in, out). index: the matrix's place in a stack of matrices.
    lookup: rows of the tensor are looked up, as in an embedding.
    """

    key: str
    transposed: bool = False
    index: int | None = None
    lookup: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """Return the matrix, in the tensor's memory."""
        part = tensor if self.index is None else tensor[self.index]
        return part.mT if self.transposed else part

    def fits(self, tensor: Tensor) -> bool:
        """Tell whether a tensor's shape has room for this matrix."""
        return tensor.dim() == (2 if self.index is None else 3) and (self.index or 0) < len(tensor)

    def is_weight_of(self, name: str) -> bool:
        """Tell whether this view is the whole weight of the linear with this name."""
        return self == View(f"{name}.weight")


def views_of(metadata: Mapping[str, Any]) -> dict[str, View]:
    """Map linear -> its view, from an adapter's metadata. "views" has only those that are not NAME.weight."""
    views = metadata["views"]
    return {
        name: View(**views[name]) if name in views else View(f"{name}.weight") for name in metadata["linears"]
    }


@dataclasses.dataclass(frozen=True)
class Target:
    """Matrix that an adapter may change. name: its adapted layer's. owner: the module with the parameter."""

    name: str
    view: View
    owner: nn.Module
    form: str

    @property
    def weight(self) -> nn.Parameter:
        return self.owner._parameters[self.view.key.rpartition(".")[2]]

    @property
    def matrix(self) -> Tensor:
        return self.view.of(self.weight)

    @property
    def path(self) -> str:
        """Return the name that users give: the module's, or for form "read" the parameter's."""
        return self.view.key.removesuffix(".weight")


def all_targets(model: nn.Module) -> dict[str, Target]:
    """Map name -> target, for every matrix of a model."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found = []
    for name, module in modules.items():
        parent = modules[name.rpartition(".")[0]]
        form = _form(name.rpartition(".")[2], module, parent)
        prefix = f"{name}." if name else ""
        if form in (LINEAR, EMBEDDING):
            transposed = not isinstance(module, nn.Linear)
            view = View(f"{prefix}weight", transposed, lookup=form == EMBEDDING)
            found.append(Target(name, view, module, form))
            continue
        for leaf, p in module._parameters.items() if form == READ else ():
            held = f"{prefix}{HOLDER}.{leaf}"
            if p is not None and p.dim() == 2:
                found.append(Target(held, View(prefix + leaf), module, READ))
            elif p is not None and p.dim() == 3:
                transposed = getattr(module, "is_transposed", False) is True  # transformers' experts
                views = [View(prefix + leaf, transposed, index) for index in range(len(p))]
                found += [Target(f"{held}.{view.index}", view, module, READ) for view in views]
    return {target.name: target for target in found}


def _form(leaf: str, module: nn.Module, parent: nn.Module) -> str:
    """Return the form in which a module's weights are adapted; "": in none."""
    if isinstance(module, nn.Linear):
        read = isinstance(parent, nn.MultiheadAttention) or leaf in READ_BY.get(type(parent).__name__, ())
        return READ if read else LINEAR
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return LINEAR
    if isinstance(module, nn.Embedding):  # a subclass's forward may scale the rows, so its weight is read
        return EMBEDDING if type(module).forward is nn.Embedding.forward else READ
    return "" if isinstance(module, OPAQUE) else READ


def _matches(names: str | Iterable[str], target: Target) -> bool:
    """Tell whether a regular expression fits a module's name, or a list has an end of a target's name."""
    own = {target.name, target.path, target.view.key}
    if isinstance(names, str):  # a regular expression selects only linears and embeddings
        is_module = target.form != READ or isinstance(target.owner, (nn.Linear, nn.Embedding))
        return is_module and any(re.fullmatch(names, name) for name in own)
    return any(name == end or name.endswith(f".{end}") for end in names for name in own)


def _names(targets: Iterable[Target]) -> str:
    """List the last words of the linears' names, for a message."""
    return ", ".join(sorted({t.path.rpartition(".")[2] for t in targets if t.form == LINEAR})) or "none"


def _selected(what: str, names: str | list[str], targets: list[Target]) -> set[str]:
    """Return the names of the targets that `names` select. Raises UserError for a name that selects none."""
    chosen: set[str] = set()
    for part in [names] if isinstance(names, str) else names:
        try:
            found = {t.name for t in targets if _matches(names if part is names else [part], t)}
        except re.error as error:
            raise UserError(f"{what} {names!r} is no regular expression: {error}") from None
        if not found:
            advice = f"; for all layers whose name ends so give {what}=[{part!r}]" if part is names else ""
            raise UserError(
                f"{what.removesuffix('s')} {part!r} matches no linear layer; this model has:"
                f" {_names(targets)}{advice}"
            )
        chosen |= found
    return chosen


def _all_linear(model: nn.Module, targets: list[Target]) -> set[str]:
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None
    return {t.name for t in targets if t.form == LINEAR and t.owner is not head and t.name not in HEADS}


def layer_number(name: str) -> int | None:
    """Return the first number in a dotted name, the layer's number; None without a number."""
    found = re.search(r"(?<![^.])\d+(?![^.])", name)
    return int(found[0]) if found else None


def layer_numbers(layers: Layers, there: Iterable[int]) -> set[int]:
    """Select layers by a number, several numbers, or a text such as "last:6" or "0,4-7".

    `there`: the layers that exist. Raises UserError for any other layer, and for none.
    """
    has = sorted(set(there))
    if isinstance(layers, str):
        chosen = set().union(*(_part_of_layers(layers, part.strip(), has) for part in layers.split(",")))
    else:
        chosen = {layers} if isinstance(layers, int) else set(layers)
    if unknown := chosen - set(has):
        raise UserError(
            f"layers {layers!r}: there is no layer {min(unknown)} to adapt; there are"
            f" {layers_text(has) or 'none'}, counted from 0"
        )
    return chosen


def _part_of_layers(layers: str, part: str, has: list[int]) -> Iterable[int]:
    """Read "last:6", "first:6", "4-7" or "11"."""
    found = re.fullmatch(r"(first|last):(\d+)|(\d+)(?:-(\d+))?", part)
    end, count, low, high = found.groups() if found else (None, None, None, None)
    if end:
        if not 1 <= int(count) <= len(has):
            raise UserError(
                f"layers {layers!r}: expected {end}:1 to {end}:{len(has)}, as there are {len(has)} layers to"
                " adapt"
            )
        return has[: int(count)] if end == "first" else has[-int(count) :]
    if not found or int(high or low) < int(low):
        raise UserError(
            f"layers {layers!r}: expected last:K or first:K with K from 1 to {len(has)}, numbers such as"
            " 0,3,11 that count from 0, or ranges such as 4-7 with the smaller number first"
        )
    # a range beyond the last layer stops one past it, so that the caller refuses that number
    return range(int(low), min(int(high or low), max(int(low), *has, 0) + 1) + 1)


def layers_text(layers: Iterable[int]) -> str:
    """Write numbers of layers as --layers reads them: "0,4-7"."""
    runs: list[list[int]] = []
    for number in sorted(layers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def choose(
    model: nn.Module,
    targets: str | list[str],
    exclude: str | list[str] | None = None,
    layers: Layers | None = None,
) -> dict[str, Target]:
    """Map name -> target for the arguments of inject(). Raises UserError if they select none."""
    found = list(all_targets(model).values())
    chosen = _all_linear(model, found) if targets == ALL_LINEAR else _selected("targets", targets, found)
    chosen -= _selected("exclude", exclude, found) if exclude else set()
    if layers is not None:
        numbers = {t.name: layer_number(t.path) for t in found if t.name in chosen}
        wanted = layer_numbers(layers, (n for n in numbers.values() if n is not None))
        chosen = {name for name, number in numbers.items() if number in wanted}
    if not chosen:
        raise UserError(f"no linear layer to adapt: targets is empty; this model has: {_names(found)}")
    return {target.name: target for target in found if target.name in chosen}


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
        layer.__class__ = _with_form({EMBEDDING: EmbeddingForm, READ: ReadForm}[form], type(layer))


@functools.cache
def _with_form(form: type, cls: type) -> type:
    """Make a subclass of `form` and `cls`; a pickle of its modules records both classes."""
    names = {"__module__": cls.__module__, "plain_class": cls}
    names["__reduce__"] = lambda self: (_unmade, (form, cls), self.__dict__)
    return type(cls.__name__, (form, cls), names)


def _unmade(form: type, cls: type) -> nn.Module:  # pickles of modules record this name
    made = _with_form(form, cls)
    return made.__new__(made)


class Changed(threading.local):
    """Changed weights that a thread computed: id of the module whose forward runs -> its weights by name."""

    def __init__(self) -> None:
        self.of: dict[int, dict[str, Tensor]] = {}


_CHANGED = Changed()


class ReadsChanged:
    """Module whose parameters read as the weights with their changes; within a forward each is computed once.

    The parameters keep their names in state_dict().
    """

    def __getattr__(self, name: str) -> Any:
        held = self.__dict__.get("_modules", {}).get(HOLDER)
        return _changed(self, name) if held is not None and name in held else super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        before = _CHANGED.of.get(id(self))  # not None if a forward calls itself
        _CHANGED.of[id(self)] = {}
        try:
            return super().forward(*args, **kwargs)
        finally:
            if before is None:
                del _CHANGED.of[id(self)]
            else:
                _CHANGED.of[id(self)] = before


def _changed(owner: nn.Module, leaf: str) -> Tensor:
    """Compute a parameter with the changes of its layers."""
    cache = _CHANGED.of.get(id(owner), {})
    if leaf not in cache:
        stored, adapted = owner._parameters[leaf], owner._modules[HOLDER][leaf]
        if is_sharded(stored):  # FSDP2 must find its own parameter between two forwards
            return stored
        if not isinstance(adapted, nn.ModuleDict):
            cache[leaf] = adapted(stored)
        else:
            parts = list(stored.unbind())
            for index, layer in adapted.items():
                part = parts[int(index)]
                parts[int(index)] = layer(part.mT).mT if layer.view.transposed else layer(part)
            cache[leaf] = torch.stack(parts)
    return cache[leaf]


def put_read(target: Target, layer: nn.Module) -> None:
    """Let a parameter read as changed by a layer."""
    owner, leaf = target.owner, target.view.key.rpartition(".")[2]
    if not isinstance(owner, ReadsChanged):
        owner.__class__ = _with_form(ReadsChanged, type(owner))
        owner.add_module(HOLDER, nn.ModuleDict())
    place = owner._modules[HOLDER]._modules
    if target.view.index is None:
        place[leaf] = layer
    else:
        place.setdefault(leaf, nn.ModuleDict())[str(target.view.index)] = layer


def take_read(owner: nn.Module, view: View) -> None:
    """Undo put_read() of one layer."""
    leaf, held = view.key.rpartition(".")[2], owner._modules[HOLDER]._modules
    if view.index is not None:
        del held[leaf]._modules[str(view.index)]
    if view.index is None or not held[leaf]:
        del held[leaf]
    if not held:
        owner.__class__ = type(owner).plain_class
        del owner._modules[HOLDER]


@contextlib.contextmanager
def renewing(layers: Iterable[nn.Module]) -> Iterator[None]:
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
