"""Choose linears by name, replace them by adapted ones, freeze the rest; save and load what was trained."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import (
    METHODS,
    AdapterLinear,
    AdapterMethod,
    NoOptions,
    adapted_linears,
    put_parameters,
    renewing,
    share,
    take_off,
    trained_outside_linears,
)
from .errors import UserError, listed
from .files.checkpoint import Arch, check_finite, refuse_run_checkpoint, write_checkpoint
from .files.file_kinds import may_replace
from .files.model_files import read_model
from .files.untrusted import check_sums
from .methods.token_rows import LAYERS, TokenOptions, TokenRows, layers_of_rows
from .methods.whole_tensors import PARTS, add_states, in_parts, split_parts, state_names, train_whole
from .progress import print_notes
from .quantised import dense, is_of_others, shape_of, undo_first_forward
from .sharding import gathered, is_first, is_sharded, local, put, require_whole, reshard, unsharded
from .targets import (
    READ,
    Layers,
    Target,
    View,
    all_targets,
    choose,
    layer_number,
    layer_numbers,
    views_of,
)
from .wrappers import unwrapped

ADAPTER_FORMAT = "rwkv-miss adapter"

# the linears that the paper counts; RWKV-7 has no gate and no ffn.receptance
DEFAULT_TARGETS = ("receptance", "key", "value", "gate", "output")
# attributes in which torch keeps a module's hooks
HOOKS = """
    _forward_hooks _forward_pre_hooks _backward_hooks _backward_pre_hooks _state_dict_hooks
    _state_dict_pre_hooks _load_state_dict_pre_hooks _load_state_dict_post_hooks
""".split()


@dataclasses.dataclass
class Injection:
    """Result of inject(). It is kept as `model.injection` and written into the adapter file."""

    method: str
    options: dict[str, Any]
    targets: list[str]
    linears: list[str]
    trainable: int
    total: int
    train_parts: list[str] = dataclasses.field(default_factory=list)
    whole: int = 0
    merged_linears: list[str] = dataclasses.field(default_factory=list)  # stored as whole tensors in the file
    layers: list[int] | None = None  # the adapted layers; None: all
    tokens: list[int] = dataclasses.field(default_factory=list)  # ids with trained rows of emb and head
    # a model's own buffers, such as BatchNorm's averages, as they were before the training
    statistics: dict[str, Tensor] = dataclasses.field(default_factory=dict, repr=False)
    # whole tensors as they were before the training; None: the model had none of this name
    first: dict[str, nn.Parameter | None] = dataclasses.field(default_factory=dict, repr=False)
    trained_before: list[str] = dataclasses.field(default_factory=list, repr=False)
    # name of a tensor trained as a whole -> its dtype in the base, or in the model if the base lacks it
    dtypes: dict[str, torch.dtype] = dataclasses.field(default_factory=dict, repr=False)
    half_merged: bool = False  # merge(keep_base=False) has failed in the middle
    # base tensors that unmerge() puts back, by name, whole tensors as parameters; None: not merged
    kept: dict[str, Any] | None = dataclasses.field(default=None, repr=False)
    # inside disabled(): how many blocks are open, and the whole tensors that the last one puts back
    blocks: int = dataclasses.field(default=0, repr=False)
    replaced: dict[str, nn.Parameter | None] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def rows(self) -> list[str]:
        """Name the layers of which only rows of tokens are trained."""
        return layers_of_rows(self.tokens, self.train_parts)

    def also_trained(self) -> list[str]:
        """Describe the trained rows of tokens and whole parts, in addition to the method's linears."""
        rows = [f"{len(self.tokens)} rows of {' and '.join(self.rows)}"] if self.rows else []
        return rows + [part for part in self.train_parts if part not in self.rows]

    def line(self) -> str:
        """Describe linears, whole tensors, trainable parameters and their share of the base in one line."""
        share = 100 * self.trainable / self.total
        linears, also = len(self.linears) - len(self.rows), self.also_trained()
        parts = [f"{linears} linears"] if linears else []
        parts += [also.pop(0)] if self.rows else []
        parts += [f"{self.whole} whole tensors ({', '.join(also)})"] if self.whole else []
        changed = f"{' and '.join(parts)}, " if parts else ""
        return f"{changed}{self.trainable:,} trainable of {_short(self.total)} ({share:.2g} %)"


def _short(count: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:,}"


def find_targets(
    model: nn.Module,
    targets: str | list[str] | None,
    exclude: str | list[str] | None = None,
    layers: Layers | None = None,
) -> dict[str, Target]:
    """Map name -> target for the arguments of inject().

    Raises UserError, with the names that exist, for targets None with a model that is no RWKV, for names that
    match nothing, and for a linear whose change would have no effect, or a different effect once merged.
    """
    if targets is None:
        # key and value alone would match some linears of many models and silently miss the others
        names = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        if not any(name.endswith("receptance") for name in names):
            raise UserError(
                f"without targets RWKV's linears are adapted ({', '.join(DEFAULT_TARGETS)}), and this is no"
                f" RWKV model; name some of its linear layers: {', '.join(sorted(names)) or 'it has none'}"
            )
        targets = [name for name in DEFAULT_TARGETS if name in names]
    chosen = choose(model, targets, exclude, layers)
    _refuse_unfit(model, chosen)
    return chosen


def _refuse_unfit(model: nn.Module, targets: dict[str, Target]) -> None:
    """Raise UserError for a target whose change would have no effect, or a different effect once merged."""
    modules = dict(model.named_modules(remove_duplicate=False))
    places: dict[int, list[str]] = {}
    for name, module in modules.items():
        places.setdefault(id(module), []).append(name)
    for module in modules.values():  # also linears without an adapter: a state_dict() would spoil them
        if isinstance(module, nn.Linear):
            undo_first_forward(module)
    memory = _SharedMemory(model)
    for name, target in sorted(targets.items()):
        module, key = target.owner, target.view.key
        if len(places[id(module)]) > 1:
            first, second = places[id(module)][:2]
            raise UserError(
                f"{first} and {second} are one layer under two names; give each a layer of its own "
                "(copy.deepcopy), or drop the target"
            )
        held = _held_by_others(getattr(module, key.rpartition(".")[2]))
        if held:
            raise UserError(f"{key} is {held}")
        what = "" if target.form == READ else _more_than_plain(module)
        if what:
            raise UserError(
                f"{name} is no plain nn.{target.form.title()}: {what}, which an adapter in its place would"
                " drop; put a plain one there, or drop the target"
            )
        weight = target.weight
        if target.form == READ and not weight.is_floating_point():
            raise UserError(f"{key} is {weight.dtype}, no floating-point matrix; drop the target")
        others = memory.overlapping(key, weight)
        if others:
            raise UserError(
                f"{target.path} has the same weight as {others[0]}, which a merge would change as well; untie"
                " them or drop the target"
            )
        parent = modules.get(name.rpartition(".")[0])
        if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
            raise UserError(
                f"{name} belongs to torch's TransformerEncoderLayer, which in eval reads its weight and does"
                " not call it: the adapter would do nothing there. Call"
                " torch.backends.mha.set_fastpath_enabled(False) first, here and wherever the adapter is"
                " used"
            )


def _held_by_others(weight: Tensor) -> str:
    """Describe a weight of another package that can't be expanded to plain numbers; "" for other weights."""
    kind = type(weight)
    if not is_of_others(weight):
        return ""
    package = kind.__module__.partition(".")[0]
    if package == "bitsandbytes" and weight.is_floating_point():
        why = "is not quantised yet: move the model to its device first"
    else:
        why = "can't be expanded to a matrix here"
        with contextlib.suppress(RuntimeError, NotImplementedError, AttributeError, AssertionError):
            if dense(weight, 0, torch.float32).shape == shape_of(weight):
                return ""
    return (
        f"quantised by {package} ({kind.__name__}), and {why}. Else load the model without that, inject(),"
        " and quantise the adapted linears with rwkv_miss.quantised.quantise_"
    )


def _more_than_plain(module: nn.Module) -> str:
    """Describe what a linear or an embedding does or has beyond its product and bias; "" if that is all."""
    children, own = [name for name, _ in module.named_children()], {"weight", "bias"}
    tensors = [name for name in (*module._parameters, *module._buffers) if name not in own]
    kind, quantised = type(module), is_of_others(module.weight)
    # bitsandbytes' linears have a forward of their own, and a hook for state_dicts
    hooks = any(getattr(module, name, None) for name in HOOKS if not (quantised and "load" in name))
    plain = quantised or getattr(kind, "is_linear", False) or kind.__name__ == "Conv1D"
    own_forward = kind.forward not in (nn.Linear.forward, nn.Embedding.forward) and not plain
    found = {
        f"it has modules of its own ({', '.join(children)}), as a parametrization has": children,
        f"it has tensors of its own ({', '.join(tensors)}), as weight_norm has": tensors,
        "hooks are registered on it": hooks,
        f"{kind.__name__} has a forward of its own": own_forward or "forward" in vars(module),
        "it has a max_norm, which changes its weight": getattr(module, "max_norm", None) is not None,
    }
    return next((what for what, holds in found.items() if holds), "")


class _SharedMemory:
    """Parameters and buffers of a model by their memory, under all names: tied tensors and views share it."""

    def __init__(self, model: nn.Module):
        self.tensors: dict[int, list[tuple[str, Tensor]]] = {}
        for name, tensor in (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ):
            self.tensors.setdefault(self._storage(local(tensor)), []).append((name, local(tensor)))

    @staticmethod
    def _storage(tensor: Tensor) -> int:
        # a key that all views share, also on the meta device, where tensors have no address
        return tensor.untyped_storage()._cdata

    @staticmethod
    def _range(tensor: Tensor) -> tuple[int, int]:
        """Return the places of a tensor's first byte in its storage, and of the byte after its last."""
        first = tensor.storage_offset() * tensor.itemsize
        if not tensor.numel():
            return first, first
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
        return first, first + (last + 1) * tensor.itemsize

    def overlapping(self, name: str, tensor: Tensor) -> list[str]:
        """Return the other names of tensors whose memory overlaps this one's."""
        tensor, found = local(tensor), []
        first, end = self._range(tensor)
        for other, t in self.tensors[self._storage(tensor)]:
            others_first, others_end = self._range(t)
            if other != name and others_first < end and first < others_end:
                found.append(other)
        return found


def inject(
    model: nn.Module,
    method: str = "miss",
    targets: str | list[str] | None = None,
    train_parts: str = "",
    earlier: Mapping[str, Tensor] | None = None,
    exclude: str | list[str] | None = None,
    layers: Layers | None = None,
    keep_first: bool = True,
    tokens: Sequence[int] = (),
    **options: Any,
) -> Injection:
    """Freeze the model and add a method's trainable parameters, in place: `inject(model, "miss", rank=64)`.

    targets: a list of names, or their ends: `["q_proj"]` is every q_proj. Names are those of linears, of
    embeddings, and of parameters with 2 or 3 axes, such as `gate_up_proj` of Mixtral's experts. A text is a
    regular expression for whole names of modules, or "all-linear": every linear but the head. None: RWKV's.

    exclude: names of targets to leave out, in the same forms.

    layers: a number, several, or a text: `"last:6"`, `"first:6"`, `"4-7"` or `"0,3,11"`. Only names whose
    first number is one of them are adapted, as in `model.layers.3.mlp.up_proj`. Initial states and
    train_parts are trained in these layers only.

    train_parts: parts such as "ln,time" (methods/whole_tensors.py), whose tensors are trained as a whole,
    each as an fp32 parameter. To train something else, such as a classifier, call
    `model.classifier.requires_grad_(True)` afterwards; it is saved as well.

    earlier: the tensors of a run that is resumed, by their names in the model. A method that changes weights
    (PiSSA) then makes the same weights as at that run's start.

    tokens: ids of tokens. Parts emb and head then are no whole tensors: only the rows of these tokens are
    trained (methods/token_rows.py).

    keep_first: keep the first values of whole tensors for disabled() and unload(). False saves that memory.

    Raises UserError for an unknown method, option, target or part, and for a rank that does not fit a layer.
    """
    if "target_modules" in options:
        raise UserError("target_modules is peft's word; here the linears are inject(..., targets=[...])")
    initialise = functools.partial(_start_layers, earlier=earlier)
    find = functools.partial(find_targets, targets=targets, exclude=exclude, layers=layers)
    given = {"targets": targets, "exclude": exclude}
    if (
        any(value is not None for value in given.values())
        and not METHODS.get(method, AdapterLinear).adapts_linears
    ):
        name, value = next((name, value) for name, value in given.items() if value is not None)
        value = value if isinstance(value, str) else ", ".join(value)
        raise UserError(f"method {method} adapts no linear layers; drop the {name} ({value})")
    model = unwrapped(model, to_inject=True)
    injection = _attach(model, method, find, train_parts, options, initialise, layers, tokens)
    if injection.linears:
        injection.targets = [targets] if isinstance(targets, str) else list(targets or DEFAULT_TARGETS)
    _keep_first(model, keep_first)
    return injection


@torch.no_grad()
def _keep_first(model: nn.Module, keep: bool) -> None:
    """Copy whole tensors that share memory with their first values. Without `keep` forget those values."""
    if not keep:
        model.injection.first.clear()
    for name, p in model.named_parameters() if model.injection.first else ():
        first = model.injection.first.get(name)
        if first is not None and first.untyped_storage()._cdata == p.untyped_storage()._cdata:
            p.data = p.data.clone()


@torch.no_grad()
def _start_layers(model: nn.Module, earlier: Mapping[str, Tensor] | None) -> None:
    """Give new adapted linears the values that follow from their weights, and the constants of `earlier`."""
    # a weight on the meta device has no values to start from
    layers = {name: layer for name, layer in adapted_linears(model).items() if not layer.stored.is_meta}
    for name, layer in layers.items():
        for key in () if earlier is None else layer.constants:
            constant, value = getattr(layer, key), earlier.get(f"{name}.{key}")
            if value is None or value.shape != constant.shape:
                raise UserError(
                    f"the training that goes on has no {name}.{key} of {tuple(constant.shape)}; it is one of"
                    " another base or rank"
                )
            constant.copy_(value)
        try:
            layer.start()
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    with renewing(layers.values()):
        for layer in layers.values():
            layer.prepare()


def _attach(
    model: nn.Module,
    method: str,
    find: Callable[[nn.Module], dict[str, Target]],
    train_parts: str,
    options: dict[str, Any],
    initialise: Callable[[nn.Module], None] | None = None,
    layers: Layers | None = None,
    tokens: Sequence[int] = (),
) -> Injection:
    """Adapt the model and set its first values; after a UserError the model is as before."""
    if method not in METHODS:
        raise UserError(f"method {method!r} is unknown; there are: {', '.join(sorted(METHODS))}")
    if adapted_linears(model):
        raise UserError(
            "the model already carries an adapter; merge it first (rwkv_miss.merge and unload), or start from"
            " the base"
        )
    cls = METHODS[method]
    parsed = cls.Options.parse(options)
    targets = find(model) if cls.adapts_linears else {}
    parts = split_parts(train_parts)
    if method in parts:
        raise UserError(f"method {method} trains part {method} already; drop it from the parts")
    within = None
    if layers is not None:
        places = [target.path for target in targets.values()] or state_names(model)
        within = layer_numbers(layers, {layer_number(place) for place in places} - {None})
    whole = _whole_names(model, parts, targets, within)
    rows = _row_targets(model, parts) if tokens else {}
    whole = [name for name in whole if name.removesuffix(".weight") not in rows]
    total = sum(p.numel() for p in model.parameters())
    statistics = {name: tensor.clone() for name, tensor in _statistics(model).items()}
    before = dict(model.named_parameters())
    trained_before = [name for name, p in before.items() if p.requires_grad]
    attached = [(cls, targets, parsed)]
    if rows:
        attached.append((TokenRows, rows, TokenOptions(tuple(sorted({*tokens})))))
    _adapt(model, attached, initialise)
    targets = {**targets, **rows}
    for name in [] if cls.adapts_linears or within is None else state_names(model):
        model.get_parameter(name).requires_grad_(layer_number(name) in within)
    if "state" in parts:
        add_states(model)
    for name in whole:
        train_whole(model, name)
    for name, layer in adapted_linears(model).items():
        if layer.owner is None:
            layer.keep(targets[name].owner)
    model.injection = Injection(
        method,
        dataclasses.asdict(parsed),
        [],
        list(targets),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        total,
        parts,
        len(whole),
        statistics=statistics,
        first={name: before.get(name) for name in trained_outside_linears(model)},
        dtypes={name: before.get(name, p).dtype for name, p in trained_outside_linears(model).items()},
        trained_before=trained_before,
        layers=None if within is None else sorted(within),
        tokens=sorted({*tokens}) if rows else [],
    )
    return model.injection


def _whole_names(
    model: nn.Module, parts: list[str], targets: Mapping[str, Target], within: set[int] | None
) -> list[str]:
    """Name the tensors of these parts; `within`: leave out those of all other layers.

    Raises UserError for a tensor of an adapted linear, and for the embedding, which is below all layers.
    """
    names = dict.fromkeys([name for name, _ in model.named_parameters()] + state_names(model))
    whole = in_parts(names, parts)
    if within is not None:
        if "emb" in parts and 0 not in within:
            raise UserError(
                f"part 'emb' lies below layer {min(within)}, the lowest of `layers`, and nothing is trained"
                " there; drop the part, or add layer 0"
            )
        whole = [name for name in whole if layer_number(name) in {None, *within}]
    adapted = {target.view.key for target in targets.values()}
    for name in whole:
        if name.rpartition(".")[0] in targets or name in adapted:
            raise UserError(
                f"{name} can't be trained as a whole and be adapted as well; drop it from the targets or from"
                " the parts"
            )
    return whole


def _row_targets(model: nn.Module, parts: list[str]) -> dict[str, Target]:
    """Map name -> target, for the layers whose rows of tokens are trained."""
    there = all_targets(model)
    found = {part: there[part] for part in parts if part in LAYERS}
    if not found:
        raise UserError(
            "tokens are given, and the parts have neither emb nor head; add one, or drop the tokens"
        )
    _refuse_unfit(model, found)
    return found


def _adapt(
    model: nn.Module,
    attached: list[tuple[type[AdapterMethod], dict[str, Target], NoOptions]],
    initialise: Callable[[nn.Module], None] | None,
) -> None:
    """Freeze the model and attach each method to its targets; after a UserError the model is as before."""
    trained_before = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(False)
    try:
        for cls, targets, options in attached:
            cls.attach(model, targets, options)
        if initialise:
            initialise(model)
    except UserError:
        owners = {name: target.owner for _, targets, _ in attached for name, target in targets.items()}
        for name, layer in (layers := adapted_linears(model)).items():
            if layer.owner is None:
                layer.keep(owners[name])
        take_off(model, layers)
        for p, flag in trained_before.items():
            p.requires_grad_(flag)
        raise


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of an adapter file: what the method added, and every other trained parameter.

    Tensors that linears share are `shared.NAME`.
    """
    tensors: dict[str, Tensor] = {}
    own: set[int] = set()
    for name, layer in adapted_linears(model).items():
        for key, tensor in layer.own_tensors().items():
            tensors[_name_in_file(layer, name, key)] = tensor
            own.add(id(tensor))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in own}
    # as in released files, the initial states of all layers are in a file, also those that are not trained
    if any(name.endswith(".time_state") for name in trained):
        trained |= {name: model.get_parameter(name) for name in state_names(model)}
    return {**tensors, **trained}


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that training may move without a gradient, such as BatchNorm's means and variances.

    BatchNorm's count of batches, an integer, is left out: outputs do not depend on it.
    """
    adapters = {
        id(tensor) for layer in adapted_linears(model).values() for tensor in layer.buffers(recurse=False)
    }
    kept = model.state_dict().keys()
    return {
        name: t.detach()
        for name, t in model.named_buffers()
        if name in kept and t.is_floating_point() and id(t) not in adapters
    }


def _moved_statistics(model: nn.Module) -> dict[str, Tensor]:
    before = model.injection.statistics
    return {
        name: t
        for name, t in _statistics(model).items()
        if name in before and not torch.equal(t.to(before[name]), before[name])
    }


@contextlib.contextmanager
def _trained(model: nn.Module) -> Iterator[None]:
    """Put the trained tensors that merge() has replaced back inside the block."""
    kept = model.injection.kept or {}
    whole = {name: value for name, value in kept.items() if isinstance(value, nn.Parameter)}
    linears = {  # adapted linears whose own weight is trained, too
        name: p for name, p in model.named_parameters() if p.requires_grad and name in kept.keys() - whole
    }
    if lost := next((name for name in linears if kept[name] is None), ""):
        raise UserError(
            f"{lost} is trained as well as its adapter, and merge(keep_base=False) did not keep it; save the"
            " adapter before such a merge"
        )
    merged, values = put_parameters(model, whole), {name: p.data for name, p in linears.items()}
    for name, p in linears.items():
        p.data = kept[name].to(p.device)
    try:
        yield
    finally:
        put_parameters(model, merged)
        for name, p in linears.items():
            p.data = values[name]


@torch.no_grad()
def _file_content(model: nn.Module) -> tuple[dict[str, Tensor], list[str], dict[str, str]]:
    """Return (tensors of an adapter file, linears with an adapter there, other names of tied tensors).

    A linear whose own weight is trained, too, is in the file as a whole tensor, weight plus change. Tensors
    that share memory with a trained one have changed with it, and are in the file as well.
    """
    tensors, linears = adapter_tensors(model), list(model.injection.linears)
    tied: dict[str, str] = {}
    memory = _SharedMemory(model)
    everything = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for name in [name for name in tensors if name in everything]:
        for other in memory.overlapping(name, everything[name]):
            if _place(everything[other]) == _place(everything[name]):
                tied[other] = name
            else:
                tensors[other] = everything[other]
    layers = adapted_linears(model)
    merged = {name: layer for name, layer in layers.items() if layer.stored.requires_grad}
    needed: set[str] = set()  # tensors of the linears that keep their adapter
    for name, layer in layers.items():
        if name not in merged:
            needed |= {_name_in_file(layer, name, key) for key in layer.own_tensors()}
    for name, layer in merged.items():
        for key in {_name_in_file(layer, name, key) for key in layer.own_tensors()} - needed:
            tensors.pop(key, None)  # a shared tensor may have been popped with an earlier linear
        with unsharded(layer):
            key, value = layer.key(name), layer.base_weight() + layer.delta()
            if layer.view is None:
                tensors[key] = value
            else:
                tensors[key] = tensors[key].detach().to(value.dtype, copy=True)
                layer.view.of(tensors[key]).copy_(value)
        linears.remove(name)
    return {**tensors, **_moved_statistics(model)}, linears, tied


def _place(tensor: Tensor) -> tuple:
    tensor = local(tensor)
    return tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def _name_in_file(layer: AdapterLinear, name: str, key: str) -> str:
    shared = layer.shared_names(layer.out_features, layer.in_features)
    return f"shared.{shared[key]}" if key in shared else f"{name}.{key}"


def by_owner(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Map name of a module -> its tensors, by their names in the module."""
    owned: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        owner, _, leaf = key.rpartition(".")
        owned.setdefault(owner, {})[leaf] = tensor
    return owned


def layer_tensors(
    cls: type[AdapterLinear], name: str, shape: tuple[int, int], owned: dict[str, dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Select one adapted linear's tensors from an adapter file, by their names in the layer; shape (out, in).

    Shared tensors are included. owned: by_owner() of the file's tensors.
    """
    own = {leaf: tensor for leaf, tensor in owned.get(name, {}).items() if leaf != "bias"}
    for key, of in cls.shared_names(*shape).items():
        owner, _, leaf = f"shared.{of}".rpartition(".")
        tensor = owned.get(owner, {}).get(leaf)
        if tensor is None:
            raise UserError(
                f"the adapter has no shared.{of}, which a linear of {shape[1]} inputs and {shape[0]} outputs"
                " needs"
            )
        if not tensor.is_floating_point():
            raise UserError(f"shared.{of} is {tensor.dtype}; expected are fp32, bf16 or fp16")
        own[key] = tensor
    return own


def injected(model: nn.Module) -> nn.Module:
    """Return the model inside its wrappers. Raises UserError if it carries no adapter."""
    model = unwrapped(model)
    if not hasattr(model, "injection"):
        inside = next((name for name, part in model.named_modules() if hasattr(part, "injection")), "")
        advice = f"its module {inside} does: give model.{inside}" if inside else "call inject() first"
        raise UserError(f"this {type(model).__name__} carries no adapter; {advice}")
    return model


def save_adapter(model: nn.Module, path: str | os.PathLike[str], **metadata: Any) -> None:
    """Write the trained tensors and the metadata that load and merge need, whole or not at all.

    If the model is sharded over processes, all of them must call this; the first one writes.

    model: may be wrapped by torch.compile, DistributedDataParallel, DataParallel or DeepSpeed.
    metadata: keywords such as step and tokenizer, which are added. Raises UserError for a keyword that names
    a fact of the adapter, and if `path` is a model, which would be overwritten.
    """
    model = injected(model)
    injection: Injection = model.injection
    may_replace(path, ADAPTER_FORMAT)
    require_whole(model)
    reshard(model)
    arch = getattr(model, "arch", None)  # in another project's model `arch` may be anything
    with _trained(model):
        tensors, linears, tied = _file_content(model)
    views = {
        name: dataclasses.asdict(layer.view) for name, layer in adapted_linears(model).items() if layer.view
    }
    described = {
        "format": ADAPTER_FORMAT,
        # an older version of this package would merge views, or rows of tokens, wrongly
        "format_version": 3 if injection.tokens else 2 if views else 1,
        "views": views,
        "method": injection.method,
        "options": injection.options,
        "layout": injection.options.get("layout"),
        "linears": linears,
        "merged_linears": (
            injection.merged_linears + [name for name in injection.linears if name not in linears]
        ),
        "tied": tied,
        "targets": injection.targets,
        "train_parts": injection.train_parts,
        "layers": injection.layers,
        "tokens": injection.tokens,
        "trainable": injection.trainable,
        "arch": arch.to_dict() if isinstance(arch, Arch) else None,
        "base": getattr(model, "base_name", None),
        "base_fingerprint": getattr(model, "base_fingerprint", None),
    }
    if reserved := sorted(described.keys() & metadata.keys()):
        raise UserError(
            f"save_adapter(..., {reserved[0]}=...) would overwrite what the file says about the adapter; name"
            " your field otherwise"
        )
    described["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
    described |= metadata
    if not any(map(is_sharded, model.parameters())):
        write_checkpoint(path, ((k, t.detach().cpu()) for k, t in tensors.items()), described)
        return
    tensors = {name: gathered(tensor.detach()).cpu() for name, tensor in tensors.items()}
    try:
        if is_first():
            write_checkpoint(path, tensors.items(), described)
    finally:
        torch.distributed.barrier()  # no process goes on before the file exists


def read_described(
    path: str | os.PathLike[str], shown: bool = True, any_folder: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and metadata of any model or adapter file, or of a model's folder; {} without metadata.

    shown: say on stderr which wrapping of a trainer was taken off. any_folder: see read_model().

    A file with initial states alone, as other projects release them, is read as an adapter of the method
    "state" without a known base.
    """
    tensors, metadata, notes, _ = read_model(path, any_folder)
    if shown:
        print_notes(notes)
    if metadata is None and tensors and all(re.fullmatch(PARTS["state"], name) for name in tensors):
        metadata = {"format": ADAPTER_FORMAT, "method": "state", "options": {}, "linears": [], **DEFAULTS}
    return tensors, metadata or {}


# the fields of an adapter file's metadata, and their types
FIELDS = {
    "method": str,
    "options": dict,
    "linears": list,
    "targets": list,
    "train_parts": list,
    "layers": list,
    "tokens": list,
    "merged_linears": list,
    "tied": dict,
    "views": dict,
    "arch": dict,
    "base": str,
    "base_fingerprint": str,
    "versions": dict,
    "tokenizer": str,
    "eod": str,
    "template": str,
    "bos": list,
}
# type of the items of a list; other lists hold names of tensors
ITEMS = {"bos": int, "layers": int, "tokens": int}
REQUIRED = ("method", "options", "linears")
# the value of a field that a file leaves out; `tied`: another name of a whole tensor -> its name in the file
DEFAULTS = {
    "targets": [],
    "train_parts": [],
    "layers": None,
    "tokens": [],
    "merged_linears": [],
    "tied": {},
    "views": {},
    "arch": None,
    "base": None,
    "base_fingerprint": None,
    "versions": {},
}


def checked_metadata(path: str | os.PathLike[str], metadata: dict[str, Any]) -> dict[str, Any]:
    """Check and complete an adapter file's metadata. Raises UserError for a missing or wrong field."""
    version = metadata.get("format_version", 1)
    if version not in (1, 2, 3):
        raise UserError(f"{path} has format_version {version!r}, this package reads 1 to 3; update it")
    for name, kind in FIELDS.items():
        value = metadata.get(name)
        item_kind = ITEMS.get(name, str)
        sound = isinstance(value, kind) and (
            kind is not list or all(type(item) is item_kind for item in value)
        )
        if not sound and (value is not None or name in REQUIRED):
            listed = "a list of names" if item_kind is str else "a list of numbers"
            wanted = listed if kind is list else kind.__name__
            raise UserError(f"{path} is damaged: its {name} is {str(value)[:60]!r}, expected {wanted}")
    tokens = metadata.get("tokens") or []
    if tokens != sorted({*tokens}) or min(tokens, default=0) < 0:
        raise UserError(
            f"{path} is damaged: its tokens are {str(tokens)[:60]}, expected ids of 0 or more, each once, in"
            " their order"
        )
    for name, view in (metadata.get("views") or {}).items():
        kinds = {"key": (str,), "transposed": (bool,), "index": (int, type(None)), "lookup": (bool,)}
        if not (
            isinstance(view, dict)
            and view.keys() == kinds.keys()
            and all(type(view[k]) in kinds[k] for k in kinds)
            and (view["index"] or 0) >= 0
        ):
            raise UserError(
                f"{path} is damaged: the view of {name} is {str(view)[:60]!r}, expected key, transposed,"
                " lookup, and an index of 0 or more, or none"
            )
    places: dict[tuple, str] = {}
    for name, view in views_of({**metadata, "views": metadata.get("views") or {}}).items():
        other = places.setdefault((view.key, view.index), name)
        if other != name:
            raise UserError(
                f"{path} is damaged: {other} and {name} are the same matrix of {view.key}, expected one"
                " linear for each"
            )
    for other, name in (metadata.get("tied") or {}).items():
        if not isinstance(name, str):
            raise UserError(
                f"{path} is damaged: {other} is tied to {str(name)[:60]!r}, expected the name of a tensor"
            )
    return {
        **DEFAULTS,
        **{name: value for name, value in metadata.items() if value is not None or name not in DEFAULTS},
    }


def read_adapter(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and metadata of an adapter file. Raises UserError for any other file."""
    if os.path.isdir(path):
        is_peft = os.path.exists(os.path.join(path, "adapter_config.json"))
        raise UserError(
            f"{path} is a folder of peft, and an adapter's file is expected; make one: python -m rwkv_miss"
            f" convert {path} OUT.pth --to native"
            if is_peft
            else f"{path} is a folder, and an adapter's file is expected; a model's folder is a base"
        )
    tensors, metadata = read_described(path)
    refuse_run_checkpoint(path, metadata)
    if metadata.get("format") != ADAPTER_FORMAT:
        raise UserError(
            f"{path} is not an adapter file: it has no adapter metadata. It may be a base or a merged model,"
            " or another project's adapter, of which python -m rwkv_miss convert makes one"
        )
    metadata = checked_metadata(path, metadata)
    if metadata["method"] not in METHODS:
        raise UserError(
            f"{path} was made with method {metadata['method']!r}; there are: {', '.join(sorted(METHODS))}"
        )
    check_sums(path)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.itemsize == 1:
            raise UserError(f"{path}: {name} is {tensor.dtype}; expected are fp32, bf16 or fp16")
    return tensors, metadata


@torch.no_grad()
def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    force: bool = False,
    keep_first: bool = True,
    content: tuple[dict[str, Tensor], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Put a saved adapter onto a model, injecting it first where needed; returns the file's metadata.

    Training can go on, and save_adapter() writes everything again: the file's whole tensors require
    gradients as the adapter's tensors do. If the model is sharded over processes, all of them must call this.

    Raises UserError for an adapter trained on another base, unless `force`, and for a missing layer or a
    wrong shape. keep_first: see inject(). content: the file's tensors and metadata, if it was read already.
    """
    is_new = not hasattr(unwrapped(model), "injection")
    model = unwrapped(model, to_inject=is_new)
    if hasattr(model, "injection") and model.injection.kept is not None:
        raise UserError("an adapter is merged into the model; call rwkv_miss.unmerge(model) first")
    if empty := next((name for name, p in model.named_parameters() if p.is_meta), ""):
        raise UserError(
            f"{empty} is on the meta device, where the adapter's values would be lost; give the model its own"
            " values first, with load_state_dict(assign=True) or to_empty()"
        )
    require_whole(model)
    linears, replaced, metadata = fit_adapter(model, path, force, content)
    if is_new:
        _keep_first(model, keep_first)
    reshard(model)
    with renewing(adapted_linears(model).values()):
        for name, own in linears.items():
            layer = model.get_submodule(name)
            with unsharded(layer):
                layer.load(own)
    own = _replaceable(model)
    for name, tensor in replaced.items():
        if own[name].requires_grad or is_sharded(own[name]):
            put(own[name], tensor.view(own[name].shape))
        else:  # a base tensor gets new memory: the old one may belong to a file or to another model
            if keep_first and isinstance(own[name], nn.Parameter):
                model.injection.first[name] = nn.Parameter(own[name].data, requires_grad=False)
            own[name].data = tensor.view_as(own[name]).to(own[name], copy=True)
        if not re.fullmatch(PARTS["state"], name):  # some layers' initial states may be frozen
            own[name].requires_grad_(isinstance(own[name], nn.Parameter))
    return metadata


def _replaceable(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that a file's whole tensors may replace: parameters under all names, and buffers."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def fit_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    force: bool = False,
    content: tuple[dict[str, Tensor], dict[str, Any]] | None = None,
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, Any]]:
    """Return (tensors of each adapted linear by its name, whole tensors, metadata) of a file that fits.

    The model is injected where needed, and may be on the meta device. Raises UserErrors as in load_adapter().
    """
    tensors, metadata = content or read_adapter(path)
    check_finite(tensors)
    recorded = metadata["base_fingerprint"]
    if not force and recorded and getattr(model, "base_fingerprint", None) not in (None, recorded):
        raise UserError(
            f"{path} was trained on another base ({metadata['base']}), not on {model.base_name}; give that"
            " one as the base"
        )
    tensors, metadata = _named_as_here(model, tensors, metadata)
    if not hasattr(model, "injection"):
        _inject_as_trained(model, path, tensors, metadata)
    _check_same_adapter(model, path, tensors, metadata)
    whole, by_layer, owned = dict(tensors), {}, by_owner(tensors)
    for name, layer in adapted_linears(model).items():
        try:
            by_layer[name] = layer_tensors(type(layer), name, (layer.out_features, layer.in_features), owned)
            layer.check(by_layer[name])
        except UserError as error:
            raise UserError(f"{path}, {name}: {error}") from None
        for key in layer.own_tensors():
            whole.pop(_name_in_file(layer, name, key), None)
    parameters = _replaceable(model)
    for other, name in metadata["tied"].items():
        tied_here = parameters.get(other) is parameters.get(name)
        if name in whole and other in parameters and not tied_here:
            whole[other] = whole[name]
    _check_whole(path, whole, parameters)
    return by_layer, whole, metadata


def _named_as_here(
    model: nn.Module, tensors: dict[str, Tensor], metadata: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Rename another project's linears to the layers of this model that change the same weights."""
    if hasattr(model, "injection"):
        layers = adapted_linears(model)
        here = {(layer.key(name), layer.view and layer.view.index): name for name, layer in layers.items()}
    else:
        here = {(target.view.key, target.view.index): name for name, target in all_targets(model).items()}
    views = views_of(metadata)
    names = {name: here.get((view.key, view.index), name) for name, view in views.items()}
    if all(name == new for name, new in names.items()):
        return tensors, metadata
    options = dict(metadata["options"])
    for option in [option for option, value in options.items() if isinstance(value, dict)]:
        options[option] = {names.get(name, name): part for name, part in options[option].items()}
    renamed = {}
    for key, tensor in tensors.items():
        owner, dot, leaf = key.rpartition(".")
        own = owner in names and leaf not in ("weight", "bias")
        renamed[f"{names[owner]}{dot}{leaf}" if own else key] = tensor
    described = {
        "options": options,
        "linears": [names[name] for name in metadata["linears"]],
        "views": {
            names[name]: dataclasses.asdict(view)
            for name, view in views.items()
            if not view.is_weight_of(names[name])
        },
    }
    return renamed, {**metadata, **described}


def _inject_as_trained(
    model: nn.Module, path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: dict[str, Any]
) -> None:
    """Inject the model as it was when the file was saved; its tensors have no values yet."""
    merged = metadata["merged_linears"]

    def find(model: nn.Module) -> dict[str, Target]:
        """Return the targets with exactly these names, and none whose name only ends so."""
        there, views = all_targets(model), metadata["views"]
        rows = layers_of_rows(metadata["tokens"], metadata["train_parts"])
        names = {*metadata["linears"], *merged}.difference(rows)
        if missing := sorted(names - there.keys()):
            raise UserError(f"{path} adapts layers that this model does not have: {listed(missing, 1)}")
        found = {name: target for name, target in there.items() if name in names}
        for name, target in found.items():
            if name in views and View(**views[name]) != target.view and "origin" not in metadata:
                raise UserError(
                    f"{path}: the weight of {name} is {View(**views[name])} there, and {target.view} in this"
                    " model; give it the base's model"
                )
        _refuse_unfit(model, found)
        return found

    parts = metadata["train_parts"]
    if "origin" in metadata:  # another project's file may have a part's tensors in some layers only
        names = [*dict(model.named_parameters()), *state_names(model)]
        parts = [part for part in parts if tensors.keys() >= set(in_parts(names, [part]))]
    # including merged linears: options and shared tensors depend on the number and names of all linears
    layers = metadata["layers"]
    tokens = metadata["tokens"]
    _attach(
        model, metadata["method"], find, ",".join(parts), metadata["options"], layers=layers, tokens=tokens
    )
    take_off(model, merged)
    share(adapted_linears(model).values())
    model.injection.targets, model.injection.merged_linears = metadata["targets"], merged
    model.injection.linears = [name for name in model.injection.linears if name not in merged]


def _check_same_adapter(
    model: nn.Module, path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: dict[str, Any]
) -> None:
    """Raise UserError unless the model's adapter has the file's method, options, linears and tensors."""
    # parsed, so that options that are newer than the file have their defaults
    options = dataclasses.asdict(METHODS[metadata["method"]].Options.parse(metadata["options"]))
    for name, there in (
        ("method", metadata["method"]),
        ("options", options),
        ("linears", metadata["linears"]),
        ("tokens", metadata["tokens"]),
    ):
        here = getattr(model.injection, name)
        # other projects' files list the linears in another order
        same = sorted(here) == sorted(there) if name == "linears" else here == there
        if not same:
            raise UserError(f"{path} has {name} {there}, the model carries an adapter with {here}")
    absent = [name for name in adapter_tensors(model) if name not in tensors]
    if absent:
        raise UserError(f"{path} lacks {listed(absent, 1)} of this model's adapter")


def _check_whole(
    path: str | os.PathLike[str], whole: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> None:
    """Raise UserError for a whole tensor of the file that cannot replace one of the model."""
    for name, tensor in whole.items():
        if name not in parameters:
            raise UserError(f"{path} holds {name}, which this model does not have")
        if parameters[name].numel() != tensor.numel():
            raise UserError(
                f"{path}: {name} is {tuple(tensor.shape)}, {tuple(parameters[name].shape)} in this model"
            )
        if not parameters[name].is_floating_point():
            raise UserError(
                f"{path} holds {name}, which is quantised in this model; load the adapter first and quantise"
                " after that"
            )
