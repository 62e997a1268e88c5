"""Frozen weights in 8 or 4 bits, which a linear multiplies with and never trains.

A quantised weight (out, in) is one integer tensor with a row of bytes for each output. So it moves between
devices, is broadcast and is saved for a backward like any other tensor. A row is cut into blocks of 64
weights:

    kind   dtype   a block                                                                 bits a weight
    int8   int8    64 codes from -127 to 127, then a scale                                 8.25
    nf4    uint8   32 bytes of two codes, the earlier one in the high half, then a scale   4.25

weight = value of the code x scale of its block. The value of an int8 code is the code itself; the value of an
nf4 code is its entry in NF4. A scale is bf16: the largest weight of the block for nf4, which a bf16 file has
exactly, and a 127th of it for int8. The last block of a row is filled up with codes that are not used. The
tensor tells its kind, `out` and the number of blocks; `in` comes from the linear's input.

nf4 is the data type of QLoRA (Dettmers et al., arXiv 2305.14314, section 3 and appendix E), with its blocks
of 64. Its double quantisation, scales in 8 bits with scales of their own, would take 0.12 bits a weight less.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .errors import UserError
from .sharding import is_sharded

BLOCK_SIZE = 64
SCALE_BYTES = 2
# bytes of a block without its scale
CODES = {"int8": BLOCK_SIZE, "nf4": BLOCK_SIZE // 2}
CODE_DTYPES = {"int8": torch.int8, "nf4": torch.uint8}
KINDS = {dtype: kind for kind, dtype in CODE_DTYPES.items()}
# quantiles of a normal distribution, scaled to -1 and 1: 7 below zero, an exact zero, 8 above
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
WEIGHTS_AT_ONCE = 1 << 18  # weights expanded at once: a megabyte in fp32


def row_bytes(kind: str, width: int) -> int:
    return -(-width // BLOCK_SIZE) * (CODES[kind] + SCALE_BYTES)


def empty(kind: str, out: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """Make the tensor of a quantised weight (out, width), without values."""
    return torch.empty(out, row_bytes(kind, width), dtype=CODE_DTYPES[kind], device=device)


def quantise(weight: Tensor, kind: str) -> Tensor:
    """Quantise a floating-point weight (out, in): every weight gets its nearest code."""
    out, width = weight.shape
    quantised = empty(kind, out, width, weight.device)
    rows_at_once = max(1, WEIGHTS_AT_ONCE // width)
    for part, into in zip(weight.split(rows_at_once), quantised.split(rows_at_once), strict=True):
        codes, scales = _codes_and_scales(into)
        scales = scales.view(torch.bfloat16)
        blocks = nn.functional.pad(part.float(), (0, scales.shape[1] * BLOCK_SIZE - width)).unflatten(
            1, (-1, BLOCK_SIZE)
        )
        largest = blocks.abs().amax(2)
        scales.copy_(largest if kind == "nf4" else largest / 127)
        steps = scales.float().unsqueeze(2)
        relative = (blocks / steps.where(steps > 0, 1)).flatten(1)
        codes.copy_(_nf4_codes(relative) if kind == "nf4" else relative.round_().clamp_(-127, 127))
    return quantised


def _codes_and_scales(quantised: Tensor) -> tuple[Tensor, Tensor]:
    """View the codes and the scales of a quantised weight, each as bytes."""
    size = CODES[KINDS[quantised.dtype]]
    end = quantised.shape[1] // (size + SCALE_BYTES) * size
    return quantised[:, :end], quantised[:, end:]


def _nf4_codes(relative: Tensor) -> Tensor:
    """Turn numbers (out, in) in units of their scale into codes of the nearest entries of NF4, two a byte."""
    codes = torch.zeros(relative.shape, dtype=torch.uint8, device=relative.device)
    for lower, upper in zip(NF4, NF4[1:]):  # ten times as fast as torch.bucketize
        codes += (relative > (lower + upper) / 2).view(torch.uint8)
    return codes[:, ::2] << 4 | codes[:, 1::2]


@functools.cache
def nf4_pairs(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the two values of every byte, as the parts of a complex number: one look-up gives both."""
    values = torch.tensor(NF4, dtype=dtype, device=device)
    return torch.complex(values.repeat_interleave(16), values.repeat(16))


def expand(quantised: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Expand a quantised weight to (out, width) in plain torch: the definition of rwkv_miss::dequantise."""
    weight = unfilled(quantised, width, dtype)
    rows_at_once = max(1, WEIGHTS_AT_ONCE // width)
    for part, into in zip(quantised.split(rows_at_once), weight.split(rows_at_once), strict=True):
        into.copy_(_expand_rows(part, width, torch.promote_types(dtype, torch.float32)))
    return weight


def _expand_rows(quantised: Tensor, width: int, exact: torch.dtype) -> Tensor:
    codes, scales = _codes_and_scales(quantised)
    # copied, because in a view of another tensor the bytes may lie apart or at an odd address
    scales = scales.clone(memory_format=torch.contiguous_format).view(torch.bfloat16)
    if quantised.dtype == CODE_DTYPES["nf4"]:
        pairs = nf4_pairs(quantised.device, exact).index_select(0, codes.int().flatten())
        values = torch.view_as_real(pairs).view(*scales.shape, BLOCK_SIZE)
    else:
        values = codes.to(exact).reshape(*scales.shape, BLOCK_SIZE)
    return values.mul_(scales.to(exact).unsqueeze(2)).flatten(1)[:, :width]


def unfilled(quantised: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Allocate the plain weight (out, width) for a quantised one.

    Raises ValueError if a row of it does not hold `width` weights.
    """
    kind = KINDS.get(quantised.dtype)
    if kind is None or quantised.dim() != 2 or width < 1 or quantised.shape[1] != row_bytes(kind, width):
        expected = " or ".join(f"{CODE_DTYPES[name]} (out, {row_bytes(name, width)})" for name in CODES)
        raise ValueError(
            f"dequantise: the quantised weight is {quantised.dtype} {tuple(quantised.shape)}; expected"
            f" {expected} for rows of {width} weights, 1 or more"
        )
    return quantised.new_empty(quantised.shape[0], width, dtype=dtype)


# a registered operator, so that a device can have a faster kernel for it
torch.library.define("rwkv_miss::dequantise", "(Tensor quantised, int width, ScalarType dtype) -> Tensor")
torch.library.impl("rwkv_miss::dequantise", "default", expand)
torch.library.register_fake("rwkv_miss::dequantise", unfilled)


def is_of_others(weight: Tensor) -> bool:
    """Tell whether a weight's class comes from another package, which alone can expand it.

    Known are bitsandbytes' weights of 4 and 8 bits, and classes made of several tensors, such as torchao's.
    """
    if type(weight) is nn.Parameter:
        return False
    return (
        hasattr(weight, "quant_state") or hasattr(weight, "SCB") or hasattr(weight, "__tensor_flatten__")
    ) and not is_sharded(weight)


def shape_of(weight: Tensor) -> torch.Size:
    """Return the shape (out, in) of a weight; bitsandbytes packs a weight of 4 bits into one column."""
    state = getattr(weight, "quant_state", None)
    return weight.shape if state is None else torch.Size(state.shape)


def undo_first_forward(linear: nn.Linear) -> None:
    """Undo a forward's changes to bitsandbytes' weight: with 8 bits it moves the scales away, with 4 bits it
    may pack the codes for the CPU."""
    weight = linear.weight
    if is_of_others(weight) and getattr(weight, "SCB", weight) is None:
        weight.SCB = linear.state.SCB
    state = getattr(weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        linear.state_dict()  # unpacks the codes; it unpacks the scales only if these are quantised, too
        if not state.nested:
            state.absmax = state.absmax.mT.reshape(-1).float()


def of_others(weight: Tensor) -> dict[str, Tensor]:
    """Return a bitsandbytes weight's further tensors in a state_dict(), by their names in the linear."""
    if (state := getattr(weight, "quant_state", None)) is not None:
        return {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    if (scale := getattr(weight, "SCB", None)) is not None:
        return {"SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return {}


def _dense_of_others(weight: Tensor) -> Tensor:
    if getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    if (scale := getattr(weight, "SCB", None)) is not None:
        return weight.data * (scale.to(weight.device) / 127).unsqueeze(1)
    return weight.dequantize()  # torchao's


def dense(weight: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Return a quantised weight as a matrix (out, width) in `dtype`, rounded once. Other weights stay."""
    if is_of_others(weight):
        return _dense_of_others(weight).to(dtype)
    if weight.is_floating_point():
        return weight
    return torch.ops.rwkv_miss.dequantise(weight, width, dtype)


def quantise_(linears: Iterable[nn.Linear], kind: str) -> None:
    """Replace the weights of linears by quantised, frozen ones, one after the other.

    That needs the memory of a few more rows. The forward of these linears must multiply by functional.linear,
    miss_linear or lora_linear, as every adapted linear does.
    """
    for linear in linears:
        if getattr(linear, "view", None):
            raise UserError(f"{linear.view.key} is stored as no linear's weight, and can't be quantised here")
        linear.weight = nn.Parameter(quantise(linear.weight.detach(), kind), requires_grad=False)
