"""Adapters that run beside their base: y = W x + scale B (A x). Choosing others takes milliseconds.

Most methods change a weight by a matrix of low rank: MiSS, LoRA, PiSSA, VeRA and others. Their two factors
are kept here in fp32, by AdapterLinear.low_rank(). The others (DoRA, Bat, MiSS with a magnitude) keep the
tensors of their file. The weights that these change are merged in fp32 when the adapter is chosen. A tensor T
that was trained as a whole, or an initial state, stands for base + scale (T - base).

On a GPU what is chosen is then rounded to the dtype of the activations: once, and not for every token.
"""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_miss.adapter import METHODS, put_linears
from rwkv_miss.errors import UserError, listed
from rwkv_miss.files.checkpoint import read_checkpoint
from rwkv_miss.files.identity import Identity
from rwkv_miss.functional import lora_linear, miss_linear, shard_index
from rwkv_miss.inject import fit_adapter
from rwkv_miss.merging.members import is_state

from ..model import RWKV, State
from ..model.layers import Linear

# what a GPU's kernels read in any dtype: shares of the token shift, vectors between the products, states
NEVER_CAST = re.compile(r"\.(x_[rwkvag]|time_maa_[xwkvrg]|k_k|k_a|r_k|ln_x\.weight|ln_x\.bias|time_state)$")


class Applied(NamedTuple):
    """The adapters of one row of a batch, by their names, each times `scale`."""

    names: tuple[str, ...] = ()
    scale: float = 1.0


# a row that asks for no adapter has what Adapters.use() chose for the whole model
BASE = Applied()


class LowRank(NamedTuple):
    """What is added to a weight (out, in): scale B A."""

    # (r, in) fp32; None for MiSS: its A x is the sums of strided shards, x[j] + x[j + r] + ...
    A: Tensor | None
    B: Tensor  # (out, r) fp32
    scale: float

    def rounded(self, dtype: torch.dtype) -> LowRank:
        """The same in the dtype of a product, with the scale in B where the operator would put it there."""
        if self.A is None:
            return self._replace(B=self.B.to(dtype))
        return LowRank(self.A.to(dtype), (self.B * self.scale).to(dtype), 1.0)


class UnmergedLinear(Linear):
    """A linear of the model with what an adapter adds, or nothing, beside its weight."""

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)  # not nn.Linear's, which would make a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.low_rank: LowRank | None = None
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.low_rank is None:
            return super().forward(x)
        weight = self.weight.to(x.dtype) if self.weight.is_floating_point() else self.weight
        A, B, scale = self.low_rank
        if A is None:
            return miss_linear(x, weight, None, B.t(), scale=scale)
        return lora_linear(x, weight, None, A, B, scale)


@dataclasses.dataclass
class Adapter:
    """An adapter file that fits the model."""

    path: Any
    identity: Identity
    metadata: dict[str, Any]
    factors: dict[str, LowRank]  # of linears
    merging: dict[str, dict[str, Tensor]]  # the file's tensors of linears that have no factors
    whole: dict[str, Tensor]  # tensors that were trained as a whole

    def replaced(self) -> list[str]:
        """The names of the model's tensors that have another value with it."""
        return [*(f"{name}.weight" for name in self.merging), *self.whole]

    def merged_only(self) -> list[str]:
        """Those of replaced() that cannot differ by row: an initial state can, since each row has its own."""
        return [name for name in self.replaced() if not is_state(name)]

    def value(self, name: str, base: Tensor) -> Tensor:
        """The value of one of replaced(), in fp32, given the base's."""
        exact = torch.promote_types(base.dtype, torch.float32)
        if name in self.whole:
            return self.whole[name].to(base.device, exact).reshape(base.shape)
        linear = name.removesuffix(".weight")
        cls, options = method_of(self.metadata)
        weight = base.to(exact, copy=True)
        return cls.merged_weight(weight, self.merging[linear], options.at(linear))


class Adapters:
    """A model with adapters by name; `use` chooses some of them. None is in use at first.

    The model's linears are replaced. Every file is read and checked here, as by load_adapter: a UserError for
    one that does not fit the model, before anything is changed.
    """

    def __init__(self, model: RWKV, files: Mapping[str, Any]):
        self.model, self.scale, self.used = model, 1.0, ()
        # what a GPU computes every token in. A CPU's decoder takes what is added in fp32
        self.rounds_to = model.dtype if model.emb.weight.is_cuda else None
        shared: dict[Any, Tensor] = {}
        self.by_name = {name: read(model, path, shared) for name, path in files.items()}
        adapters = self.by_name.values()
        # the base's tensors, for when no adapter replaces them
        self.base = {name: find(model, name) for adapter in adapters for name in adapter.replaced()}
        names = {name for adapter in adapters for name in adapter.factors}
        self.linears = {name: UnmergedLinear(model.get_submodule(name)) for name in names}
        put_linears(model, self.linears)

    @torch.no_grad()
    def use(self, names: Sequence[str] = (), scale: float = 1.0) -> None:
        """Make the model its base with these adapters, each times `scale`.

        Without names it is the base, bit for bit. Decoders keep copies of the model's tensors: call their
        refresh() after this. UserError for unknown names.
        """
        self._check_names(names)
        self._leave()  # first, so that two merged weights never take memory at once
        try:
            self._enter([self.by_name[name] for name in names], float(scale))
        except BaseException:  # Ctrl-C, or memory ran out, with some of the weights merged
            self._leave()
            raise
        self.used, self.scale = tuple(names), float(scale)

    def _check_names(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.by_name:
                raise UserError(
                    f"there is no adapter {name!r}; there are: {', '.join(self.by_name) or 'none'}"
                )

    def check(self, applied: Applied) -> None:
        """UserError for adapters that a row cannot have while others have other ones.

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
        """UserError, beginning with `what`, where the adapter is one that is merged when it is chosen."""
        adapter = self.by_name[name]
        if not (merged := adapter.merged_only()):
            return
        method, base = adapter.metadata["method"], self.model.base_identity
        files = {"base": base.path if base and base.path else "BASE.pth", "adapter": str(adapter.path)}
        flags = " ".join(f"--{flag} {shlex.quote(path)}" for flag, path in files.items())
        raise UserError(
            f"{what}: {method} has other values of {listed(merged, 3)}; merge it and load the result as a"
            f" model: python -m rwkv_miss merge {flags} --out merged.pth"
        )

    def factors(self, applied: Applied) -> dict[str, LowRank]:
        """What a row's adapters add to the model's linears, by their names, in fp32.

        For BASE it is that of use(), beside the tensors that use() has put into the model. Of one adapter
        they are the adapter's own tensors, of several they are new ones. UserErrors of check().
        """
        self.check(applied)
        names, scale = applied if applied.names else (self.used, self.scale)
        return self._factors([self.by_name[name] for name in names], scale)

    def _factors(self, chosen: list[Adapter], scale: float) -> dict[str, LowRank]:
        found = {}
        for name, linear in self.linears.items():
            factors = [adapter.factors[name] for adapter in chosen if name in adapter.factors]
            if change := together(factors, linear.in_features, scale):
                found[name] = change
        return found

    @torch.no_grad()
    def start(self, applied: Applied) -> State | None:
        """The state of one row before its first token, of a `state` adapter.

        None where the adapters have none: the row starts as the model does. UserErrors of check().
        """
        self.check(applied)
        adapters = [self.by_name[name] for name in applied.names]
        if not any(is_state(name) for adapter in adapters for name in adapter.whole):
            return None
        start = []
        for layer, before in enumerate(self.model.initial_state(1)):
            name = f"blocks.{layer}.att.time_state"
            changing = [adapter for adapter in adapters if name in adapter.whole]
            wkv = None
            if changing:
                base = self.base[name]
                base = zeros_of(self.model, name) if base is None else base.detach()
                wkv = moved(base, name, changing, applied.scale).unsqueeze(0)
                wkv = wkv.mT.contiguous() if self.model.arch.version == 6 else wkv
            start.append(before._replace(wkv=wkv))
        return start

    def identity(self, rule: str = "fingerprint") -> dict[str, Any]:
        """What the model is beside its base, by a rule of Identity.

        It is the same for the same adapter files at the same scale.
        """
        names = sorted(getattr(self.by_name[name].identity, rule) for name in self.used)
        return {"adapters": names, "scale": self.scale if self.used else 1.0}

    def is_recorded(self, identity: Mapping[str, Any]) -> bool:
        """Whether this is the identity() of the adapters in use, whatever its rule."""
        return any(identity == self.identity(rule) for rule in ("fingerprint", "sampled"))

    def _leave(self) -> None:
        for linear in self.linears.values():
            linear.low_rank = None
        for name, tensor in self.base.items():
            put(self.model, name, tensor)
        self.used = ()

    def _enter(self, chosen: list[Adapter], scale: float) -> None:
        for name, change in self._factors(chosen, scale).items():
            self.linears[name].low_rank = change.rounded(self.rounds_to) if self.rounds_to else change
        for name, tensor in self.base.items():
            changing = [adapter for adapter in chosen if name in adapter.replaced()]
            if changing:
                base = zeros_of(self.model, name) if tensor is None else tensor.detach()
                value = moved(base, name, changing, scale)
                if self.rounds_to and not NEVER_CAST.search(name):
                    value = value.to(self.rounds_to)
                put(self.model, name, value)


def method_of(metadata: Mapping[str, Any]) -> tuple[Any, Any]:
    """(class, options) of the method of an adapter file."""
    cls = METHODS[metadata["method"]]
    return cls, cls.Options.parse(metadata["options"])


@torch.no_grad()
def read(model: RWKV, path, shared: dict[Any, Tensor]) -> Adapter:
    """An adapter file for a model, with its factors on the model's device. UserErrors of load_adapter.

    Equal factors A are kept once, in `shared`; all of VeRA's of one width are equal.
    """
    with torch.device("meta"):
        shapes = RWKV(model.arch)
    shapes.base_name, shapes.base_identity = model.base_name, model.base_identity
    linears, whole, metadata = fit_adapter(shapes, path)
    cls, options = method_of(metadata) if linears else (None, None)
    adapter = Adapter(path, Identity(tensors=read_checkpoint(path)), metadata, {}, {}, whole)
    for name, own in linears.items():
        own = {key: tensor.to(model.emb.weight.device) for key, tensor in own.items()}
        weight = nn.Parameter(model.get_submodule(name).weight.detach(), requires_grad=False)
        layer = cls.wrap(weight, None, options.at(name), {key: own[key] for key in cls.shared})
        layer.assign(own)
        factors = layer.low_rank()
        if factors is None:
            adapter.merging[name] = own
            continue
        A, B = (factor.detach().float().contiguous() for factor in factors)
        is_miss = torch.equal(A, strided_shards(*A.shape, A.device))
        adapter.factors[name] = LowRank(None if is_miss else kept_once(A, shared), B, 1.0)
    return adapter


def strided_shards(rank: int, width: int, device) -> Tensor:
    """MiSS's A (r, in), of ones and zeros."""
    return F.one_hot(shard_index(width, rank, device=device), rank).t().float()


def kept_once(A: Tensor, shared: dict[Any, Tensor]) -> Tensor:
    """The tensor equal to A that is in `shared` already, else A, which is put there."""
    first = shared.setdefault((A.shape, hash(A.cpu().numpy().tobytes())), A)
    return first if torch.equal(first, A) else A


def together(changes: list[LowRank], width: int, scale: float) -> LowRank | None:
    """What several adapters add to a weight (out, in = width), times `scale`."""
    if not changes:
        return None
    if len(changes) == 1:
        return changes[0]._replace(scale=scale)
    A = []
    for change in changes:
        rank = change.B.shape[1]
        A.append(strided_shards(rank, width, change.B.device) if change.A is None else change.A)
    return LowRank(torch.cat(A), torch.cat([change.B for change in changes], 1), scale)


def moved(base: Tensor, name: str, adapters: list[Adapter], scale: float) -> Tensor:
    """base + scale times the sum of (value - base) over the adapters, in fp32.

    With one adapter and scale 1 it is exactly the adapter's value.
    """
    exact = base.to(torch.promote_types(base.dtype, torch.float32))
    first, *others = adapters
    result = exact.lerp(first.value(name, base), scale)
    for adapter in others:
        result.add_(adapter.value(name, base) - exact, alpha=scale)
    return result


def find(model: RWKV, name: str) -> nn.Parameter | None:
    """A parameter of the model; None for an initial state that it has not."""
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)


def put(model: RWKV, name: str, tensor: Tensor | None) -> None:
    owner, _, leaf = name.rpartition(".")
    if tensor is not None and not isinstance(tensor, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=False)
    setattr(model.get_submodule(owner), leaf, tensor)


def zeros_of(model: RWKV, name: str) -> Tensor:
    """The initial state of a layer that has none: it changes nothing."""
    arch = model.arch
    return torch.zeros(arch.n_head, arch.head_size, arch.head_size, device=model.emb.weight.device)
