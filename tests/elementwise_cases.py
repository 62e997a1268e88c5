"""The elementwise functions with arguments of all kinds: for tests of CUDA kernels, and
benchmarks/gpu_numerics.py.
"""

import itertools

import torch

from rwkv_miss.functional import shard_sum
from src.ops import elementwise
from src.ops.elementwise_ops import summable

# B, T, C, heads: head sizes 8, 16, 80 (ten of sixteen lanes), 256, 24; blocks of 32 tokens and 256 channels
SIZES = [(2, 1, 24, 3), (1, 2, 48, 3), (2, 37, 160, 2), (1, 33, 512, 2), (1, 70, 264, 11)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Largest errors seen below, against the largest value: fp32 6e-7, bf16 8e-3, fp16 1e-3. Outputs are rounded
# once, 2^-8 = 4e-3 of a value in bf16; the low-rank mixes before their use, too.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}
EPS = 64e-5
RANK = 16  # the rank of the shard sums
FOUR_OF_SIX = [0, RANK, RANK, 0, RANK, RANK]


def with_sums(outputs, ranks):
    """Return the outputs, then the shard sums of those that have a rank: what they carry, or torch's."""
    of = {i: getattr(outputs[i], "shard_sums", None) for i, rank in enumerate(ranks) if rank}
    return [*outputs, *(shard_sum(outputs[i], RANK) if sums is None else sums for i, sums in of.items())]


def norm_shift(x, last, mixed, vectors, reset, on):
    weight, bias, *mixes = vectors
    shift = elementwise.TokenShift(last, reset, mixes, [3], FOUR_OF_SIX)
    total, z_last, out = elementwise.norm_shift(x, mixed, weight, bias, EPS, shift, on)
    return [total, z_last, *with_sums(out, FOUR_OF_SIX)]


# name -> (function of native, activations, vectors, reset; activations; vectors)
FUNCTIONS = {
    "shift_mix": (
        lambda on, z, last, *mixes, reset: with_sums(
            elementwise.shift_mix(z, last, reset, mixes, on, ranks=FOUR_OF_SIX), FOUR_OF_SIX
        ),
        2,
        6,
    ),
    "shift_mix, some twice": (
        lambda on, z, last, *mixes, reset: elementwise.shift_mix(z, last, reset, mixes, on, [1, 0]),
        2,
        3,
    ),
    "shift_mix of one": (
        lambda on, z, last, mix, reset: elementwise.shift_mix(z, last, None, [mix], on),
        2,
        1,
    ),
    "shift_mix_low_rank": (
        lambda on, z, last, q, maps, *mixes, reset: with_sums(
            elementwise.shift_mix_low_rank(z, last, reset, mixes, q, maps, on, FOUR_OF_SIX[1:]),
            FOUR_OF_SIX[1:],
        ),
        3,
        6,
    ),
    "relu_squared": (
        lambda on, x, reset: with_sums([elementwise.relu_squared(x, on, RANK)], [RANK]),
        1,
        0,
    ),
    "gated": (lambda on, x, gate, reset: elementwise.gated(x, gate, on), 2, 0),
    "value_residual": (lambda on, *x, reset: elementwise.value_residual(*x, on), 3, 0),  # v, then v_first
    "delta_inputs": (lambda on, *x, heads, reset: elementwise.delta_inputs(*x, heads, on), 2, 2),
    "readout6": (
        lambda on, y, *x, heads, reset: with_sums(
            [elementwise.readout6(y, *x, heads, EPS, on, RANK)],
            [summable(RANK, "cuda", y.shape[-1] // heads)],
        ),
        2,
        2,
    ),
    "readout7": (lambda on, *x, reset: elementwise.readout7(*x, EPS, on), 5, 3),
    "add_layer_norm": (lambda on, *x, reset: elementwise.add_layer_norm(*x, EPS, on), 2, 2),
    # last is the second tensor, as of every token shift; one output has two uses
    "shift_mix of a norm": (
        lambda on, x, last, mixed, *vectors, reset: norm_shift(x, last, mixed, vectors, reset, on),
        3,
        8,
    ),
}


def inputs(name, sizes):
    """Activations, then vectors, of numbers that are exact in every dtype; reset; keywords."""
    B, T, C, heads = sizes
    generator = torch.Generator().manual_seed(1000 * T + C)

    def x(*shape):
        return (torch.randn(shape, generator=generator) * 32).round().double() / 32

    _, activations, vectors = FUNCTIONS[name]
    shapes = [(B, T, C)] * activations + [(1, 1, C)] * vectors
    if name.startswith("shift_mix"):
        shapes[1] = (B, C)
    if name == "shift_mix of a norm":
        shapes[3:5] = (C,), (C,)
    if name == "shift_mix_low_rank":
        shapes[2:4] = (5, B * T, 7), (5, 7, C)
    if name.startswith(("readout", "add_layer_norm")):
        shapes[-2:] = (C,), (C,)
    if name == "readout7":
        shapes[5] = (heads, C // heads)
    # a part of something else, as of a chunk
    reset = torch.rand(B, T + 1, generator=generator)[:, 1:] < 0.3
    keywords = {"heads": heads} if name in ("delta_inputs", "readout6") else {}
    return [x(*shape) for shape in shapes], keywords | {"reset": reset}


def results(
    name, sizes, native, dtype, trained, vector_dtypes=(), device="cpu", place=lambda x: x, used=slice(None)
):
    """Outputs, then gradients of activations, and of vectors where they are trained.

    The dtypes of vectors take turns. `place` puts what has rows where the function finds it. `used`: outputs
    that have a gradient.
    """
    function, activations, _ = FUNCTIONS[name]
    tensors, keywords = inputs(name, sizes)
    keywords["reset"] = place(keywords["reset"].to(device))
    turns = itertools.cycle(vector_dtypes or [dtype])
    leaves = [place(t.to(device, dtype, copy=True)).requires_grad_() for t in tensors[:activations]]
    for t in tensors[activations:]:
        leaves.append(t.to(device, next(turns), copy=True).requires_grad_(trained))
    out = function(native, *leaves, **keywords)
    out = list(out) if isinstance(out, (list, tuple)) else [out]
    generator = torch.Generator().manual_seed(3)
    shapes = [(sizes[0], *y.shape[1:]) for y in out]
    gradients = [place(torch.randn(s, generator=generator).bfloat16().to(device, dtype)) for s in shapes]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    found = torch.autograd.grad(out[used], wanted, gradients[used])
    assert [g.dtype for g in found] == [leaf.dtype for leaf in wanted]
    return [t.detach() for t in (*out, *found)]
