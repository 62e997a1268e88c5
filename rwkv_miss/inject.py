"""Choose linears by name, replace them by adapted ones, freeze the rest."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import (
    METHODS,
    AdapterLinear,
    AdapterMethod,
    NoOptions,
    adapted_linears,
    trained_outside_linears,
)
from .errors import UserError
from .files.identity import weights_fingerprint
from .methods.token_rows import LAYERS, TokenOptions, TokenRows, layers_of_rows
from .methods.whole_tensors import add_states, in_parts, split_parts, state_names, train_whole
from .target_checks import find_targets, refuse_unfit
from .targets import (
    DEFAULT_TARGETS,
    Layers,
    Target,
    all_targets,
    layer_number,
    layer_numbers,
    renewing,
    take_off,
)
from .wrappers import unwrapped


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
    # weights_fingerprint() of the base's matrices that the adapter changes, unless an RWKV knows its file's
    weights: str | None = None
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
    injection = attach(model, method, find, train_parts, options, initialise, layers, tokens)
    if injection.linears:
        injection.targets = [targets] if isinstance(targets, str) else list(targets or DEFAULT_TARGETS)
    keep_first_values(model, keep_first)
    return injection


@torch.no_grad()
def keep_first_values(model: nn.Module, keep: bool) -> None:
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


def attach(
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
    statistics = {name: tensor.clone() for name, tensor in statistics_of(model).items()}
    before = dict(model.named_parameters())
    trained_before = [name for name, p in before.items() if p.requires_grad]
    weights = _fingerprint(model, [*targets.values(), *rows.values()])
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
    _keep_owners(model, targets)
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
        weights=weights,
    )
    return model.injection


def _keep_owners(model: nn.Module, targets: Mapping[str, Target]) -> None:
    for name, layer in adapted_linears(model).items():
        if layer.owner is None:
            layer.keep(targets[name].owner)


def _fingerprint(model: nn.Module, targets: Iterable[Target]) -> str | None:
    """Return weights_fingerprint() of the targets' tensors; None for an RWKV, whose file has a digest."""
    if hasattr(model, "base_fingerprint"):
        return None
    return weights_fingerprint({target.view.key: target.weight for target in targets}.values())


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
    refuse_unfit(model, found)
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
        _keep_owners(model, {name: t for _, targets, _ in attached for name, t in targets.items()})
        take_off(model, adapted_linears(model))
        for p, flag in trained_before.items():
            p.requires_grad_(flag)
        raise


def statistics_of(model: nn.Module) -> dict[str, Tensor]:
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
