"""The native elementwise functions as torch.library ops, `rwkv::NAME` and `rwkv::NAME_backward`.

cuda/elementwise_cpu.cpp and cuda/elementwise.cu compute them, each with the C interface that it describes.
Activations (B, T, C) are contiguous and of one dtype, vectors of the model have any dtype. A backward
recomputes what it needs from the kept activations. These are the inputs; relu_squared keeps its output, and
the token shift with fixed mixes keeps none. Gradients of vectors are computed on a GPU only.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rwkv_miss.functional import with_shard_sums
from rwkv_miss.gemm import product, product_transposed

from .launch_errors import require_started
from .native import DTYPE_CODES, EXACT_STRIDES, addresses, library, once_differentiable, vector_dtypes


def on_gpu(like: Tensor) -> bool:
    """Tell whether the functions of the device of `like` are those of cuda/elementwise.cu."""
    return library(like.device.type).device == "cuda"


def call(
    function: str,
    like: Tensor,
    before: Sequence[Tensor | list[Tensor] | None],
    vectors: Sequence[Tensor],
    after: Sequence[Tensor | list[Tensor] | None],
    gradients: Sequence[Tensor] | None = None,
    heads: int = 1,
    eps: float = 0.0,
    count: int | None = None,
    rank: int | None = None,
) -> None:
    """Run a function of the C interface with the sizes and the dtype of `like`, (B, T, C) or (tokens, C).

    Its pointers are `before`, the vectors of the model and `after`. `gradients` of the vectors are for a
    backward. `count` is that of a token shift's mixes. `rank` is that of shard sums, for functions that have
    them on a GPU, or 0.
    """
    device = like.device
    gpu = on_gpu(like)
    batch, T, C = like.shape if like.dim() == 3 else (1, like.numel() // like.shape[-1], like.shape[-1])
    numbers = [] if count is None else [count]
    if gpu:
        pointers = [*before, *([list(vectors)] if vectors else []), *after]
        if rank is not None:
            numbers.append(rank)
        if vectors and function.endswith("_backward"):
            pointers += (
                [None, None] if gradients is None else [list(gradients), _parts(like, batch, T, gradients)]
            )
        if vectors:
            numbers.append(vector_dtypes(vectors))
        context = (device.index or 0, torch.cuda.current_stream(device).cuda_stream if like.is_cuda else None)
    else:
        if gradients is not None:
            raise ValueError(f"{function}: a CPU's has no gradients of vectors; expected vectors without")
        if count is not None and len(vectors) != 1:
            raise ValueError(f"{function}: there are {len(vectors)} mixes; a CPU's expects stacked(mixes)")
        vectors = [v if v.dtype == torch.float32 else v.float() for v in vectors]
        pointers = [*before, *vectors, *after]
        context = (torch.get_num_threads(),)
    copies: list[Tensor] = []
    code = _prepared(library(device.type), function, len(pointers), len(numbers), gpu)(
        *addresses(function, device, pointers, copies),
        *numbers,
        batch,
        T,
        C,
        heads,
        eps,
        DTYPE_CODES[like.dtype],
        *context,
    )
    if gpu:
        require_started(function, code)


def _prepared(functions: ctypes.CDLL, name: str, pointers: int, numbers: int, gpu: bool):
    """Look up the C function; it takes plain numbers once it knows their types."""
    function = getattr(functions, name)
    if function.argtypes is None:
        context = [ctypes.c_int, ctypes.c_void_p] if gpu else [ctypes.c_int]
        sizes = [ctypes.c_int64] * (numbers + 4)
        function.argtypes = [ctypes.c_void_p] * pointers + sizes + [ctypes.c_float, ctypes.c_int, *context]
        function.restype = ctypes.c_int if gpu else None
    return function


def _parts(like: Tensor, B: int, T: int, gradients: Sequence[Tensor]) -> Tensor:
    """Allocate working memory for the gradients of vectors."""
    count = library(like.device.type).elementwise_parts
    count.argtypes, count.restype = [ctypes.c_int64] * 2, ctypes.c_int64
    return like.new_empty(count(B, T) * len(gradients) * like.shape[-1], dtype=torch.float32)


def ready(*activations: Tensor | None) -> list[Tensor | None]:
    """Make the activations contiguous and aligned, as the ops take them."""
    return [None if x is None else x.contiguous() for x in activations]


def library_op(name: str, arguments: str, run: Callable, shapes: Callable) -> Callable:
    """Define rwkv::name(arguments) -> Tensor[], with its shapes for tracing and for counting memory."""
    # not torch.library.custom_op, whose first use imports torch._dynamo: 0.9 s in every process
    torch.library.define(f"rwkv::{name}", f"({arguments}) -> Tensor[]", tags=EXACT_STRIDES)
    torch.library.impl(f"rwkv::{name}", ("cpu", "cuda"), run)
    torch.library.register_fake(f"rwkv::{name}", shapes)
    return getattr(torch.ops.rwkv, name).default


# A linear with MiSS reads x and its shard sums S(x) (rwkv_miss.functional). On a GPU the kernel that makes x
# has its numbers in registers: it sums them, too, if it is given the linear's rank. The backward adds the
# gradient that came through S where it reads that of x. So S costs no read of x, and its gradient no write.


def summable(rank: int, native: str, head_size: int = 8) -> int:
    """Return the rank if the kernels of `native` sum that many shards, otherwise 0: it is a power of two, and
    so is the head size of a function that goes by heads.
    """
    fits = 8 <= rank <= 256 and rank & (rank - 1) == head_size & (head_size - 1) == 0
    return rank if fits and native == "cuda" else 0


def rank_of(tensors: Sequence[Tensor], count: int) -> int:
    """Return the rank of the shard sums that follow `count` outputs, or their gradients; 0 for none."""
    return tensors[count].shape[-1] if len(tensors) > count else 0


def _define(
    name: str,
    activations: int,
    vectors: int = 0,
    outputs: int = 1,
    keeps_output: bool = False,
    summed: bool = False,
) -> Callable:
    """Define the function (heads, eps, *activations of one shape, *vectors of the model) -> outputs.

    It has two ops. The forward takes the inputs; the backward takes the kept tensors, then the outputs'
    gradients. `trained` asks for the vectors' gradients, too. `summed`: the output carries its shard sums
    where a `rank` is given.

    It is an autograd.Function around the ops, not torch.library.register_autograd, which takes half of the
    43 us of a call (torch 2.13).
    """
    kept = outputs if keeps_output else activations + vectors

    def of_shards(like, tensors):
        if not summed:
            return tensors, None
        return [tensors] if on_gpu(like) else tensors, rank_of(tensors, outputs)

    def forward_shapes(tensors, heads, eps, rank=0):
        like = tensors[0]
        sums = [like.new_empty(*like.shape[:-1], rank)] if rank else []
        return [*(torch.empty_like(like) for _ in range(outputs)), *sums]

    def forward(tensors, heads, eps, rank=0):
        made = forward_shapes(tensors, heads, eps, rank)
        check_sizes(name, tensors)
        inputs, of_vectors = tensors[:activations], tensors[activations:]
        after, rank = of_shards(made[0], made)
        call(f"{name}_forward", made[0], inputs, of_vectors, after, None, heads, eps, rank=rank)
        return made

    def backward_shapes(tensors, heads, eps, trained):
        of_vectors = tensors[activations : activations + vectors] if trained else ()
        return [torch.empty_like(x) for x in (*tensors[:1] * activations, *of_vectors)]

    def backward(tensors, heads, eps, trained):
        made = backward_shapes(tensors, heads, eps, trained)
        check_sizes(name, tensors[: kept + outputs])
        above, rank = of_shards(made[0], tensors[kept:])
        saved, of_vectors = tensors[: kept - vectors], tensors[kept - vectors : kept]
        after, gradients = [*above, *made[:activations]], made[activations:] if trained else None
        call(f"{name}_backward", made[0], saved, of_vectors, after, gradients, heads, eps, rank=rank)
        return made

    sizes = "Tensor[] tensors, int heads, float eps"
    forward_op = library_op(name, f"{sizes}, int rank=0", forward, forward_shapes)
    backward_op = library_op(f"{name}_backward", f"{sizes}, bool trained", backward, backward_shapes)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx, rank, heads, eps, *tensors):
            made = forward_op(tensors, heads, eps, rank)
            ctx.save_for_backward(*(made[:outputs] if keeps_output else tensors))
            ctx.numbers = heads, eps
            return made[0] if len(made) == 1 else tuple(made)

        @staticmethod
        @once_differentiable
        def backward(ctx, *gradients):
            trained = any(ctx.needs_input_grad[3 + activations :])
            tensors = [*ctx.saved_tensors, *ready(*gradients)]
            found = backward_op(tensors, *ctx.numbers, trained)
            return None, None, None, *found, *([] if trained else [None] * vectors)

    def function(heads, eps, *tensors, rank=0):
        made = Differentiable.apply(rank, heads, eps, *tensors)
        return with_shard_sums(*made) if rank else made

    return function


def check_sizes(name: str, tensors: Sequence[Tensor]) -> None:
    """Raise ValueError for an empty tensor: a parameter that ZeRO-3 has freed is one."""
    shape = tensors[0].shape
    for x in tensors:
        if x.shape != shape and x.numel() != shape[-1]:
            raise ValueError(
                f"{name}: arguments are {[tuple(t.shape) for t in tensors]}; expected one shape, and vectors"
                " of its last axis"
            )


relu_squared = _define("relu_squared", 1, keeps_output=True, summed=True)
gated = _define("gated", 2)
delta_inputs = _define("delta_inputs", 2, 2, outputs=3)
readout6 = _define("readout6", 2, 2, summed=True)
readout7 = _define("readout7", 5, 3, summed=True)


# v_first goes through all layers, so that each backward adds to its gradient where it writes it.


def _value_forward(tensors):
    made = [torch.empty_like(tensors[0])]
    check_sizes("value_residual", tensors)
    call("value_residual_forward", made[0], tensors, (), made)
    return made


def _value_backward(tensors, dv, dlater):
    made = [torch.empty_like(x) for x in tensors]
    check_sizes("value_residual", [*tensors, dv])
    call("value_residual_backward", dv, tensors, (), [dv, dlater, *made])
    return made


_value_op = library_op(
    "value_residual", "Tensor[] tensors", _value_forward, lambda tensors: [torch.empty_like(tensors[0])]
)
_value_backward_op = library_op(
    "value_residual_backward",
    "Tensor[] tensors, Tensor dv, Tensor? dlater",
    _value_backward,
    lambda tensors, *_: [torch.empty_like(x) for x in tensors],
)


class ValueResidual(torch.autograd.Function):
    """Autograd function of value_residual: (v, v_first, gate). It keeps them, and returns v_first, too."""

    @staticmethod
    def forward(ctx, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)  # the last v_first has no gradient
        return _value_op(tensors)[0], tensors[1].detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, dv, dlater):
        if dv is None:
            return None, dlater, None
        return tuple(_value_backward_op(ctx.saved_tensors, *ready(dv, dlater)))


# On a GPU the functions around mix7's recurrence work together. The one before it computes r . key r_k for
# each head, `bonus` (tokens, heads) in fp32, and the readout reads neither r nor the key. The readout's
# backward computes the gradient of `bonus`; the one after the recurrence's adds that to the gradients of r, k
# and v where it reads the others.


def of_heads(x: Tensor, heads: int) -> Tensor:
    """Allocate a number for each head of the tokens of x (B, T, C)."""
    return x.new_empty(x.numel() // x.shape[-1], heads, dtype=torch.float32)


def _mix7_inputs_shapes(tensors, heads):
    k = tensors[0]
    return [*(torch.empty_like(k) for _ in range(3)), of_heads(k, heads)]


def _mix7_inputs(tensors, heads):
    made = _mix7_inputs_shapes(tensors, heads)
    check_sizes("mix7", tensors)
    call("mix7_inputs_forward", tensors[0], tensors[:3], tensors[3:], made, heads=heads)
    return made


# k, a, r, k_k, k_a, r_k -> key, alpha, beta, bonus
library_op("mix7_inputs", "Tensor[] tensors, int heads", _mix7_inputs, _mix7_inputs_shapes)


def _mix7_readout_shapes(tensors, bonus, eps, rank):
    y = tensors[0]
    return [torch.empty_like(y), *([y.new_empty(*y.shape[:-1], rank)] if rank else [])]


def _mix7_readout(tensors, bonus, eps, rank):
    made = _mix7_readout_shapes(tensors, bonus, eps, rank)
    check_sizes("mix7", tensors)
    given, vectors, heads = [*tensors[:3], bonus], tensors[3:], bonus.shape[1]
    call("mix7_readout_forward", made[0], given, vectors, [made], None, heads, eps, rank=rank)
    return made


# tensors: y, v, g, weight, bias
library_op(
    "mix7_readout", "Tensor[] tensors, Tensor bonus, float eps, int rank", _mix7_readout, _mix7_readout_shapes
)


def _readout_backward_shapes(tensors, bonus, trained, vectors, dout, eps):
    y, of_vectors = tensors[0], [torch.empty_like(x) for x in vectors[:3]] if trained else []
    return [torch.empty_like(y), torch.empty_like(y), torch.empty_like(bonus), *of_vectors]


def _readout_backward(tensors, bonus, trained, vectors, dout, eps):
    made = _readout_backward_shapes(tensors, bonus, trained, vectors, dout, eps)
    check_sizes("mix7", [*tensors, *trained, *vectors, dout[0]])
    before, after, heads = [*tensors, bonus, *(trained or [None] * 3)], [dout, *made[:3]], bonus.shape[1]
    of_vectors, rank = made[3:] if trained else None, rank_of(dout, 1)
    call("mix7_readout_backward", dout[0], before, vectors, after, of_vectors, heads, eps, rank=rank)
    return made


# y, v, g: dy, dg, dbonus and, where `trained` has r, k and a, the gradients of r_k, weight and bias, which
# are the vectors, with k_a
library_op(
    "mix7_readout_backward",
    "Tensor[] tensors, Tensor bonus, Tensor[] trained, Tensor[] vectors, Tensor[] dout, float eps",
    _readout_backward,
    _readout_backward_shapes,
)


def _inputs_backward_shapes(dr, dv, bonus, dbonus, tensors, trained, residual, dlater):
    of_vectors = tensors[4:6] if trained else ()
    return [torch.empty_like(x) for x in (*tensors[:2], *of_vectors, *residual)]


def _inputs_backward(dr, dv, bonus, dbonus, tensors, trained, residual, dlater):
    made = _inputs_backward_shapes(dr, dv, bonus, dbonus, tensors, trained, residual, dlater)
    check_sizes("mix7", [dr, dv, *tensors[:11], *residual])
    given, vectors, of_recurrence, dout = tensors[:4], tensors[4:7], tensors[7:10], tensors[10:]
    count = 4 if trained else 2
    inputs = [dout, bonus, dbonus, *of_recurrence, *(residual or [None] * 3), dlater]
    after = [*inputs, dr, dv, *made[:2], *(made[count:] or [None] * 3)]
    of_vectors, rank = made[2:4] if trained else None, rank_of(dout, 1)
    call("mix7_inputs_backward", dr, given, vectors, after, of_vectors, bonus.shape[1], rank=rank)
    return made


# (k, a, r, g, k_k, k_a, r_k, dkey, dalpha, dbeta, dout) -> dk, da and the gradients of k_k and k_a. With
# `residual`, the inputs of value_residual, their gradients follow, and dv is not written.
library_op(
    "mix7_inputs_backward",
    "Tensor(a!) dr, Tensor(b!) dv, Tensor bonus, Tensor dbonus, Tensor[] tensors, bool trained,"
    " Tensor[] residual, Tensor? dlater",
    _inputs_backward,
    _inputs_backward_shapes,
)


# The token shift's outputs are separate tensors, one for each mix, so that keeping one does not keep all. The
# mixes are one matrix in fp32 for a CPU, and separate vectors for a GPU.


def stacked(mixes: Sequence[Tensor]) -> Tensor:
    """Stack the mixes, as a CPU's functions take them."""
    return torch.stack(mixes).float().view(len(mixes), -1)


def _count(z: Tensor, mixes: Sequence[Tensor]) -> int:
    return sum([mix.numel() for mix in mixes]) // z.shape[-1]


def shift_shapes(z, last, reset, mixes, summed=(), rank=0):
    outputs = [torch.empty_like(z) for _ in range(_count(z, mixes))]
    return [*outputs, *(z.new_empty(*z.shape[:-1], rank) for _ in summed)]


def by_mix(tensors: Sequence[Tensor], count: int, summed: Sequence[int]) -> list[Tensor | None]:
    """Give each of `count` outputs a place for its shard sums: those numbered `summed` have some."""
    sums = dict(zip(summed, tensors[count:], strict=True))
    return [*tensors[:count], *([sums.get(i) for i in range(count)] if summed else [])]


def check_shift(z, last, reset, mixes):
    B, T, C = z.shape
    expected = [(B, C), reset if reset is None else (B, T)]
    found = [last.shape, reset if reset is None else reset.shape]
    sizes = [mix.numel() for mix in mixes]
    if found != expected or 0 in sizes or any([n % C for n in sizes]):
        found = [x if x is None else tuple(x) for x in found]
        raise ValueError(
            f"shift_mix: last and reset are {found}, the mixes have {sizes} numbers; expected {expected} and"
            f" {C} for each mix, because z is {tuple(z.shape)}"
        )


def _shift_forward(z, last, reset, mixes, summed=(), rank=0):
    check_shift(z, last, reset, mixes)
    made, count = shift_shapes(z, last, reset, mixes, summed, rank), _count(z, mixes)
    after = [by_mix(made, count, summed)]
    call("shift_mix_forward", z, [z, last, reset], mixes, after, count=count, rank=rank)
    return made


def _shift_backward_shapes(gradients, z, last, reset, mixes, summed):
    g = gradients[0]
    of_mixes = [] if z is None else [torch.empty_like(mix) for mix in mixes]
    return [torch.empty_like(g), g.new_empty(g.shape[0], g.shape[2]), *of_mixes]


def _shift_backward(gradients, z, last, reset, mixes, summed):
    found, like = _shift_backward_shapes(gradients, z, last, reset, mixes, summed), gradients[0]
    check_shift(like, found[1], reset, mixes)
    inputs, count = [z, last, reset] if on_gpu(like) else [reset], len(gradients) - len(summed)
    after, of_mixes = [by_mix(gradients, count, summed), *found[:2]], None if z is None else found[2:]
    rank = rank_of(gradients, count)
    call("shift_mix_backward", like, inputs, mixes, after, of_mixes, count=count, rank=rank)
    return found


_SHIFT = "Tensor z, Tensor last, Tensor? reset, Tensor[] mixes"
_SUMMED = "int[] summed=[], int rank=0"
_shift_op = library_op("shift_mix", f"{_SHIFT}, {_SUMMED}", _shift_forward, shift_shapes)
_shift_backward_op = library_op(
    "shift_mix_backward",
    "Tensor[] gradients, Tensor? z, Tensor? last, Tensor? reset, Tensor[] mixes, int[] summed",
    _shift_backward,
    _shift_backward_shapes,
)


class ShiftMix(torch.autograd.Function):
    """Autograd function of shift_mix: (z, last, reset, *mixes). It keeps z for the gradients of mixes only.

    The outputs numbered `again` are returned twice. For the backward each of these is one more output. Last
    come the shard sums of those numbered `summed`.
    """

    @staticmethod
    def forward(ctx, again, summed, rank, z, last, reset, *mixes):
        kept = (z, last) if any(ctx.needs_input_grad[6:]) else (None, None)
        ctx.save_for_backward(*kept, reset, *mixes)
        ctx.again, ctx.summed = again, summed
        made = _shift_op(z, last, reset, mixes, summed, rank)
        count = len(made) - len(summed)
        return *made[:count], *(made[i].detach() for i in again), *made[count:]

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        z, last, reset, *mixes = ctx.saved_tensors
        found = ShiftMix.gradients(ready(*gradients), z, last, reset, mixes, ctx.again, ctx.summed)
        dz, dlast, *dmixes = found
        return None, None, None, dz, dlast, None, *(dmixes or [None] * len(mixes))

    @staticmethod
    def gradients(gradients, z, last, reset, mixes, again, summed):
        """Return the gradients of z, last and, if there is a z, of the mixes."""
        of_outputs = [*mixes, *(mixes[i] for i in again)]
        dz, dlast, *dmixes = _shift_backward_op(gradients, z, last, reset, of_outputs, summed)
        for i, second in zip(again, dmixes[len(mixes) :]):
            dmixes[i] += second
        return dz, dlast, *dmixes[: len(mixes)]


# The shares that every token adds to the mixes, m_i = q_i maps_i, are matrix products. A GPU makes all of
# them in one and reads them where it writes the outputs.


def _token_forward(z, last, reset, mixes, m, summed=(), rank=0):
    check_shift(z, last, reset, mixes)
    made, count = shift_shapes(z, last, reset, mixes, summed, rank), len(mixes)
    after = [list(m.unbind()), by_mix(made, count, summed)]
    call("shift_mix_token_forward", z, [z, last, reset], mixes, after, count=count, rank=rank)
    return made


def _token_backward_shapes(z, last, reset, mixes, m, gradients, summed, trained):
    of_mixes = [torch.empty_like(mix) for mix in mixes] if trained else []
    return [torch.empty_like(z), torch.empty_like(last), torch.empty_like(m), *of_mixes]


def _token_backward(z, last, reset, mixes, m, gradients, summed, trained):
    found = _token_backward_shapes(z, last, reset, mixes, m, gradients, summed, trained)
    check_shift(z, last, reset, mixes)
    dz, dlast, dm, *of_mixes = found
    count, inputs = len(mixes), [z, last, reset]
    after = [list(m.unbind()), by_mix(gradients, count, summed), dz, dlast, list(dm.unbind())]
    of_mixes, rank = of_mixes if trained else None, rank_of(gradients, count)
    call("shift_mix_token_backward", z, inputs, mixes, after, of_mixes, count=count, rank=rank)
    return found


_token_op = library_op(
    "shift_mix_token",
    f"{_SHIFT}, Tensor m, {_SUMMED}",
    _token_forward,
    lambda z, last, reset, mixes, m, *summed: shift_shapes(z, last, reset, mixes, *summed),
)
_token_backward_op = library_op(
    "shift_mix_token_backward",
    f"{_SHIFT}, Tensor m, Tensor[] gradients, int[] summed, bool trained",
    _token_backward,
    _token_backward_shapes,
)


def _shares(z: Tensor, q: Tensor, maps: Tensor) -> Tensor:
    return torch.bmm(q, maps).view(len(maps), *z.shape)


class ShiftMixLowRank(torch.autograd.Function):
    """Autograd function of shift_mix_low_rank on a GPU: (z, last, q, reset, maps, *mixes).

    After the outputs come the shard sums of those numbered `summed`.
    """

    @staticmethod
    def forward(ctx, summed, rank, z, last, q, reset, maps, *mixes):
        ctx.save_for_backward(z, last, q, reset, maps, *mixes)
        ctx.summed = summed
        return tuple(_token_op(z, last, reset, mixes, _shares(z, q, maps.to(z.dtype)), summed, rank))

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        z, last, q, reset, maps, *mixes = ctx.saved_tensors
        factors = maps.to(z.dtype)
        trained = any(ctx.needs_input_grad[7:])
        inputs = z, last, reset, mixes, _shares(z, q, factors), ready(*gradients), ctx.summed
        dz, dlast, dm, *dmixes = _token_backward_op(*inputs, trained)
        dm = dm.flatten(1, 2)
        dmaps = torch.bmm(q.mT, dm).to(maps.dtype) if ctx.needs_input_grad[6] else None
        dq = torch.bmm(dm, factors.mT)
        return None, None, dz, dlast, dq, None, dmaps, *(dmixes or [None] * len(mixes))


def _low_rank_mixes(z, q, maps):
    return [product_transposed(part, map_).view(z.shape) for part, map_ in zip(q, maps, strict=True)]


def _low_rank_forward(z, last, q, reset, mixes, maps):
    check_shift(z, last, reset, mixes)
    out = _low_rank_mixes(z, q, maps)
    call("shift_mix_token_forward", z, [z, last, reset], mixes, [out], count=len(out))
    return out


def _low_rank_backward(z, last, q, reset, mixes, maps, gradients):
    dz, dlast = torch.empty_like(z), torch.empty_like(last)
    m = _low_rank_mixes(z, q, maps)
    inputs, after = [z, last, reset], [m, gradients, dz, dlast]
    call("shift_mix_token_backward", z, inputs, mixes, after, count=len(m))
    # m is its gradient now
    dq = torch.stack([product(part.flatten(0, 1), map_) for part, map_ in zip(m, maps, strict=True)])
    return [dz, dlast, dq]


_LOW_RANK = "Tensor z, Tensor last, Tensor q, Tensor? reset, Tensor[] mixes, Tensor maps"
_low_rank_op = library_op(
    "shift_mix_low_rank",
    _LOW_RANK,
    _low_rank_forward,
    lambda z, last, q, reset, mixes, maps: shift_shapes(z, last, reset, mixes),
)
_low_rank_backward_op = library_op(
    "shift_mix_low_rank_backward",
    f"{_LOW_RANK}, Tensor[] gradients",
    _low_rank_backward,
    lambda z, last, q, *_: [torch.empty_like(z), torch.empty_like(last), q.new_empty(q.shape)],
)


class ShiftMixLowRankCpu(torch.autograd.Function):
    """shift_mix_low_rank of (z, last, q, reset, maps, stacked mixes) on a CPU: outputs lie in m's place."""

    @staticmethod
    def forward(ctx, z, last, q, reset, maps, mixes):
        ctx.save_for_backward(z, last, q, reset, maps, mixes)
        return tuple(_low_rank_op(z, last, q, reset, [mixes], maps))

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        z, last, q, reset, maps, mixes = ctx.saved_tensors
        found = _low_rank_backward_op(z, last, q, reset, [mixes], maps, ready(*gradients))
        return *found, None, None, None
