"""Matrix products for the adapters' operators, without autograd.

x (N, in), weight (out, in), bias (out,), all of one dtype -> (N, out).

In fp32 on a CPU they are oneDNN's, where torch's own are MKL's: those took 2.1 times as long on one AMD CPU
with AVX-512, and 1.1 times on another, of family 25 model 17 (docs/speed.md). The operator that leads there
is the one of torch.compile, which has no public name; where torch does not have it, and in every other dtype
and device, the products are torch's own. A weight is contiguous or the transposed view of one: no copy is
made. (Of any other view oneDNN would make the product by its plain loops, a thousand times as slow: torch's
is taken.)

The sums are fp32 for factors in half precision. On CUDA that holds to the end where
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction and its sibling for fp16 are off; torch has
them on, and a product whose sums are split among blocks then adds the parts in half precision.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

# columns of a transposed weight at a time where it has three times as many: 1.1 to 1.25 times as fast
DEEP = 1024
# multiply-adds; oneDNN prepares every new shape for about 0.5 ms, which smaller products would not win back
SMALL = 1 << 23
WIDE = 4096  # numbers of a row that are made and then written to their place, while they are in the cache


@functools.cache
def _has_onednn() -> bool:
    """Tell whether this torch has the operator, and it does what it is used for here."""
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


def uses_onednn(x: Tensor, weight: Tensor, transposed: bool = False) -> bool:
    """Tell whether oneDNN computes x W^T here; otherwise torch's own product does.

    `transposed`: the weight is W^T, (in, out).
    """
    # exactly a Tensor: tracing and the counting of memory run the operators on subclasses without values
    return (
        type(x) is Tensor
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() * weight.shape[transposed] >= SMALL
        and torch.backends.mkldnn.enabled
        and (weight.is_contiguous() or weight.t().is_contiguous())
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
    """Compute product(x, matrix.t()) for a matrix (in, out), without torch's two views of it."""
    return product(x, matrix.t()) if uses_onednn(x, matrix, transposed=True) else torch.mm(x, matrix)


@functools.cache
def _has_fp32_results() -> bool:
    """Tell whether torch returns the fp32 sums of factors in half precision: from 2.8 on, on CUDA alone."""
    return "dtype" in torch.ops.aten.mm.overloads() and torch.version.hip is None


@functools.cache
def _adds_to_fp32() -> bool:
    """Tell whether addmm(out_dtype=) takes an fp32 total beside half-precision factors: since torch 2.10."""
    return tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)


def product_exact(x: Tensor, weight: Tensor) -> Tensor:
    """Compute x W^T with unrounded sums, fp32 for factors in half precision; fp32 and fp64 stay.

    That takes CUDA with torch 2.8 or newer. On the CPU and in an older torch the result is fp32, too, but was
    rounded to the dtype of the factors on its way: torch has no other product there.
    """
    if x.dtype.itemsize >= 4:
        return product(x, weight)
    if x.device.type == "cuda" and _has_fp32_results():
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return product(x, weight).float()


def product_into(out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Write x W^T to `out` (N, out), which may be fp32 for factors in half precision, as of product_exact.

    It is for results so large that new memory would take a tenth of the product's time.
    """
    if out.dtype != x.dtype:
        # a subclass has no values: what a GPU would do is counted
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

    On CUDA with torch 2.10 or newer the product's own sums go on from `total`: nothing is rounded between.
    torch 2.8 and 2.9 add an fp32 product, in new memory.
    """
    if x.device.type == "cuda" and total.dtype == x.dtype:
        return total.addmm_(x, weight.t())
    # a subclass has no values: what a GPU would do is counted
    if total.dtype != x.dtype and (x.device.type == "cuda" or type(x) is not Tensor) and _has_fp32_results():
        if not _adds_to_fp32():
            return total.add_(torch.mm(x, weight.t(), out_dtype=total.dtype))
        return torch.addmm(total, x, weight.t(), out_dtype=total.dtype, out=total)
    return total.add_(product(x, weight))


def product_plus(x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, D: Tensor) -> Tensor:
    """Compute x W^T + bias + s D in one output: s (N, r), D (r, out)."""
    if x.dtype.itemsize < 4 or uses_onednn(x, weight):
        return product_onto(product(s, D.t()), x, weight, bias)
    return F.linear(x, weight, bias).addmm_(s, D)


def product_onto(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute y + x W^T + bias in the memory of y (N, out).

    It is for a small y in half precision. The product's fp32 sums start from y. If y were added to the
    rounded product, all below half a step would be lost: 71 % of the change that a D of size 1e-5 makes.
    """
    if uses_onednn(x, weight):
        return _onednn_plus(x, weight, bias, y)
    y.addmm_(x, weight.t())
    return y if bias is None else y.add_(bias)
