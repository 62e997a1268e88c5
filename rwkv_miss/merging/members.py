"""Sum of adapters on the tensors of a base: W + sum of w_i delta_i(W) in fp32.

Every delta is computed from the base's weight, not from a sum.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..adapter import METHODS, AdapterLinear, NoOptions
from ..adapter_file import by_owner, layer_tensors, read_adapter
from ..convert import FORMATS, NO_HINTS, Adapter, Hints, Source, check_hints, format_of, open_source
from ..errors import UserError
from ..files.checkpoint import Arch, blocks, check_finite
from ..files.identity import fingerprint
from ..fit import check_layer, check_matrices, check_whole
from ..methods.token_rows import method_of
from ..methods.whole_tensors import PARTS
from ..targets import View, views_of
from .rounding import Scratch

LARGEST_WEIGHT = 1e30  # largest factor of an adapter; a larger one overflows fp32
RECORDED = ("tokenizer", "eod", "template")  # metadata that readers of a merged file use


@dataclasses.dataclass(frozen=True)
class Rows(View):
    """Tensor with some rows of a linear's matrix, such as one file's part of a stack of experts.

    first: the place of the tensor's first row in the matrix. total: number of the matrix's rows.
    """

    first: int = 0
    total: int = 0


@dataclasses.dataclass(frozen=True)
class Member:
    """Adapter file, and the factor of its change.

    The change is delta(W) for a linear's weight, T - base for a whole tensor T.
    """

    path: str
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    weight: float = 1.0
    notes: Sequence[str] = ()  # messages for the user about reading the file
    places: Mapping[str, str] = dataclasses.field(default_factory=dict)  # name -> another name in the base
    # (key of a stack, number of an expert) -> the base's tensors with the expert's rows
    rows: Mapping[tuple[str, int], list[View]] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def method(self) -> type[AdapterLinear]:
        return METHODS[self.metadata["method"]]

    def method_at(self, name: str) -> tuple[type[AdapterLinear], NoOptions]:
        """Return class and options of an adapted linear."""
        return method_of(self.metadata, name)

    @functools.cached_property
    def owned(self) -> dict[str, dict[str, Tensor]]:
        """Return the file's tensors by their owners."""
        return by_owner(self.tensors)

    @functools.cached_property
    def views(self) -> list[tuple[str, View]]:
        """Pair each linear's name with its part of a weight of the base; an expert may have several parts."""
        pairs = []
        for name, view in views_of(self.metadata).items():
            own = dataclasses.replace(view, key=self.places.get(view.key, view.key))
            pairs += [(name, part) for part in self.rows.get((view.key, view.index), [own])]
        return pairs

    @functools.cached_property
    def by_weight(self) -> dict[str, dict[str, View]]:
        """Map key of an adapted weight -> its linears by name, each with its part of the weight."""
        found: dict[str, dict[str, View]] = {}
        for name, view in self.views:
            found.setdefault(view.key, {})[name] = view
        return found

    @functools.cached_property
    def whole(self) -> dict[str, Tensor]:
        """Return the whole tensors of the file, by their names in the base."""
        shared = tuple(f"shared.{name}" for name in self.method.shared)
        linears = set(self.metadata["linears"])

        def own(name: str) -> bool:
            owner, _, leaf = name.rpartition(".")
            return name.startswith(shared) or (owner in linears and leaf != "bias")

        whole = {name: tensor for name, tensor in self.tensors.items() if not own(name)}
        whole |= {other: whole[name] for other, name in self.tied.items() if name in whole}
        return {self.places.get(name, name): tensor for name, tensor in whole.items()}

    @property
    def tied(self) -> dict[str, str]:
        """Map other name of a whole tensor -> its name in the file. A base may have one of them, or both."""
        return self.metadata["tied"]

    @functools.cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.tensors)

    def changes(self, key: str) -> bool:
        return key in self.by_weight or key in self.whole

    def sums_products(self, key: str) -> bool:
        """Tell whether a tensor's change has sums of products, whose order differs between machines."""
        return key not in self.whole and any(
            method.sums_products(options) for method, options in map(self.method_at, self.by_weight[key])
        )

    def check(self, base: Mapping[str, Tensor]) -> None:
        """Raise UserError unless every adapted linear and every whole tensor fits the base."""
        check_matrices(self.path, self.views, base)
        for name, view in self.views:
            shape = _matrix(view, base[view.key]).shape
            _, layer = check_layer(self.path, name, shape, *self.method_at(name), self.owned)
            if isinstance(view, Rows) and not layer.low_rank():
                raise UserError(
                    f"a change by {self.metadata['method']} depends on the whole matrix, of which"
                    f" {view.key} is a part; merge in memory: rwkv_miss.merge(model)"
                )
        self._check_states(base)
        # this package's own files may bring new tensors, such as a classifier's
        check_whole(self.path, self.whole, base, lambda key: "origin" not in self.metadata or is_state(key))

    def _check_states(self, base: Mapping[str, Tensor]) -> None:
        states = {name: tuple(tensor.shape) for name, tensor in self.whole.items() if is_state(name)}
        if states:
            arch = Arch.detect(base)
            wanted = {
                f"blocks.{i}.att.time_state": (arch.n_head, arch.head_size, arch.head_size)
                for i in range(arch.n_layer)
            }
            if states != wanted:
                raise UserError(
                    f"the initial state of {self.path} is of {len(states)} layers,"
                    f" {next(iter(states.values()))} each; this base has {arch.describe()}"
                )

    @torch.no_grad()
    def merge_into(self, key: str, weight: Tensor) -> None:
        """Add the adapter's changes to a weight of the base, in place, fp32."""
        for view, layer in self.layers(key, weight):
            layer.add_delta_to(layer.weight)  # layer.weight is `weight` itself, or a transposed copy
            if isinstance(view, Rows):
                weight.add_(layer.weight[view.first :][: len(weight)])
            elif view.transposed:
                view.of(weight).copy_(layer.weight)

    def layers(self, key: str, weight: Tensor) -> Iterator[tuple[View, AdapterLinear]]:
        """Make the adapted linears whose matrices are in this weight of the base, fp32."""
        for name, view in self.by_weight[key].items():
            matrix = _matrix(view, weight).contiguous()
            method, options = self.method_at(name)
            tensors = layer_tensors(method, name, matrix.shape, self.owned)
            yield view, method.of_file(matrix, tensors, options)

    @torch.no_grad()
    def delta(self, key: str, weight: Tensor, out: Tensor, fast: bool = True) -> Tensor:
        """Compute the change of the base's `weight`, fp32, into `out`, fp32.

        fast: use add_delta_to(), as a merge does, which for MiSS is 7 times as fast as delta().
        """
        out.zero_()
        for view, layer in self.layers(key, weight):
            if isinstance(view, Rows):
                out.copy_(layer.delta()[view.first :][: len(out)])
            elif not fast or layer.low_rank() is None or view.transposed:
                view.of(out).copy_(layer.delta())
            else:
                layer.add_delta_to(view.of(out))  # adds to zeros; this method's change ignores the weight
        return out

    def record(self) -> dict[str, Any]:
        """Describe the adapter for the merged file."""
        facts = {
            "adapter_fingerprint": self.fingerprint,
            "method": self.metadata["method"],
            "options": self.metadata["options"],
            "train_parts": self.metadata.get("train_parts", []),
            "step": self.metadata.get("step"),
        }
        return facts if self.weight == 1 else {**facts, "weight": self.weight}


def _matrix(view: View, weight: Tensor) -> Tensor:
    """Return a linear's matrix in a weight of the base; all zeros for Rows, whose weight is only a part."""
    if isinstance(view, Rows):
        return weight.new_zeros(view.total, weight.shape[1])
    return view.of(weight)


def is_state(name: str) -> bool:
    """Tell whether a tensor is an initial state."""
    return bool(re.fullmatch(PARTS["state"], name))


class Combination:
    """Adapters of one base, merged together."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = list(members)
        self.linears = list(dict.fromkeys(name for m in self.members for name in m.metadata["linears"]))
        self.whole = dict.fromkeys(key for m in self.members for key in m.whole)
        self.parts = [
            part for part in PARTS if any(part in m.metadata.get("train_parts", []) for m in self.members)
        ]

    def changed(self, base: Iterable[str]) -> list[str]:
        """Return those keys of the base whose values change."""
        return [key for key in base if any(m.changes(key) for m in self.members)]

    def added(self, base: Iterable[str]) -> list[str]:
        """Return the adapters' keys that the base lacks, such as initial states."""
        base = set(base)
        other_names: set[str] = set()
        for m in self.members:
            for pair in m.tied.items():
                one, other = (m.places.get(name, name) for name in pair)
                other_names |= {one, other} if other in base or one in base else {one}
        return [key for key in self.whole if key not in base and key not in other_names]

    def check(self, base: Mapping[str, Tensor]) -> None:
        """Raise UserError unless all adapters fit the base."""
        for m in self.members:
            m.check(base)

    def name(self, key: str) -> str:
        """Name a tensor for reports: the linear whose weight it is, or the tensor itself."""
        return key.removesuffix(".weight") if any(key in m.by_weight for m in self.members) else key

    @torch.no_grad()
    def change(self, key: str, weight: Tensor, scratch: Scratch) -> Tensor:
        """Compute sum of w_i delta_i, fp32, for a linear's weight that some adapter changes.

        weight: the base's weight, fp32.
        """
        total = None
        for m in self.members:
            if not m.changes(key):
                continue
            room = scratch.get("total" if total is None else "delta", weight.shape)
            delta = (
                torch.sub(m.whole[key].reshape(weight.shape), weight, out=room)
                if key in m.whole
                else m.delta(key, weight, room)
            )
            total = delta.mul_(m.weight) if total is None else total.add_(delta, alpha=m.weight)
        return total

    @torch.no_grad()
    def merged(self, key: str, base: Tensor, scratch: Scratch, out: Tensor | None = None) -> Tensor:
        """Compute one tensor of the base with its changes, before rounding.

        The result is fp32, in `out` or in the scratch memory, or else an adapter's own tensor.
        """
        concerned = [m for m in self.members if m.changes(key)]
        alone = [m.weight for m in concerned] == [1]
        if alone and key in concerned[0].whole:
            return concerned[0].whole[key].reshape(base.shape)
        weight = (scratch.get("weight", base.shape) if out is None else out).copy_(base)
        if alone:
            concerned[0].merge_into(key, weight)
        elif all(key in m.whole for m in concerned):
            _mix(weight, [(m.whole[key], m.weight) for m in concerned])
        else:
            weight.add_(self.change(key, weight, scratch))
        return weight

    def added_value(self, key: str) -> Tensor:
        """Compute a tensor that the base lacks: the sum of w_i T_i, fp32, or an adapter's own tensor."""
        values = [(m.whole[key], m.weight) for m in self.members if key in m.whole]
        if [weight for _, weight in values] == [1]:
            return values[0][0]
        return _mix(torch.zeros(values[0][0].shape), values)


def _mix(base: Tensor, values: list[tuple[Tensor, float]]) -> Tensor:
    """Add sum of w_i (T_i - base) to base in place, fp32, without more memory."""
    for before, *parts in zip(blocks(base), *(blocks(tensor) for tensor, _ in values)):
        before += sum(weight * (part.float() - before) for part, (_, weight) in zip(parts, values))
    return base


def read_foreign(source: Source, name: str | None, hints: Hints) -> Adapter:
    """Read an adapter file in the format `name`; None: one that is not recognised, for its error.

    Raises UserError for a file that is no adapter, or if a fact is missing from both the file and the hints.
    """
    if name in (None, "native"):
        return Adapter(*read_adapter(source.path))  # for its error, which names the file's real format
    adapter = FORMATS[name].read(source, hints.only(FORMATS[name].hints))
    return dataclasses.replace(
        adapter, notes=[f"{source.path} is read as {name}: {adapter.metadata['method']}", *adapter.notes]
    )


def read_members(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    weights: Sequence[float] | None = None,
    hints: Hints = NO_HINTS,
) -> list[Member]:
    """Read adapter files with their factors, 1 each by default; `hints` are for other projects' files.

    Raises UserError for a file that is no adapter or holds NaN, a factor that is no number, and if there are
    more or fewer factors than files.
    """
    paths = [os.fspath(path) for path in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]
    weights = [1.0] * len(paths) if weights is None else list(weights)
    if len(weights) != len(paths):
        raise UserError(
            f"{len(weights)} weights are given for {len(paths)} adapters; give one for each, in their order"
        )
    for weight in weights:
        if not abs(weight) < LARGEST_WEIGHT:
            raise UserError(
                f"weight {weight} is no number to multiply with; expected is one below {LARGEST_WEIGHT:g},"
                " negative ones and 0 included"
            )
    sources = [open_source(path) for path in paths]
    forms = [format_of(source) for source in sources]
    useful: set[str] = set()  # hints that at least one file uses
    for name in forms:
        useful.update(FORMATS[name].hints if name else ())
    for path, name in zip(paths, forms):
        if name:
            check_hints(path, FORMATS[name], hints.without(useful))
    adapters = [read_foreign(source, name, hints) for source, name in zip(sources, forms)]
    members = [
        Member(path, a.tensors, a.metadata, weight, a.notes)
        for path, a, weight in zip(paths, adapters, weights)
    ]
    seen: dict[str, str] = {}
    for m in members:
        check_finite(m.tensors)
        if m.fingerprint in seen:
            raise UserError(
                f"{seen[m.fingerprint]} and {m.path} are the same adapter; give it once, with the sum of the"
                " weights"
            )
        seen[m.fingerprint] = m.path
    return members


def merged_adapters(metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the adapters in a merged file's metadata. [] for any other file, and for nonsense."""
    entries = metadata["adapters"] if isinstance(metadata.get("adapters"), list) else [metadata]
    return [
        dict(entry)
        for entry in entries
        if isinstance(entry, Mapping) and isinstance(entry.get("adapter_fingerprint"), str)
    ]


def common_record(members: Sequence[Member], base: Mapping[str, Any]) -> dict[str, Any]:
    """Return tokenizer, end of document, template and BOS from the adapters' metadata, else the base's.

    An adapter without a BOS was trained without one, whatever the base records. Raises UserError
    if two adapters contradict each other.
    """
    record: dict[str, Any] = {"bos": _common_bos(members)}
    for name in RECORDED:
        pairs = [(m.metadata[name], m.path) for m in members if m.metadata.get(name)]
        for value, path in pairs[1:]:
            if str(value) != str(pairs[0][0]):
                raise UserError(
                    f"the adapters were trained with different {name}s: {pairs[0][1]} with {pairs[0][0]!r},"
                    f" {path} with {value!r}; a merged model has one"
                )
        if pairs:
            record[name] = pairs[0][0]
        elif name == "eod" and record["tokenizer"] != base.get("tokenizer"):
            record[name] = None  # the base's value belongs to another tokenizer
        else:
            record[name] = base.get(name)
    return record


def _common_bos(members: Sequence[Member]) -> list[int]:
    """Return the ids that the adapters' documents began with; [] for an adapter without that record."""
    first, *others = members
    bos = first.metadata.get("bos") or []
    for other in others:
        theirs = other.metadata.get("bos") or []
        if theirs != bos:
            raise UserError(
                f"the adapters were trained with different BOS tokens (--bos): {first.path} with"
                f" {bos or 'none'}, {other.path} with {theirs or 'none'}; a merged model has one"
            )
    return bos
