"""Unmerged adapters of a model: y = W x + scale B (A x). Choosing others takes milliseconds.

Most methods change a weight by a matrix of low rank: MiSS, LoRA, PiSSA, VeRA and others. Their two factors
are kept here in fp32, by AdapterLinear.low_rank(). The others (DoRA, Bat, MiSS with a magnitude) keep the
tensors of their file. Their weights are merged in fp32 when the adapter is chosen. A tensor T
that was trained as a whole, or an initial state, stands for base + scale (T - base).

On a GPU the chosen tensors are then rounded to the dtype of the activations: once, and not for every token.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
import re
import shlex
import weakref
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_miss.errors import UserError, listed
from rwkv_miss.files.checkpoint import read_checkpoint
from rwkv_miss.files.identity import fingerprint
from rwkv_miss.merging.members import is_state
from rwkv_miss.methods.token_rows import layers_of_rows, method_of
from rwkv_miss.save_and_load import fit_adapter
from rwkv_miss.targets import put_linears

from ..model import RWKV, State
from .adapter_stack import BASE, Applied, Mix, Stack, scales, shares
from .unmerged_linear import (
    FactorColumns,
    LowRank,
    UnmergedEmbedding,
    UnmergedLinear,
    factors_of,
    side_by_side,
    together,
    unmerged,
)

MIXES = 8  # mixes of rows that are remembered: that of a step, and those of prompts between steps

# weights that keep their dtype, because GPU kernels read any: the token shift's mixes, the vectors of the
# time mix, initial states
NEVER_CAST = re.compile(r"\.(x_[rwkvag]|time_maa_[xwkvrg]|k_k|k_a|r_k|ln_x\.weight|ln_x\.bias|time_state)$")


@dataclasses.dataclass
class FittedAdapter:
    """Adapter file that fits the model."""

    path: Any
    fingerprint: str
    metadata: dict[str, Any]
    factors: dict[str, LowRank]  # name of a linear -> its change
    merging: dict[str, dict[str, Tensor]]  # the file's tensors of linears that have no factors
    whole: dict[str, Tensor]  # tensors that were trained as a whole

    @functools.cached_property
    def columns(self) -> dict[str, FactorColumns]:
        """Return the factors as linears take them without another adapter; they are not copied."""
        return {name: side_by_side([factor]) for name, factor in self.factors.items()}

    def replaced(self) -> list[str]:
        """Name the model's tensors that have another value with the adapter."""
        return [*(f"{name}.weight" for name in self.merging), *self.whole]

    def merged_only(self) -> list[str]:
        """Name the tensors of replaced() that can't differ by row. Initial states can: each row has one."""
        return [name for name in self.replaced() if not is_state(name)]

    def reason_to_merge(self) -> str:
        """Say why rows cannot differ by the adapter; "" if they can."""
        if not (names := self.merged_only()):
            return ""
        whole = [name for name in names if name in self.whole]
        what = f"its method, {self.metadata['method']}, changes whole matrices"
        if whole:
            parts = ",".join(self.metadata["train_parts"])
            what = f"it was trained with --train_parts {parts}, so it changes whole tensors"
        return f"{what} ({listed(whole or names, 3)}), and a model has those once for all rows"

    def value(self, name: str, base: Tensor) -> Tensor:
        """Compute the value of one of replaced(), in fp32, from the base's."""
        exact = torch.promote_types(base.dtype, torch.float32)
        if name in self.whole:
            return self.whole[name].to(base.device, exact).reshape(base.shape)
        linear = name.removesuffix(".weight")
        cls, options = method_of(self.metadata, linear)
        weight = base.to(exact, copy=True)
        return cls.merged_weight(weight, self.merging[linear], options)


class Adapters:
    """Model with adapters by name; `use` chooses some of them. None is in use at first.

    The model's linears are replaced. Every file is read and checked here, as by load_adapter: a UserError for
    one that does not fit the model, before anything is changed.
    """

    def __init__(self, model: RWKV, files: Mapping[str, Any]):
        self.model, self.scale, self.used = model, 1.0, ()
        # dtype of every token on a GPU; the CPU's decoder takes changes in fp32
        self.rounds_to = model.dtype if model.emb.weight.is_cuda else None
        self.random_factors: weakref.WeakValueDictionary[Any, Tensor] = weakref.WeakValueDictionary()
        self.by_name: dict[str, FittedAdapter] = {}
        # the base's tensors, for the time when no adapter replaces them
        self.base: dict[str, nn.Parameter | None] = {}
        self.linears: dict[str, UnmergedLinear | UnmergedEmbedding] = {}
        self.stack = Stack({})
        self.mixes: dict[tuple[Applied, ...], Mix] = {}
        adapters = {name: self._read(path) for name, path in files.items()}
        for name, adapter in adapters.items():
            self._put_beside(name, adapter)

    def add(self, name: str, path: Any) -> None:
        """Read one more adapter; it is not in use yet. Decoders need refresh() after it.

        Raises UserError, before anything changes, for a name that is taken, and for a file as __init__()
        does.
        """
        if name in self.by_name:
            raise UserError(f"there is an adapter {name!r} already, {self.by_name[name].path}; drop it first")
        self._put_beside(name, self._read(path))

    def drop(self, name: str) -> None:
        """Forget an adapter. Raises UserError for an unknown one, and for one that use() has chosen."""
        self._check_names([name])
        if name in self.used:
            raise UserError(f"the model has adapter {name!r} in use; choose another one before it is dropped")
        del self.by_name[name]
        self.stack.forget(name)
        self.mixes.clear()

    def _read(self, path: Any) -> FittedAdapter:
        return read(self.model, path, self.random_factors, self.rounds_to or torch.float32)

    def _put_beside(self, name: str, adapter: FittedAdapter) -> None:
        """Make room for an adapter's changes, which are zero so far."""
        for tensor in adapter.replaced():
            if tensor not in self.base:
                self.base[tensor] = find(self.model, tensor)
        new = [linear for linear in adapter.factors if linear not in self.linears]
        linears = {name: unmerged(self.model.get_submodule(name)) for name in new}
        put_linears(self.model, linears)
        self.linears.update(linears)
        self.by_name[name] = adapter

    @torch.no_grad()
    def use(self, names: Sequence[str] = (), scale: float = 1.0) -> None:
        """Make the model its base with these adapters, each times `scale`.

        Without names it is the base, bit for bit. Decoders keep copies of the model's tensors: call their
        refresh() after this. Raises UserError for unknown names.
        """
        self._check_names(names)
        self._leave()  # first, so that two merged weights never take memory at once
        try:
            self._enter([self.by_name[name] for name in names], float(scale))
            self.used, self.scale = tuple(names), float(scale)
            self._show(self.mix([BASE]))
        except BaseException:  # Ctrl-C, or memory ran out, with some of the weights merged
            self._leave()
            raise

    def rows(self, applied: Sequence[Applied]) -> contextlib.AbstractContextManager[None]:
        """Give row b of the model's input the adapters applied[b] inside the block.

        `applied` has one for every row of the ids (B, T) of features(), or one for all of them. Raises
        UserErrors of check().
        """
        return self.showing(self.mix(applied))

    @contextlib.contextmanager
    def showing(self, mix: Mix) -> Iterator[None]:
        """Let the linears add the changes of the mix inside the block."""
        self._show(mix)
        try:
            yield
        finally:
            self._show(self.mix([BASE]))

    def mix(self, applied: Sequence[Applied]) -> Mix:
        """Build the mix of the linears for rows with these adapters. Raises UserErrors as check() does."""
        key = tuple(applied)
        if key not in self.mixes:
            names = self._names_of(key)
            if len(names) > 1:
                stack, of_rows = self.stacked(key)
                columns = stack.columns
            else:
                columns = self.by_name[names[0]].columns if names else {}
                of_rows = scales(self._as_named(key), names)
            if len(self.mixes) == MIXES:
                self.mixes.clear()
            self.mixes[key] = Mix(columns, shares(columns, of_rows, self.model.emb.weight.device))
        return self.mixes[key]

    def stacked(self, applied: Sequence[Applied]) -> tuple[Stack, Tensor]:
        """Return (a stack with the adapters of these rows, their scales (B, adapters of the stack)).

        The stack stays the same if it has them, or has room for them. Raises UserErrors of check().
        """
        needed = self._names_of([*applied, BASE])
        missing = [name for name in needed if name not in self.stack.names]
        if missing:
            self.mixes.clear()
        if not all(self.stack.take_in(name, self.by_name[name].factors, {*needed}) for name in missing):
            # twice the old room, which is full: it rarely grows
            room = 1 << (len(needed) - 1).bit_length()
            others = [name for name in (*self.stack.names, *self.by_name) if name in self.by_name]
            candidates = [name for name in dict.fromkeys([*needed, *others]) if self.by_name[name].factors]
            self.stack = Stack({name: self.by_name[name].factors for name in candidates[:room]})
        return self.stack, scales(self._as_named(applied), self.stack.names)

    def _as_named(self, applied: Sequence[Applied]) -> list[Applied]:
        """Replace BASE by the choice of use()."""
        return [one if one.names else Applied(self.used, self.scale) for one in applied]

    def _names_of(self, applied: Sequence[Applied]) -> list[str]:
        """Name the adapters with factors that these rows have."""
        for one in {*applied}:
            self.check(one)
        named = dict.fromkeys(name for one in self._as_named(applied) for name in one.names)
        return [name for name in named if self.by_name[name].factors]

    def _show(self, mix: Mix) -> None:
        for name, linear in self.linears.items():
            columns = linear.columns = mix.columns.get(name)
            linear.shares = None if columns is None else mix.shares[columns.owners]

    def _check_names(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.by_name:
                raise UserError(
                    f"there is no adapter {name!r}; there are: {', '.join(self.by_name) or 'none'}"
                )

    def check(self, applied: Applied) -> None:
        """Raise UserError for adapters that one row alone cannot have.

        Those are unknown ones, and ones that change a weight by more than factors, such as DoRA's.
        """
        self._check_names(applied.names)
        if len({*applied.names}) < len(applied.names):
            raise UserError(
                f"adapters {'+'.join(applied.names)}: one is named twice; a scale makes it stronger"
            )
        if not math.isfinite(applied.scale):
            raise UserError(f"the scale of {'+'.join(applied.names)} is {applied.scale}, expected a number")
        for name in applied.names:
            self._refuse_merged(name, f"adapter {name!r} has no form that differs by row")
        for name in self.used if applied.names else ():
            self._refuse_merged(
                name, f"a row cannot have {'+'.join(applied.names)} while the whole model has {name!r}"
            )

    def _refuse_merged(self, name: str, what: str) -> None:
        """Raise UserError, beginning with `what`, for an adapter that is merged when it is chosen."""
        adapter, base = self.by_name[name], self.model.base_identity
        if not (reason := adapter.reason_to_merge()):
            return
        files = {"base": base.path if base and base.path else "BASE.pth", "adapter": str(adapter.path)}
        flags = " ".join(f"--{flag} {shlex.quote(path)}" for flag, path in files.items())
        raise UserError(
            f"{what}: {reason}; merge it and load the result as a model: python -m rwkv_miss merge {flags}"
            " --out merged.pth"
        )

    def factors(self, applied: Applied) -> dict[str, LowRank]:
        """Return a row's changes of the model's linears, by their names: fp32, on a GPU in its dtype.

        BASE stands for the adapters of use(); tensors that use() has put into the model are not repeated
        here. One adapter's changes are its own tensors, those of several are new ones. Raises UserErrors of
        check().
        """
        self.check(applied)
        names, scale = applied if applied.names else (self.used, self.scale)
        return self._factors([self.by_name[name] for name in names], scale)

    def _factors(self, chosen: list[FittedAdapter], scale: float) -> dict[str, LowRank]:
        changes = {}
        for name, linear in self.linears.items():
            factors = [adapter.factors[name] for adapter in chosen if name in adapter.factors]
            if change := together(factors, linear.in_features, scale):
                changes[name] = change
        return changes

    @torch.no_grad()
    def start(self, applied: Applied) -> State | None:
        """Return the state of one row before its first token, from a `state` adapter.

        It is None without one: the row starts as the model does. Raises UserErrors of check().
        """
        self.check(applied)
        return self._start([self.by_name[name] for name in applied.names], applied.scale)

    @torch.no_grad()
    def start_in(self, path: Any) -> State:
        """Read the state before the first token from a file of state tuning. Raises UserError for others."""
        adapter = self._read(path)
        if adapter.factors or adapter.merged_only():
            raise UserError(f"{path} changes weights; expected initial states and nothing else")
        return self._start([adapter], 1.0)

    def _start(self, adapters: list[FittedAdapter], scale: float) -> State | None:
        if not any(is_state(name) for adapter in adapters for name in adapter.whole):
            return None
        start = []
        for layer, before in enumerate(self.model.initial_state(1)):
            name = f"blocks.{layer}.att.time_state"
            changing = [adapter for adapter in adapters if name in adapter.whole]
            wkv = None
            if changing:
                base = self.base[name] if name in self.base else find(self.model, name)
                base = zeros_of(self.model, name) if base is None else base.detach()
                wkv = moved(base, name, changing, scale).unsqueeze(0)
                wkv = wkv.mT.contiguous() if self.model.arch.version == 6 else wkv
            start.append(before._replace(wkv=wkv))
        return start

    def identity(self) -> dict[str, Any]:
        """Identify the adapters in use: equal for the same adapter files at the same scale."""
        names = sorted(self.by_name[name].fingerprint for name in self.used)
        return {"adapters": names, "scale": self.scale if self.used else 1.0}

    def _leave(self) -> None:
        self.mixes.clear()
        for linear in self.linears.values():
            linear.low_rank = linear.columns = None
        for name, tensor in self.base.items():
            put(self.model, name, tensor)
        self.used = ()

    def _enter(self, chosen: list[FittedAdapter], scale: float) -> None:
        for name, change in self._factors(chosen, scale).items():
            self.linears[name].low_rank = change
        for name, tensor in self.base.items():
            changing = [adapter for adapter in chosen if name in adapter.replaced()]
            if changing:
                base = zeros_of(self.model, name) if tensor is None else tensor.detach()
                value = moved(base, name, changing, scale)
                if self.rounds_to and not NEVER_CAST.search(name):
                    value = value.to(self.rounds_to)
                put(self.model, name, value)


@torch.no_grad()
def read(model: RWKV, path, shared: MutableMapping[Any, Tensor], dtype: torch.dtype) -> FittedAdapter:
    """Read an adapter file for a model, with its factors on the model's device. Raises as load_adapter does.

    The factors are rounded to `dtype`. Equal factors A, as VeRA's of one width, are kept once, in `shared`.
    """
    with torch.device("meta"):
        shapes = RWKV(model.arch)
    shapes.base_name, shapes.base_identity = model.base_name, model.base_identity
    # copies, because somebody may train the adapter again and overwrite its file
    linears, whole, metadata = copy.deepcopy(fit_adapter(shapes, path))
    rows = layers_of_rows(metadata["tokens"], metadata["train_parts"])
    if other := next((name for name in metadata["views"] if name not in rows), ""):
        raise UserError(
            f"{path} adapts {other}, which is no linear; merge it into the base (rwkv-miss merge)"
        )
    adapter = FittedAdapter(path, fingerprint(read_checkpoint(path)), metadata, {}, {}, whole)
    for name, tensors in linears.items():
        tensors = {key: tensor.to(model.emb.weight.device) for key, tensor in tensors.items()}
        weight = nn.Parameter(model.get_submodule(name).weight.detach(), requires_grad=False)
        cls, options = method_of(metadata, name)
        if name == "emb":  # a lookup's matrix is the weight transposed
            weight = nn.Parameter(weight.t(), requires_grad=False)
        layer = cls.wrap(weight, None, options, {key: tensors[key] for key in cls.shared})
        layer.assign(tensors)
        factors = factors_of(layer, dtype)
        if factors is None:
            adapter.merging[name] = tensors
        elif factors.A is None:
            adapter.factors[name] = factors
        else:
            adapter.factors[name] = factors._replace(A=kept_once(factors.A, shared))
    return adapter


def kept_once(A: Tensor, shared: MutableMapping[Any, Tensor]) -> Tensor:
    """Return the tensor equal to A that is in `shared`, else A, which is put there."""
    first = shared.setdefault((A.shape, hash(A.float().cpu().numpy().tobytes())), A)
    return first if torch.equal(first, A) else A


def moved(base: Tensor, name: str, adapters: list[FittedAdapter], scale: float) -> Tensor:
    """Compute base + scale times the sum of (value - base) over the adapters, in fp32.

    With one adapter and scale 1 it is exactly the adapter's value.
    """
    exact = base.to(torch.promote_types(base.dtype, torch.float32))
    first, *others = adapters
    result = exact.lerp(first.value(name, base), scale)
    for adapter in others:
        result.add_(adapter.value(name, base) - exact, alpha=scale)
    return result


def find(model: RWKV, name: str) -> nn.Parameter | None:
    """Find a parameter of the model; None for an initial state that it does not have."""
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)


def put(model: RWKV, name: str, tensor: Tensor | None) -> None:
    owner, _, leaf = name.rpartition(".")
    if tensor is not None and not isinstance(tensor, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=False)
    setattr(model.get_submodule(owner), leaf, tensor)


def zeros_of(model: RWKV, name: str) -> Tensor:
    """Make the initial state of a layer without one: zeros, which change nothing."""
    arch = model.arch
    return torch.zeros(arch.n_head, arch.head_size, arch.head_size, device=model.emb.weight.device)
