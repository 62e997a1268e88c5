"""Work of a GPU, operator by operator: the kind, kernel launches, bytes, multiply-adds.

`Tally.add` takes each call that a dispatch mode sees; gpu_emulation/fake_gpu has such a mode. No values are
needed: shapes, dtypes and strides are enough.

Launches are those of torch 2.13 on CUDA: one for most operators; MULTIPLE has the numbers of the others.
Bytes are the least that a launch must move: each tensor that it reads, once, and each that it writes, once.
An expanded dimension is not read again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from .wkv_budget import segments

# kinds that count as elementwise traffic: all but products, WKV, loss and optimizer
TRAFFIC = ("elementwise", "norm", "reduction", "copy")

# operators that launch nothing
VIEWS = set(
    """
    view _unsafe_view t transpose permute expand unsqueeze squeeze slice select alias detach as_strided unbind
    split split_with_sizes unfold _reshape_alias reshape lift_fresh diagonal view_as_real resolve_conj
    resolve_neg is_same_size set_ stride size device
    empty empty_like new_empty empty_strided new_empty_strided
""".split()
)
PRODUCTS = set("mm addmm addmm_ bmm baddbmm baddbmm_ mv addmv addmv_ dot linear matmul".split())
NORMS = ("native_layer_norm", "native_group_norm")
REDUCTIONS = set(
    "sum mean max min amax amin argmax argmin any all norm linalg_vector_norm cumsum prod nansum".split()
)
COPIES = set("_to_copy copy_ _foreach_copy_ clone cat stack repeat constant_pad_nd flip roll".split())
GATHERS = set("index embedding gather index_select take nonzero".split())
SCATTERS = set(
    "index_put index_put_ _index_put_impl_ index_add_ scatter scatter_ embedding_dense_backward".split()
)
FILLS = set("fill_ zero_ zeros zeros_like new_zeros ones ones_like new_ones full full_like arange".split())
# operators of torch with several launches -> their number
MULTIPLE = {
    "native_group_norm": 2,  # the moments, then the numbers
    "native_group_norm_backward": 3,
    "embedding_dense_backward": 3,
    "nonzero": 3,
}

# aten/src/ATen/native/cuda/MultiTensorApply.cuh: most tensors of one launch for 1, 2, ... lists of tensors
LIST_TENSORS = (110, 64, 48, 36, 30)
LIST_BLOCKS, LIST_CHUNK = 320, 65536


def list_launches(tensors: Sequence[Tensor], lists: int) -> int:
    """Count the launches of a `_foreach` or `_fused` operator over `lists` lists of tensors as large as
    these.
    """
    most, launches, held, blocks = LIST_TENSORS[lists - 1], 0, 0, 0
    for tensor in tensors:
        held += 1
        left = -(-tensor.numel() // LIST_CHUNK)
        while left:
            taken = min(left, LIST_BLOCKS - blocks)
            left, blocks = left - taken, blocks + taken
            if blocks == LIST_BLOCKS or held == most and not left:
                launches, blocks, held = launches + 1, 0, 1 if left else 0
    return launches + (held > 0)


def _wkv(version: int, backward: bool, chunked: bool = False) -> Callable[[tuple], int]:
    def launches(args: tuple) -> int:
        B, T, H, _ = tensors_in(args)[0].shape
        if not (chunked or args[-1]):
            # the recurrence; its backward has four launches for 512 tokens, then the decay's, and for v6 the
            # bonus's
            return 4 * -(-T // 512) + {6: 2, 7: 1}[version] if backward else 1
        # each segment has kernels prepare and scan, a backward also gradients; v6 sums the bonus at the end
        return segments(B, T, H) * (3 if backward else 2) + (backward and version == 6)

    return launches


def _with_gradients_of_vectors(args: tuple) -> int:
    """Count the launches of a backward whose last argument asks for gradients of vectors, which are summed by
    a second launch.
    """
    return 1 + bool(args[-1])


# this project's operators -> (kind, number of launches)
KERNELS: dict[str, tuple[str, int | Callable[[tuple], int]]] = {
    "wkv6": ("wkv", _wkv(6, False)),
    "wkv6_backward": ("wkv", _wkv(6, True)),
    "wkv7": ("wkv", _wkv(7, False)),
    "wkv7_backward": ("wkv", _wkv(7, True)),
    "mix7_chunked": ("wkv", _wkv(7, False, True)),
    "mix7_chunked_backward": ("wkv", _wkv(7, True, True)),
    "dequantise": ("dequantise", 1),
    "drop": ("elementwise", 1),
    "softmax_loss_": ("loss", 1),
    "add_layer_norm": ("norm", 1),
    "norm_shift": ("norm", 1),
    "norm_shift_backward": ("norm", 1),
    "add_layer_norm_backward": ("norm", _with_gradients_of_vectors),
    **{
        name: ("elementwise", 1)
        for name in """
            relu_squared gated gated_backward value_residual delta_inputs readout6 readout7 shift_mix
            mix7_inputs mix7_readout shift_mix_token relu_squared_backward value_residual_backward
        """.split()
    },
    **{
        f"{name}_backward": ("elementwise", _with_gradients_of_vectors)
        for name in ("delta_inputs", "readout6", "readout7", "shift_mix_token")
    },
    "mix7_inputs_backward": ("elementwise", lambda args: 1 + args[5]),
    # arguments r, k and a are there if the vectors are trained
    "mix7_readout_backward": ("elementwise", lambda args: 1 + bool(args[2])),
    # argument z is there if the mixes are trained
    "shift_mix_backward": ("elementwise", lambda args: 1 + (args[1] is not None)),
}


def kind_of(name: str, ours: bool, in_loss: bool) -> str:
    """Return the kind of an operator that is no product; `in_loss`: src/model/loss.py calls it."""
    if ours:
        kind = KERNELS[name][0]
    elif name in COPIES | GATHERS | SCATTERS | FILLS:
        kind = "copy"
    elif name.startswith(("_foreach", "_fused")):
        kind = "optimizer"
    elif name.startswith(NORMS):
        kind = "norm"
    elif name in REDUCTIONS:
        kind = "reduction"
    else:
        kind = "elementwise"
    return "loss" if in_loss and kind in TRAFFIC else kind


def launches_of(name: str, args: tuple, ours: bool) -> int:
    if name in VIEWS:
        return 0
    if ours:
        count = KERNELS[name][1]
        return count if isinstance(count, int) else count(args)
    if name.startswith(("_foreach", "_fused")):
        lists = sum(isinstance(x, (list, tuple)) and bool(x) and isinstance(x[0], Tensor) for x in args)
        return list_launches(args[0], min(max(lists, 1), len(LIST_TENSORS)))
    if name == "native_layer_norm_backward":
        return 1 + any(args[-1][1:])  # a second launch computes the gradients of weight and bias
    return MULTIPLE.get(name, 1)


def spanned(x: Tensor) -> int:
    """Count the bytes of a tensor, each place in memory once."""
    return x.element_size() * math.prod(n for n, step in zip(x.shape, x.stride(), strict=True) if step)


def tensors_in(values: Iterable) -> list[Tensor]:
    """List the tensors among the arguments of an operator, directly or in lists. torch's function for any
    nesting takes several times as long.
    """
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value)
    return found


def traffic(name: str, args: tuple, kwargs: dict, result) -> int:
    """Count the bytes that an operator reads and writes."""
    written = sum(map(spanned, tensors_in((result,))))
    if name in FILLS:
        return written
    if name == "copy_":
        return written + spanned(args[1])
    if name in GATHERS:
        return 2 * written + sum(spanned(x) for x in tensors_in(args[1:]))
    if name in SCATTERS:
        return 2 * sum(spanned(x) for x in tensors_in(args[1:]) if x.is_floating_point())
    if name == "softmax_loss_":  # the gradient is written into its first argument
        return written + sum(map(spanned, tensors_in(args))) + args[0].numel() * args[3].itemsize
    if name == "mix7_inputs_backward":  # dr is also written, and dv without a value residual
        written += spanned(args[0]) + (0 if args[6] else spanned(args[1]))
    read = tensors_in(args) + tensors_in(x for key, x in kwargs.items() if key != "out")
    if name in ("addmm", "addmm_", "baddbmm", "baddbmm_") and kwargs.get("beta", 1) == 0:
        read = read[1:]
    return written + sum(map(spanned, read))


def multiply_adds(name: str, args: tuple, result) -> int:
    """Count the multiply-adds of a matrix product."""
    left = args[1] if name.startswith(("add", "badd")) else args[0]
    return result.numel() * left.shape[-1]


class Tally:
    """Launches, bytes and multiply-adds by kind; `operators`: calls, launches and bytes of each operator."""

    def __init__(self):
        self.operators = {"calls": Counter(), "launches": Counter(), "bytes": Counter()}
        self.launches, self.bytes, self.multiply_adds = Counter(), Counter(), Counter()

    def add(
        self,
        op,
        args: tuple,
        kwargs: dict,
        result,
        in_loss: bool = False,
        of_base: Callable[[Tensor], bool] = lambda tensor: True,
    ) -> None:
        """Count a call of an OpOverload. of_base(tensor): whether a tensor is a weight of the base model."""
        name, ours = op._schema.name.split("::")[1], op.namespace in ("rwkv", "rwkv_miss")
        launches = launches_of(name, args, ours)
        if not launches:
            return
        if not ours and name in PRODUCTS:
            kind = "product" if any(map(of_base, tensors_in(args))) else "adapter product"
            self.multiply_adds[kind] += multiply_adds(name, args, result)
        else:
            kind = kind_of(name, ours, in_loss)
        moved = traffic(name, args, kwargs, result)
        self.launches[kind] += launches
        self.bytes[kind] += moved
        self.operators["calls"][f"{kind}: {name}"] += 1
        self.operators["launches"][f"{kind}: {name}"] += launches
        self.operators["bytes"][f"{kind}: {name}"] += moved

    def as_dict(self) -> dict[str, dict[str, int]]:
        kinds = {name: dict(getattr(self, name)) for name in ("launches", "bytes", "multiply_adds")}
        return kinds | {f"{name} of operators": dict(counts) for name, counts in self.operators.items()}


def difference(more: dict[str, dict[str, int]], less: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """Subtract one as_dict() from another."""
    return {
        what: {
            kind: count - less[what].get(kind, 0)
            for kind, count in kinds.items()
            if count != less[what].get(kind, 0)
        }
        for what, kinds in more.items()
    }
