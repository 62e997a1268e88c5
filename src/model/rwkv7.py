"""RWKV-7 "Goose" (x070, arXiv 2503.14456): time mix, channel mix and RWKV-LM's initialisation.

Names are the checkpoint's, shapes as in rwkv.py: C n_embd, H heads of N channels, F dim_ffn. A linear's
weight is (out, in), a low-rank map (in, rank) and (rank, out).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rwkv_miss.files.checkpoint import Arch

from ..ops import wkv7
from ..ops.elementwise import (
    TokenShift,
    delta_inputs,
    native_functions,
    readout7,
    relu_squared,
    value_residual,
)
from ..ops.mix7 import mix7, mix7_serves
from .layers import (
    GROUP_NORM_EPS,
    LayerNorm,
    Linear,
    chosen,
    depth_ratios,
    low_rank,
    parameter,
    shard_rank,
    split_heads,
    time_state,
)


class TimeMix(nn.Module):
    """The generalised delta rule with a vector-valued decay and in-context learning rate."""

    def __init__(self, arch: Arch, layer: int, kernel: str):
        super().__init__()
        self.layer, self.heads = layer, arch.n_head
        self.kernel, self.native = kernel, native_functions(kernel)
        C, H, N, rank = arch.n_embd, arch.n_head, arch.head_size, arch.ranks
        self.x_r = parameter(1, 1, C)  # token shift of r: its input is z_t + (z_{t-1} - z_t) x_r
        self.x_w = parameter(1, 1, C)  # token shift of the decay w
        self.x_k = parameter(1, 1, C)  # token shift of k
        self.x_v = parameter(1, 1, C)  # token shift of v
        self.x_a = parameter(1, 1, C)  # token shift of the in-context learning rate a
        self.x_g = parameter(1, 1, C)  # token shift of the gate g
        self.k_k = parameter(1, 1, C)  # kappa = normalise(k k_k), in every head
        self.k_a = parameter(1, 1, C)  # k <- k (1 + (a - 1) k_a)
        self.w0 = parameter(1, 1, C)  # w = w0 + tanh(x_w w1) w2
        self.a0 = parameter(1, 1, C)  # a = sigmoid(a0 + x_a a1 a2)
        self.r_k = parameter(H, N)  # readout: the current token adds (r . k r_k) v
        self.w1 = parameter(C, rank["w"])  # (C, Rw)
        self.w2 = parameter(rank["w"], C)  # (Rw, C)
        self.a1 = parameter(C, rank["a"])  # (C, Ra)
        self.a2 = parameter(rank["a"], C)  # (Ra, C)
        self.g1 = parameter(C, rank["g"])  # (C, Rg), g = sigmoid(x_g g1) g2
        self.g2 = parameter(rank["g"], C)  # (Rg, C)
        if layer > 0 or arch.layer0_value_residual:
            # layer 0 never reads them: they are kept for the file only, and must not wait for a gradient
            used = layer > 0
            self.v0 = parameter(1, 1, C, requires_grad=used)  # v += (v_first - v) sigmoid(v0 + x_v v1 v2)
            self.v1 = parameter(C, rank["v"], requires_grad=used)  # (C, Rv)
            self.v2 = parameter(rank["v"], C, requires_grad=used)  # (Rv, C)
        self.receptance = Linear(C, C, bias=False)  # (C, C), r
        self.key = Linear(C, C, bias=False)  # (C, C), k
        self.value = Linear(C, C, bias=False)  # (C, C), v
        self.output = Linear(C, C, bias=False)  # (C, C)
        self.ln_x = nn.GroupNorm(H, C, eps=GROUP_NORM_EPS)  # (C), (C), applied in the readout
        self.time_state = time_state(arch)  # (H, N, N) or None
        if not self.key.weight.is_meta:  # which has no values: a model that is loaded or planned
            self._init_weights(arch)

    @torch.no_grad()
    def _init_weights(self, arch: Arch) -> None:
        C, N = arch.n_embd, arch.head_size
        rho, sigma = depth_ratios(self.layer, arch.n_layer)
        channel = torch.arange(C)
        share, linear = channel / C, channel / max(C - 1, 1) - 0.5
        centre = (N - 1) / 2
        zigzag = (channel % N - centre) / max(centre, 1)
        zigzag = zigzag * zigzag.abs()
        self.x_r.copy_(1 - share ** (0.2 * sigma))
        self.x_w.copy_(1 - share ** (0.9 * sigma))
        self.x_k.copy_(1 - share ** (0.7 * sigma))
        self.x_v.copy_(1 - share ** (0.7 * sigma))
        self.x_a.copy_(1 - share ** (0.9 * sigma))
        self.x_g.copy_(1 - share ** (0.2 * sigma))
        self.k_k.copy_(0.71 - 0.1 * linear)
        self.k_a.fill_(1.02)
        self.w0.copy_(-6 + 6 * (channel / max(C - 1, 1)) ** (1 + rho**0.3) + 0.5 + 2.5 * zigzag)
        self.a0.copy_(-0.19 + 0.3 * zigzag + 0.4 * linear)
        self.r_k.fill_(-0.04)
        low_rank_init(self.w1, self.w2)
        low_rank_init(self.a1, self.a2)
        if hasattr(self, "v0"):
            self.v0.copy_(0.73 - 0.4 * linear)
            low_rank_init(self.v1, self.v2)
        low_rank_init(self.g1, self.g2)
        nn.init.orthogonal_(self.receptance.weight)
        nn.init.orthogonal_(self.key.weight, gain=0.1)
        nn.init.orthogonal_(self.value.weight)
        self.output.weight.zero_()
        self.ln_x.weight.fill_(((1 + self.layer) / arch.n_layer) ** 0.7)

    def initial_state(self) -> Tensor | None:
        """Return the state [value, key] that documents start from, as files have it; None is zero."""
        return self.time_state

    def external_parameters(self) -> list[nn.Parameter]:
        """Return parameters that forward() reads of modules that it does not call: ZeRO-3 gathers them,
        too."""
        return [self.ln_x.weight, self.ln_x.bias]

    def shift(self, last: Tensor, reset: Tensor | None) -> TokenShift:
        """Describe the token shift: the inputs of r, w, k, v, a and g, and of v's gate."""
        mixes = [self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g]
        ranks = [shard_rank(self.receptance), 0, shard_rank(self.key), shard_rank(self.value), 0, 0]
        return TokenShift(last, reset, mixes, [3] if self.layer > 0 else [], ranks)

    def project(self, shifted: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Compute r, decay w, k, v, learning rate a, gate g, all (B, T, C), and the gate of v_first, None in
        layer 0; w, a and this gate are raw, before sigmoid."""
        # a linear or a low-rank map of each
        x_r, x_w, x_k, x_v, x_a, x_g, *x_v_again = shifted
        v = self.value(x_v)
        gate = low_rank(*x_v_again, self.v1, self.v2, self.v0) if self.layer > 0 else None
        w = low_rank(x_w, self.w1, self.w2, self.w0, torch.tanh)
        a = low_rank(x_a, self.a1, self.a2, self.a0)
        g = low_rank(x_g, self.g1, self.g2, act=torch.sigmoid)
        r = self.receptance(x_r)
        k = self.key(x_k)
        return (r, w, k, v, a, g), gate

    def forward(
        self,
        x: Tensor,
        mixed: Tensor | None,
        norm: LayerNorm,
        v_first: Tensor | None,
        last: Tensor,
        state: Tensor | None,
        reset: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return x + mixed, the output (B, T, C), v_first, the last z (B, C), the state after it.

        z (B, T, C): the input, norm(x + mixed). v_first (B, T, C): layer 0's value. last (B, C): the z before
        the first one. state (B, H, N, N): the WKV state there. reset (B, T) bool: where documents start.
        """
        x, z_last, shifted = norm(x, mixed, self.shift(last, reset))
        activations, gate = self.project(shifted)
        del shifted  # without a gradient nothing else keeps these six tensors
        r, w, k, v, a, g = activations
        initial_state = self.initial_state()
        vectors = self.k_k, self.k_a, self.r_k, self.ln_x.weight, self.ln_x.bias
        if mix7_serves(activations, vectors, reset, initial_state, self.native):
            # the four steps below in one native function, which keeps less for the backward
            eps, how = self.ln_x.eps, (self.kernel, self.native, shard_rank(self.output))
            residual = () if gate is None else (v_first, gate)
            y, state, first = mix7(activations, residual, vectors, eps, state, reset, initial_state, *how)
        else:
            # value residual: v += (v_first - v) sigmoid(gate)
            first = None
            if gate is not None:
                v, first = value_residual(v, v_first, gate, self.native)
            # delta inputs, a after its sigmoid: kappa = normalise(k k_k), alpha = -kappa, beta = kappa a,
            # k <- k (1 + (a - 1) k_a)
            k, alpha, beta = delta_inputs(k, a, self.k_k, self.k_a, self.heads, self.native)
            # WKV: S <- S diag(delta) + (S alpha) beta^T + v k^T,  y = S r,  delta the decay of w
            heads = split_heads(self.heads, r, w, k, v, alpha, beta)
            y, state = wkv7(*heads, state, reset, self.kernel, initial_state)
            # readout: (ln_x(y) + (r . k r_k) v) g
            ln_x = self.ln_x.weight, self.ln_x.bias, self.ln_x.eps
            y = readout7(y.flatten(-2), r, k, v, g, self.r_k, *ln_x, self.native)
        return x, self.output(y), v if first is None else first, z_last, state


def low_rank_init(first: Tensor, second: Tensor) -> None:
    """Initialise a low-rank map to zero."""
    first.zero_()
    nn.init.orthogonal_(second, gain=0.1 * max(1.0, second.shape[0] / second.shape[1]) ** 0.5)


class ChannelMix(nn.Module):
    """value(relu(key(x_k))^2), with x_k the token-shifted input."""

    def __init__(self, arch: Arch, layer: int, kernel: str):
        super().__init__()
        self.native = native_functions(kernel)
        C, F = arch.n_embd, arch.dim_ffn
        self.x_k = parameter(1, 1, C)  # token shift: the share of the token before
        self.key = Linear(C, F, bias=False)  # (F, C)
        self.value = Linear(F, C, bias=False)  # (C, F)
        if not self.key.weight.is_meta:  # which has no values: a model that is loaded or planned
            self._init_weights(arch, layer)

    @torch.no_grad()
    def _init_weights(self, arch: Arch, layer: int) -> None:
        _, sigma = depth_ratios(layer, arch.n_layer)
        self.x_k.copy_(1 - (torch.arange(arch.n_embd) / arch.n_embd) ** (sigma**4))
        nn.init.orthogonal_(self.key.weight)
        self.value.weight.zero_()

    def forward(
        self,
        x: Tensor,
        mixed: Tensor | None,
        norm: LayerNorm,
        last: Tensor,
        reset: Tensor | None,
        wanted: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return x + mixed, the output (B, T, C), or of the wanted tokens only, as chosen() gives them, and
        the last z (B, C).

        z: the input, norm(x + mixed). last (B, C): the z before the first one. reset (B, T) bool: where
        documents start. wanted (n,) int64: as for chosen().
        """
        shift = TokenShift(last, reset, [self.x_k], ranks=[shard_rank(self.key)])
        x, z_last, (x_k,) = norm(x, mixed, shift)
        k = relu_squared(self.key(chosen(x_k, wanted)), self.native, shard_rank(self.value))
        return x, self.value(k), z_last


def default_sizes(n_embd: int) -> tuple[int, dict[str, int]]:
    """Return (dim_ffn, ranks of the low-rank maps) of a new model: RWKV-LM's formulas, multiples of 32."""

    def rank(x: float) -> int:
        return max(32, 32 * round(x / 32))

    root = math.sqrt(n_embd)
    return 4 * n_embd, {
        "w": rank(2.5 * root),
        "a": rank(2.5 * root),
        "v": rank(1.7 * root),
        "g": rank(5 * root),
    }
