"""Fig. 5: FLOPs, saved bytes and parameters of each method's adapted linear, measured and by formulas.

FLOPs are those of the matrix products of a forward and a backward, counted as they are executed, also inside
this project's operators, minus the frozen linear's own 4 N k d. "Saved" are the bytes that the forward keeps
for its backward, without parameters and buffers.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .methods import adapted_linear, systems
from .results import Claim, PaperResult, Table
from .settings import option


@dataclasses.dataclass(frozen=True)
class Settings:
    shapes: tuple[str, ...] = option(
        ("512,768,768,32", "512,768,3072,32", "2048,2048,2048,32", "512,2560,8960,32"),
        "tokens, inputs, outputs, rank of LoRA; the others get the rank of as many parameters",
    )


FULL = Settings()
TINY = Settings(shapes=("33,48,40,4",))


@dataclasses.dataclass(frozen=True)
class AdapterCost:
    """Cost of an adapter without its linear: FLOPs of both passes, numbers kept in between, parameters."""

    flops: int
    saved: int
    parameters: int


def _miss(
    N: int, k: int, d: int, rank: int, shards="plain", mini_r=0, magnitude=False, expand=False, **_
) -> AdapterCost:
    if expand:  # equation 1: x D^T, and the outputs' shards in the backward
        return AdapterCost(6 * N * rank * k, N * k, rank * k)
    rows, columns = rank + (shards == "balanced"), mini_r or d
    return AdapterCost(
        6 * N * rows * columns, N * rows + magnitude * d * (N + 2), rows * columns + magnitude * d
    )


def _mora(N: int, k: int, d: int, rank: int) -> AdapterCost:
    size = math.isqrt(rank * (k + d))
    return AdapterCost(6 * N * size**2, N * size, size**2)


def _bat(N: int, k: int, d: int, rank: int, order="col") -> AdapterCost:
    if order == "row":  # x D for the blocks of x, and two such products in the backward
        return AdapterCost(6 * N * k * rank, N * k, k * rank)
    # the gradient of the whole weight, and W + dW twice
    return AdapterCost(2 * N * k * d + 6 * k * d * rank, N * k, d * rank)


def _lora(N: int, k: int, d: int, rank: int) -> AdapterCost:
    return AdapterCost(6 * N * rank * (k + d), N * (k + rank), rank * (k + d))


def _scaled_lora(N: int, k: int, d: int, rank: int) -> AdapterCost:
    # also kept: B times the factor, which is computed once for forward and backward
    lora = _lora(N, k, d, rank)
    return AdapterCost(lora.flops, lora.saved + rank * d, lora.parameters)


def _dora(N: int, k: int, d: int, rank: int) -> AdapterCost:
    # W A^T, A A^T and B (A A^T), which do not depend on N
    lora, norms = (_scaled_lora(N, k, d, rank), 2 * rank * (k * d + rank * (k + d)))
    return AdapterCost(lora.flops + norms, lora.saved + d * (N + 2), lora.parameters + d)


def _adalora(N: int, k: int, d: int, rank: int, init_rank: int) -> AdapterCost:
    lora = _lora(N, k, d, init_rank)  # before the pruning, without the penalty
    return AdapterCost(lora.flops, lora.saved + init_rank * (d + 1), lora.parameters + init_rank)


def _prolora(N: int, k: int, d: int, rank: int, unshared: int, shares: int) -> AdapterCost:
    shared = rank - unshared
    return dataclasses.replace(
        _put_together(N, k, d, rank),
        parameters=shared * (-(-k // shares) - (-d // shares)) + unshared * (k + d),
    )


def _mos(N: int, k: int, d: int, rank: int, budget: int, shards=4) -> AdapterCost:
    private = budget // 4
    pools = (budget - private) * shards * (-(-k // shards) - (-d // shards))
    return dataclasses.replace(_put_together(N, k, d, rank), parameters=pools + private * (k + d))


def _put_together(N: int, k: int, d: int, rank: int) -> AdapterCost:
    """Count a LoRA whose A and B are computed in the forward, and kept."""
    lora = _lora(N, k, d, rank)
    return dataclasses.replace(lora, saved=lora.saved + rank * (k + d))


# method -> cost for N tokens, k inputs, d outputs and the method's options
FORMULAS: dict[str, Callable[..., AdapterCost]] = {
    "miss": _miss,
    "mora": _mora,
    "bat": _bat,
    "lora": _scaled_lora,
    "pissa": _lora,
    "dora": _dora,
    "adalora": _adalora,
    "prolora": _prolora,
    "mos": _mos,
    "lora_fa": lambda N, k, d, rank: AdapterCost(N * rank * (4 * k + 6 * d), (N + d) * rank, rank * d),
    "vera": lambda N, k, d, rank: AdapterCost(N * rank * (4 * k + 6 * d) + 4 * d * rank, N * rank, rank + d),
}


def _product_flops(x: Tensor, weight: Tensor, *args, **kwargs) -> int:
    return 2 * x.numel() * weight.shape[0]


# operators that torch's counter does not know -> FLOPs: oneDNN's, linear() inside this project's operators,
# and others
PRODUCTS = {
    "aten.linear.default": _product_flops,
    "aten.addmm_.default": lambda y, x, matrix, **kwargs: 2 * x.numel() * matrix.shape[1],
    "aten.mv.default": lambda matrix, x, **kwargs: 2 * matrix.numel(),
    "mkldnn._linear_pointwise.default": _product_flops,
    "mkldnn._linear_pointwise.binary": lambda x, other, weight, *args, **kwargs: _product_flops(x, weight),
}


class Flops(TorchDispatchMode):
    """Counts the FLOPs of the matrix products that run inside it, also inside operators of this project."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "rwkv_miss":  # the operators that this one calls are also counted here
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        out = func(*args, **kwargs)
        if (count := PRODUCTS.get(str(func))) is not None:
            self.total += count(*args, **kwargs)
        elif (count := flop_registry.get(func._overloadpacket)) is not None:
            self.total += count(*args, **kwargs, out_val=out)
        return out


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Count the bytes that layer(x) keeps for its backward: each memory once, without parameters and
    buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        y = layer(x)
    assert y.requires_grad
    return sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own)


def measure(layer: nn.Module, tokens: int) -> AdapterCost:
    """Count the cost of an adapted linear, fp32, with an input that needs a gradient, as inside a model."""
    x = torch.randn(tokens, layer.in_features, requires_grad=True)
    layer(x).sum().backward()  # not counted, because the first call also makes gemm.py's test of oneDNN
    with Flops() as flops:
        layer(x).sum().backward()
    frozen = 4 * tokens * layer.in_features * layer.out_features
    return AdapterCost(
        flops.total - frozen,
        saved_bytes(layer, x) // x.element_size(),
        sum(p.numel() for p in layer.parameters() if p.requires_grad),
    )


def rows(shape: str) -> Iterator[dict[str, Any]]:
    """Yield for each system the measured figures and those of its method's formula."""
    N, k, d, rank = map(int, shape.split(","))
    for label, (method, options) in systems(rank, k, d).items():
        cost = measure(adapted_linear(k, d, method, options), N)
        formula = FORMULAS[method](N, k, d, **options) if method in FORMULAS else None
        yield {
            "system": label,
            "rank": options["rank"],
            "cost": cost,
            "formula": formula,
            "frozen": 4 * N * k * d,
        }


COLUMNS = "system|rank|parameters|by formula|MFLOP|MFLOP by formula|x frozen|saved KiB|KiB by formula".split(
    "|"
)


def table(shape: str, measured: list[dict[str, Any]]) -> Table:
    cells = []
    for row in measured:
        cost, formula = row["cost"], row["formula"]
        cells.append(
            (
                row["system"],
                row["rank"],
                cost.parameters,
                formula and formula.parameters,
                cost.flops / 1e6,
                formula and formula.flops / 1e6,
                1 + cost.flops / row["frozen"],
                cost.saved / 256,
                formula and formula.saved / 256,
            )
        )
    N, k, d, _ = shape.split(",")
    return Table(
        f"{N} tokens, {k} inputs, {d} outputs (fp32; x frozen: FLOPs against the frozen linear's alone)",
        COLUMNS,
        cells,
    )


def claims(measured: dict[str, list[dict[str, Any]]]) -> list[Claim]:
    costs = [{row["system"]: row["cost"] for row in rows} for rows in measured.values()]

    def ratios(count: str, label: str, to: str) -> tuple[float, float]:
        """Return the smallest and the largest ratio among the shapes."""
        found = [getattr(cost[label], count) / getattr(cost[to], count) for cost in costs]
        return min(found), max(found)

    every = itertools.chain.from_iterable(measured.values())
    wrong = sorted({row["system"] for row in every if row["cost"] != row["formula"]})
    counted = "counted exactly, as are the FLOPs and what is kept for the backward"
    if wrong:
        counted = f"the counts of {', '.join(wrong)} are others than the formulas'"
    flops, saved = ratios("flops", "miss", "lora"), ratios("saved", "lora", "miss")
    saved_fa = ratios("saved", "lora_fa", "miss")
    by_output = ratios("flops", "miss, expand", "miss")
    kept_by_output = ratios("saved", "miss, expand", "miss")
    return [
        Claim("rank r costs r d parameters, where LoRA's costs r (d + k)", counted, not wrong),
        Claim(
            "MiSS computes less than LoRA",
            f"at equal rank, not at equal parameters: {flops[0]:.3f} to {flops[1]:.3f} of LoRA's FLOPs"
            " (agrees: at most 0.95)",
            flops[1] <= 0.95,
        ),
        Claim(
            "MiSS needs less memory than LoRA",
            f"LoRA keeps {saved[0]:.0f} to {saved[1]:.0f} times as much for the backward: its input, where"
            f" MiSS keeps the shard sums. LoRA-FA keeps {saved_fa[0]:.2f} to {saved_fa[1]:.2f} times MiSS's",
            saved[0] > 1,
        ),
        Claim(
            "shards of inputs (equations 2-3) are cheaper than shards of outputs (equation 1)",
            f"in memory: equation 1 keeps {kept_by_output[0]:.0f} to {kept_by_output[1]:.0f} times as much,"
            f" with {by_output[0]:.2f} to {by_output[1]:.2f} of the FLOPs",
            kept_by_output[0] > 1,
        ),
    ]


def draw(shape: str, measured: list[dict[str, Any]], figure) -> None:
    """Draw three bars a system: FLOPs, saved and parameters, formulas as marks."""
    names = [row["system"] for row in measured]
    axes = figure.subplots(1, 3, sharey=True)
    parts = (
        ("FLOPs (forward + backward)", lambda c: c.flops),
        ("numbers kept for the backward", lambda c: c.saved),
        ("parameters", lambda c: c.parameters),
    )
    for axis, (title, read) in zip(axes, parts, strict=True):
        axis.barh(names, [read(row["cost"]) for row in measured], color="#4c78a8")
        known = [row for row in measured if row["formula"]]
        axis.plot(
            [read(row["formula"]) for row in known],
            [row["system"] for row in known],
            "k|",
            markersize=14,
            label="formula",
        )
        axis.set_title(title)
        axis.invert_yaxis()
    axes[0].legend()
    figure.suptitle(f"Beside the frozen linear: tokens, inputs, outputs, LoRA's rank = {shape}")


def run(settings: Settings) -> PaperResult:
    torch.manual_seed(0)
    measured = {shape: list(rows(shape)) for shape in settings.shapes}
    shape = settings.shapes[0]
    return PaperResult(
        "Complexity: FLOPs, memory and parameters of one adapted linear (Fig. 5)",
        "Every method at LoRA's parameter count. FLOPs are counted in the matrix products as they run,"
        " forward and backward, less the frozen linear's 4 N k d; adds, such as MiSS's shard sums, are none"
        " of them. Saved is what the forward keeps for the backward.",
        claims(measured),
        [table(shape, rows) for shape, rows in measured.items()],
        lambda figure: draw(shape, measured[shape], figure),
    )
