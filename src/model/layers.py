"""Building blocks of both versions' layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rwkv_miss.files.checkpoint import Arch
from rwkv_miss.functional import linear
from rwkv_miss.gemm import uses_onednn

from ..ops.elementwise import TokenShift, add_layer_norm, native_functions, norm_shift
from .loss import LogitLoss, head_log_probs, head_loss

# 1e-5 * head_size_divisor^2 of RWKV-LM; released weights were trained with it, whatever their head size
GROUP_NORM_EPS = 64e-5


def last_token(z: Tensor) -> Tensor:
    """Copy (B, C) out of z (B, T, C), for the state: a view would keep all of z."""
    return z[:, -1].clone()


def chosen(x: Tensor, wanted: Tensor | None) -> Tensor:
    """Select the tokens b T + t of x (B, T, C) that `wanted` (n,) int64 names: (n, C). None selects all."""
    return x if wanted is None else x.flatten(0, 1).index_select(0, wanted)


def parameter(*shape: int, requires_grad: bool = True) -> nn.Parameter:
    """Make a parameter of this shape, not yet filled."""
    return nn.Parameter(torch.empty(shape), requires_grad=requires_grad)


def time_state(arch: Arch) -> nn.Parameter | None:
    """Make the tuned state (H, N, N) that a layer's documents start from, zero so far; None without one."""
    if not arch.initial_state:
        return None
    return nn.Parameter(torch.zeros(arch.n_head, arch.head_size, arch.head_size))


def split_heads(heads: int, *activations: Tensor) -> list[Tensor]:
    """Reshape (B, T, H N) -> (B, T, H, N)."""
    return [x.unflatten(-1, (heads, -1)) for x in activations]


def shard_rank(linear: nn.Module) -> int:
    """Return how many shard sums a linear takes that its input carries: those of a MissLinear, otherwise 0.

    A hook before the linear, such as that of ZeRO 3, may replace its input.
    """
    return 0 if linear._forward_pre_hooks else getattr(linear, "shard_rank", 0)


def depth_ratios(layer: int, n_layer: int) -> tuple[float, float]:
    """Compute RWKV-LM's (rho, sigma): layer / (L - 1), 0 to 1, and 1 - layer / L, 1 to almost 0."""
    return layer / max(n_layer - 1, 1), 1 - layer / n_layer


def low_rank(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    act: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Compute act(x down) up + bias, for x (..., in), down (in, D), up (D, out), in the dtype of x."""
    h = times(x, down)
    return times(h if act is None else act(h), up, None if bias is None else bias.view(-1))


def times(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x M + bias in the dtype of x, for x (..., in) and M (in, out).

    Kept for the backward: M, and x only if M is trained.
    """
    if matrix.dtype != x.dtype or uses_onednn(x, matrix, transposed=True):
        return linear(x, matrix, bias, transposed=True)
    # torch's own function keeps as little for such a matrix, and takes half of the time in Python
    tokens = x.flatten(0, -2)
    y = tokens.mm(matrix) if bias is None else torch.addmm(bias.to(x.dtype), tokens, matrix)
    return y.view(*x.shape[:-1], matrix.shape[1])


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm in the dtype of its input, whatever that of its weights.

    It is of the sum of x and `addend`, of one shape or None, and returns the sum, too: (sum, norm). With a
    `shift` it returns the sum, the norm's last tokens (B, C), and the token shift of the norm.
    """

    def __init__(self, width: int, kernel: str):
        super().__init__(width)
        self.native = native_functions(kernel)

    def forward(self, x: Tensor, addend: Tensor | None = None, shift: TokenShift | None = None) -> tuple:
        arguments = x, addend, self.weight, self.bias, self.eps
        if shift is None:
            return add_layer_norm(*arguments, self.native)
        return norm_shift(*arguments, shift, self.native)


class Linear(nn.Linear):
    """nn.Linear in the dtype of its input, by the fastest product of the device.

    The weight may have another dtype, and may be quantised.
    """

    is_linear = True  # an adapter may take its place

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # with nothing to draw, torch would still import its compiler, 2 s
            super().reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class Embedding(nn.Embedding):
    """nn.Embedding that draws nothing on the meta device, as Linear."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Head(Linear):
    """The map to the vocabulary: logits.

    With targets (tokens,) for x (tokens, C), and perhaps weights (tokens,), it is their loss, summed; with
    `logit_loss` the sums of that loss; with `each` ln p of each target, (tokens,). None of them ever
    holds all logits.

    On a GPU logits are fp32 from the product on: rounded to bf16, those of 16 to 32 would have steps of
    0.125. On a CPU they have the dtype of x, since nothing there hands out the sums of a product in bf16.
    """

    def __init__(self, width: int, vocab: int, kernel: str):
        super().__init__(width, vocab, bias=False)
        self.native = native_functions(kernel)
        self.on_gpu = False  # true for the plan, which counts a GPU's step on tensors of the CPU

    def forward(
        self,
        x: Tensor,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
        each: bool = False,
        logit_loss: LogitLoss | None = None,
    ) -> Tensor:
        on_gpu = self.on_gpu or x.is_cuda
        if targets is None:
            return linear(x, self.weight, exact=on_gpu)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        native = self.native != ""
        if each:
            return head_log_probs(x, self.weight, targets, native, exact=on_gpu)
        weight = self.weight.to(x.dtype)
        return head_loss(x, weight, targets, native, weights, on_gpu, logit_loss)
