"""Choose linears by name, replace them by adapted ones, freeze the rest; save and load what was trained."""

from __future__ import annotations

import dataclasses
import functools
import platform
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import METHODS, AdapterLinear, adapted_linears, put_linears
from .checkpoint import check_finite, read_checkpoint, read_metadata, refuse_run_checkpoint, write_checkpoint
from .errors import UserError
from .parts import PARTS, add_states, in_parts, split_parts, state_names, train_whole
from .untrusted import check_sums

ADAPTER_FORMAT = "rwkv-miss adapter"

# the linears of the paper's parameter counts; v7 has no gate and no ffn.receptance
DEFAULT_TARGETS = ("receptance", "key", "value", "gate", "output")


@dataclasses.dataclass
class Injection:
    """What inject() did. Kept as `model.injection` and written into the adapter file."""

    method: str
    options: dict[str, Any]
    targets: list[str]
    linears: list[str]
    trainable: int
    total: int
    train_parts: list[str] = dataclasses.field(default_factory=list)
    whole: int = 0

    def line(self) -> str:
        """One line for the user: linears, whole tensors, trainable parameters, and their share of the base."""
        share = 100 * self.trainable / self.total
        parts = [f"{len(self.linears)} linears"] if self.linears else []
        parts += [f"{self.whole} whole tensors ({', '.join(self.train_parts)})"] if self.whole else []
        changed = f"{' and '.join(parts)}, " if parts else ""
        return f"{changed}{self.trainable:,} trainable of {_short(self.total)} ({share:.2g} %)"


def _short(count: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:,}"


def find_linears(model: nn.Module, targets: list[str] | None) -> dict[str, nn.Linear]:
    """Dotted name -> linear for every target, which is a leaf name (`key`), a suffix (`att.key`) or a whole name.

    None means the linears of RWKV that the paper adapts, and is for such models only. Raises UserError, with the names that exist, for that,
    for a target that matches nothing, and for a linear whose change would have no effect or another one once merged.
    """
    if isinstance(targets, str):
        raise UserError(f"targets {targets!r} is a text, expected a list of names: targets=[{targets!r}]")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    leaves = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
    # key and value alone would match some linears of many a model, and leave out the others without a word
    if targets is None and not any(name.endswith("receptance") for name in linears):
        raise UserError(f"without targets RWKV's linears are adapted ({', '.join(DEFAULT_TARGETS)}), and this is no RWKV model; "
                        f"name some of its linear layers: {leaves or 'it has none'}")
    chosen: set[str] = set()
    for target in DEFAULT_TARGETS if targets is None else targets:
        found = {name for name in linears if name == target or name.endswith(f".{target}")}
        if not found and targets is not None:
            raise UserError(f"target {target!r} matches no linear layer; this model has: {leaves or 'none'}")
        chosen |= found
    if not chosen:
        raise UserError(f"no linear layer to adapt: targets is empty; this model has: {leaves or 'none'}")
    _refuse_unfit(model, chosen)
    return {name: module for name, module in linears.items() if name in chosen}


def _refuse_unfit(model: nn.Module, chosen: set[str]) -> None:
    """UserError for a linear that shares its weight, which a merge changes for all that use it, and for one that is never called."""
    owners: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(p), []).append(name)
    for name in sorted(chosen):
        others = [other for other in owners[id(model.get_submodule(name).weight)] if other != f"{name}.weight"]
        if others:
            raise UserError(f"{name} has the same weight as {others[0]}, which a merge would change as well; untie them or drop the target")
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
            raise UserError(f"{name} belongs to torch's MultiheadAttention, which reads its weight and never calls it; drop the target")


def inject(
    model: nn.Module, method: str = "miss", targets: list[str] | None = None, train_parts: str = "", earlier: Mapping[str, Tensor] | None = None,
    **options,
) -> Injection:
    """Freeze the model and add the trainable parameters of a method, in place: `inject(model, "miss", rank=64)`.

    The tensors of `train_parts`, such as "ln,time" (see parts.py), are trained as a whole beside it: each becomes an fp32 parameter.
    What else should be trained, such as a classifier, is asked for afterwards (`model.classifier.requires_grad_(True)`) and saved as well.
    `earlier` has the tensors of a training that goes on, by their names in the model: the weights that the method changes (PiSSA) become the same.
    Raises UserError for an unknown method, option, target or part, and for a rank that does not fit a layer.
    """
    return _attach(model, method, targets, train_parts, options, functools.partial(_start, earlier=earlier))


@torch.no_grad()
def _start(model: nn.Module, earlier: Mapping[str, Tensor] | None) -> None:
    """Give new adapted linears the values that follow from their weights, and the constants of `earlier`."""
    layers = {name: layer for name, layer in adapted_linears(model).items() if not layer.weight.is_meta}  # shapes alone have no values
    for name, layer in layers.items():
        for key in () if earlier is None else layer.constants:
            constant, found = getattr(layer, key), earlier.get(f"{name}.{key}")
            if found is None or found.shape != constant.shape:
                raise UserError(f"the training that goes on has no {name}.{key} of {tuple(constant.shape)}; it is one of another base or rank")
            constant.copy_(found)
        try:
            layer.start()
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    for layer in layers.values():
        layer.prepare()


def _attach(
    model: nn.Module, method: str, targets: list[str] | None, train_parts: str, options: dict[str, Any],
    start: Callable[[nn.Module], None] | None = None,
) -> Injection:
    """Adapt the model, and start() it; after a UserError it is as before."""
    if method not in METHODS:
        raise UserError(f"method {method!r} is unknown; there are: {', '.join(sorted(METHODS))}")
    if adapted_linears(model):
        raise UserError("the model already carries an adapter; merge it first, or start from the base file")
    cls = METHODS[method]
    if targets is not None and not cls.adapts_linears:
        raise UserError(f"method {method} adapts no linear layers; drop the targets ({', '.join(targets)})")
    parsed = cls.Options.parse(options)
    linears = find_linears(model, targets) if cls.adapts_linears else {}
    parts = split_parts(train_parts)
    if method in parts:
        raise UserError(f"method {method} trains part {method} already; drop it from the parts")
    whole = in_parts(dict.fromkeys([name for name, _ in model.named_parameters()] + state_names(model)), parts)
    for name in whole:
        if name.rpartition(".")[0] in linears:
            raise UserError(f"{name} can't be trained as a whole and be adapted as well; drop it from the targets or from the parts")
    total = sum(p.numel() for p in model.parameters())
    trained_before = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(False)
    try:
        cls.attach(model, linears, parsed)
        if start:
            start(model)
    except UserError:
        put_linears(model, linears)
        for p, flag in trained_before.items():
            p.requires_grad_(flag)
        raise
    if "state" in parts:
        add_states(model)
    for name in whole:
        train_whole(model, name)
    model.injection = Injection(
        method, dataclasses.asdict(parsed), list(targets or DEFAULT_TARGETS) if linears else [], list(linears),
        sum(p.numel() for p in model.parameters() if p.requires_grad), total, parts, len(whole),
    )
    return model.injection


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What an adapter file holds: all that the method added, `shared.NAME` for tensors in common, and every other trained parameter."""
    tensors: dict[str, Tensor] = {}
    own: set[int] = set()
    for name, layer in adapted_linears(model).items():
        for key, tensor in layer.own_tensors().items():
            tensors[_name_in_file(layer, name, key)] = tensor
            own.add(id(tensor))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in own}
    return {**tensors, **trained}


def _name_in_file(layer: AdapterLinear, name: str, key: str) -> str:
    shared = layer.shared_names(layer.out_features, layer.in_features)
    return f"shared.{shared[key]}" if key in shared else f"{name}.{key}"


def layer_tensors(cls: type[AdapterLinear], name: str, shape: tuple[int, int], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one adapted linear (out, in) out of an adapter file, by their names inside the layer, the shared ones included."""
    own = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.rpartition(".")[0] == name}
    for key, of in cls.shared_names(*shape).items():
        if f"shared.{of}" not in tensors:
            raise UserError(f"the adapter has no shared.{of}, which a linear of {shape[1]} inputs and {shape[0]} outputs needs")
        tensor = tensors[f"shared.{of}"]
        if not tensor.is_floating_point():
            raise UserError(f"shared.{of} is {tensor.dtype}; expected are fp32, bf16 or fp16")
        own[key] = tensor
    return own


def save_adapter(model: nn.Module, path, **metadata) -> None:
    """Write the trained tensors and the metadata that load and merge need, atomically; keywords (step, tokenizer, ...) are added to it."""
    injection: Injection | None = getattr(model, "injection", None)
    if injection is None:
        raise UserError("the model carries no adapter; call inject() first")
    arch = getattr(model, "arch", None)
    described = {
        "format": ADAPTER_FORMAT,
        "format_version": 1,
        "method": injection.method,
        "options": injection.options,
        "layout": injection.options.get("layout"),
        "linears": injection.linears,
        "targets": injection.targets,
        "train_parts": injection.train_parts,
        "trainable": injection.trainable,
        "arch": arch.to_dict() if arch else None,
        "base": getattr(model, "base_name", None),
        "base_fingerprint": getattr(model, "base_fingerprint", None),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        **metadata,
    }
    write_checkpoint(path, ((k, t.detach().cpu()) for k, t in adapter_tensors(model).items()), described)


def read_described(path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of any checkpoint file, {} where it has none.

    A file of nothing but initial states, as other projects release them, is an adapter of the method state without a known base.
    """
    tensors, metadata = read_checkpoint(path), read_metadata(path)
    if metadata is None and tensors and all(re.fullmatch(PARTS["state"], name) for name in tensors):
        metadata = {"format": ADAPTER_FORMAT, "method": "state", "options": {}, "linears": [], "targets": [], "train_parts": [],
                    "arch": None, "base": None, "base_fingerprint": None, "versions": {}}
    return tensors, metadata or {}


# what an adapter file says of itself, and of what kind it is; and what stands for it in files that leave it out
FIELDS = {"method": str, "options": dict, "linears": list, "targets": list, "train_parts": list, "arch": dict, "base": str, "base_fingerprint": str,
          "versions": dict, "tokenizer": str, "eod": str, "template": str}
REQUIRED = ("method", "options", "linears")
DEFAULTS = {"targets": [], "train_parts": [], "arch": None, "base": None, "base_fingerprint": None, "versions": {}}


def checked_metadata(path, metadata: dict[str, Any]) -> dict[str, Any]:
    """An adapter file's metadata, completed. UserError where something is missing or of another kind."""
    version = metadata.get("format_version", 1)
    if version != 1:
        raise UserError(f"{path} has format_version {version!r}, this package reads 1; update it")
    for name, kind in FIELDS.items():
        value = metadata.get(name)
        sound = isinstance(value, kind) and (kind is not list or all(isinstance(item, str) for item in value))
        if not sound and (value is not None or name in REQUIRED):
            wanted = "a list of names" if kind is list else kind.__name__
            raise UserError(f"{path} is damaged: its {name} is {str(value)[:60]!r}, expected {wanted}")
    return {**DEFAULTS, **{name: value for name, value in metadata.items() if value is not None or name not in DEFAULTS}}


def read_adapter(path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of an adapter file; a UserError says so when the file is something else."""
    tensors, metadata = read_described(path)
    refuse_run_checkpoint(path, metadata)
    if metadata.get("format") != ADAPTER_FORMAT:
        raise UserError(f"{path} is not an adapter file: it has no adapter metadata. It may be a base or a merged model, or "
                        "another project's adapter, of which python -m rwkv_miss convert makes one")
    metadata = checked_metadata(path, metadata)
    if metadata["method"] not in METHODS:
        raise UserError(f"{path} was made with method {metadata['method']!r}; there are: {', '.join(sorted(METHODS))}")
    check_sums(path)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.itemsize == 1:
            raise UserError(f"{path}: {name} is {tensor.dtype}; expected are fp32, bf16 or fp16")
    return tensors, metadata


@torch.no_grad()
def load_adapter(model: nn.Module, path, force: bool = False) -> dict[str, Any]:
    """Put a saved adapter onto a model, injecting it first where needed; returns the file's metadata.

    An adapter trained on another base is a UserError unless `force`; a missing layer or a wrong shape always is.
    """
    linears, whole, metadata = fit_adapter(model, path, force)
    for name, own in linears.items():
        model.get_submodule(name).load(own)
    parameters = dict(model.named_parameters())
    for name, tensor in whole.items():
        if parameters[name].requires_grad:
            parameters[name].copy_(tensor.view_as(parameters[name]))
        else:  # the base's, in new memory: the old one may be that of a file, or another model's
            parameters[name].data = tensor.view_as(parameters[name]).to(parameters[name], copy=True)
    return metadata


def _is_base(model: nn.Module, recorded: str, path) -> bool:
    """Whether a model is the one that an adapter file was trained on, as far as the model knows what it is."""
    if identity := getattr(model, "base_identity", None):
        return identity.is_recorded(recorded, path)
    return getattr(model, "base_fingerprint", None) in (None, recorded)


def fit_adapter(model: nn.Module, path, force: bool = False) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, Any]]:
    """(the tensors of each adapted linear by its name, the whole tensors, the metadata) of a file that fits a model, for which the model is
    injected where needed; it may be one of shapes alone, on the meta device. UserErrors as in load_adapter."""
    tensors, metadata = read_adapter(path)
    check_finite(tensors)
    if not force and metadata["base_fingerprint"] and not _is_base(model, metadata["base_fingerprint"], path):
        raise UserError(f"{path} was trained on another base ({metadata['base']}), not on {model.base_name}; give that one as the base")
    cls = METHODS[metadata["method"]]
    if not hasattr(model, "injection"):
        missing = sorted(set(metadata["linears"]) - {name for name, _ in model.named_modules()})
        if missing:
            raise UserError(f"{path} adapts {missing[0]} and {len(missing) - 1} more layers that this model does not have")
        parts = metadata.get("train_parts", [])  # none in files of the first version
        if "origin" in metadata:  # another project's file may have a part of some layers only
            parts = [part for part in parts if tensors.keys() >= set(in_parts([*dict(model.named_parameters()), *state_names(model)], [part]))]
        _attach(model, metadata["method"], metadata["linears"] or None, ",".join(parts), metadata["options"])
        model.injection.targets = metadata["targets"]
    saved = {**metadata, "options": dataclasses.asdict(cls.Options.parse(metadata["options"]))}  # options may be newer than the file
    for name in ("method", "options", "linears"):
        here, there = getattr(model.injection, name), saved[name]
        if sorted(here) != sorted(there) if name == "linears" else here != there:  # other projects' files have an order of their own
            raise UserError(f"{path} has {name} {saved[name]}, the model carries an adapter with {getattr(model.injection, name)}")
    absent = [name for name in adapter_tensors(model) if name not in tensors]
    if absent:
        raise UserError(f"{path} lacks {absent[0]}" + (f" and {len(absent) - 1} more tensors" if absent[1:] else "") + " of this model's adapter")
    full, given = dict(tensors), {}
    for name, layer in adapted_linears(model).items():
        try:
            given[name] = layer_tensors(cls, name, (layer.out_features, layer.in_features), tensors)
            layer.check(given[name])
        except UserError as error:
            raise UserError(f"{path}, {name}: {error}") from None
        for key in layer.own_tensors():
            full.pop(_name_in_file(layer, name, key), None)
    parameters = dict(model.named_parameters())
    for name, tensor in full.items():
        if name not in parameters:
            raise UserError(f"{path} holds {name}, which this model does not have")
        if parameters[name].numel() != tensor.numel():
            raise UserError(f"{path}: {name} is {tuple(tensor.shape)}, {tuple(parameters[name].shape)} in this model")
        if not parameters[name].is_floating_point():
            raise UserError(f"{path} holds {name}, which is quantised in this model; load the adapter first and quantise after that")
    return given, full, metadata
