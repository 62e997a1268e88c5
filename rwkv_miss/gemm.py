"""Matrix products for the adapters' operators, without autograd.

x (N, in), weight (out, in), bias (out,), all of one dtype -> (N, out).

In fp32 on a CPU oneDNN multiplies instead of torch's MKL, which took 2.1 times as long on one AMD CPU with
AVX-512, and 1.1 times on another, of family 25 model 17 (docs/speed.md). oneDNN is reached by an operator of
torch.compile, which has no public name. Where torch lacks it, and in every other dtype and device, torch's
own products are used. A weight is contiguous or the transposed view of a contiguous one, and is not copied.
(For any other view oneDNN would take its plain loops, a thousand times as slow; torch multiplies there.)

The sums are fp32 for factors in half precision. On CUDA this is exact only with
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction and its sibling for fp16 off. torch has them
on: a product whose sums are split among blocks then adds the parts in half precision.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

# columns multiplied at a time for a transposed weight of 3 DEEP or more: 1.1 to 1.25 times as fast
DEEP = 1024
# multiply-adds from which oneDNN is used: it prepares every new shape for about 0.5 ms
SMALL = 1 << 23
WIDE = 4096  # columns of the output computed and copied at once, so that they are still in the cache


@functools.cache
def _has_onednn() -> bool:
    """Tell whether this torch has oneDNN's operator, and it computes a small product right."""
    if not torch.backends.mkldnn.is_available():
        return False
    x, weight, other = torch.ones(2, 3), torch.ones(3, 5).t(), torch.ones(2, 5)
    try:
        return torch.equal(_onednn(x, weight, None), other * 3) and torch.equal(
            _onednn_plus(x, weight, None, other), other * 4
        )
    except (AttributeError, RuntimeError, TypeError):
        return False


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _onednn_plus(x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, bias, "add")


def in_torch_func() -> bool:
    """Tell whether torch.func (grad, vmap, jvp, ...) follows what is computed here."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def differentiated(*tensors: Tensor) -> bool:
    """Tell whether torch differentiates what is computed from these tensors here, by its own operators.

    That is so inside torch.func, and in a backward with create_graph=True. An operator, whose forward and
    other backwards have gradients off, needs to give no tensors.
    """
    if torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and (not tensors or any([t.requires_grad for t in tensors])):
        return True
    return torch._C._are_functorch_transforms_active()


def uses_onednn(x: Tensor, weight: Tensor, transposed: bool = False) -> bool:
    """Tell whether oneDNN computes x W^T here; otherwise torch's own product does.

    `transposed`: the weight is W^T, (in, out).
    """
    # no subclass of Tensor: tracing and memory counting use subclasses that have no values
    return (
        type(x) is Tensor
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() * weight.shape[transposed] >= SMALL
        and torch.backends.mkldnn.enabled
        and (weight.is_contiguous() or weight.t().is_contiguous())
        and not differentiated(x, weight)
        and _has_onednn()
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x W^T + bias."""
    if not uses_onednn(x, weight):
        return F.linear(x, weight, bias)
    if weight.is_contiguous() or weight.shape[1] < 3 * DEEP:
        return _onednn(x, weight, bias)
    first, *others = zip(x.split(DEEP, 1), weight.split(DEEP, 1), strict=True)
    y = _onednn(*first, bias)
    for part in others:
        y = _onednn_plus(*part, None, y)
    return y


def product_transposed(x: Tensor, matrix: Tensor) -> Tensor:
    """Compute product(x, matrix.t()) for a matrix (in, out), without making two views of it."""
    return product(x, matrix.t()) if uses_onednn(x, matrix, transposed=True) else torch.mm(x, matrix)


@functools.cache
def _has_fp32_results() -> bool:
    """Tell whether torch returns the fp32 sums of factors in half precision: from 2.8 on, on CUDA alone."""
    return "dtype" in torch.ops.aten.mm.overloads() and torch.version.hip is None


@functools.cache
def _adds_to_fp32() -> bool:
    """Tell whether addmm(out_dtype=) takes an fp32 total with half-precision factors: since torch 2.10."""
    return tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)


def product_exact(x: Tensor, weight: Tensor) -> Tensor:
    """Compute x W^T with unrounded sums, fp32 for factors in half precision; fp32 and fp64 stay.

    Unrounded sums need CUDA with torch 2.8 or newer. On the CPU and in an older torch the result is fp32,
    too, but first rounded to the dtype of the factors: torch has no other product there.
    """
    if x.dtype.itemsize >= 4:
        return product(x, weight)
    if x.device.type == "cuda" and _has_fp32_results() and not differentiated(x, weight):
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return product(x, weight).float()


def product_into(out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Write x W^T to `out` (N, out), which may be fp32 for factors in half precision, as product_exact()'s.

    Use it for results so large that allocating new memory would take a tenth of the product's time.
    """
    if out.dtype != x.dtype:
        # a subclass has no values: its memory is counted as on a GPU
        if (x.device.type == "cuda" or type(x) is not Tensor) and _has_fp32_results():
            return torch.mm(x, weight.t(), out_dtype=out.dtype, out=out)
        return out.copy_(product(x, weight))
    if not uses_onednn(x, weight):
        return torch.mm(x, weight.t(), out=out)
    for place, part in zip(out.split(WIDE, 1), weight.split(WIDE), strict=True):
        place.copy_(_onednn(x, part, None))
    return out


def add_product_(total: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Add x W^T to `total` (N, out), fp32 for factors in half precision.

    On CUDA with torch 2.10 or newer the product's sums start from `total`, without a rounding between. torch
    2.8 and 2.9 add an fp32 product, in new memory.
    """
    if x.device.type == "cuda" and total.dtype == x.dtype:
        return total.addmm_(x, weight.t())
    # a subclass has no values: its memory is counted as on a GPU
    if total.dtype != x.dtype and (x.device.type == "cuda" or type(x) is not Tensor) and _has_fp32_results():
        if not _adds_to_fp32():
            return total.add_(torch.mm(x, weight.t(), out_dtype=total.dtype))
        return torch.addmm(total, x, weight.t(), out_dtype=total.dtype, out=total)
    return total.add_(product(x, weight))


def product_plus(x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, D: Tensor) -> Tensor:
    """Compute x W^T + bias + s D in one output: s (N, r), D (r, out)."""
    if x.dtype.itemsize < 4 or uses_onednn(x, weight) or in_torch_func():
        return product_onto(product(s, D.t()), x, weight, bias)
    return F.linear(x, weight, bias).addmm_(s, D)


def product_onto(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute y + x W^T + bias in the memory of y (N, out).

    Use it for a small y in half precision: the product's fp32 sums start from y. Adding y to the rounded
    product would lose everything below half a rounding step: 71 % of the change that a D of size 1e-5 makes.
    """
    if uses_onednn(x, weight):
        return _onednn_plus(x, weight, bias, y)
    y = y.addmm(x, weight.t()) if in_torch_func() else y.addmm_(x, weight.t())  # vmap has no fast addmm_
    return y if bias is None else y.add_(bias)
