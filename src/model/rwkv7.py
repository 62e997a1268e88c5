"""RWKV-7 "Goose" (x070, arXiv 2503.14456): time mix, channel mix and RWKV-LM's initialisation. Shapes as in
model.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rwkv_miss.files.checkpoint import Arch

from ..ops.elementwise import relu_squared, shift_mix, value_residual
from ..ops.mix7 import mix7
from .layers import (
    GROUP_NORM_EPS,
    Cast,
    Linear,
    chosen,
    depth_ratios,
    initial_state,
    last_token,
    low_rank,
    vector,
)


class TimeMix(nn.Module):
    """The generalised delta rule with a vector-valued decay and in-context learning rate."""

    def __init__(self, arch: Arch, layer: int, kernel: str):
        super().__init__()
        self.layer, self.heads = layer, arch.n_head
        self.kernel, self.native = kernel, kernel == "cpu"
        width, ranks = arch.n_embd, arch.ranks
        for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "k_k", "k_a", "w0", "a0"):
            setattr(self, name, vector(width))
        self.r_k = nn.Parameter(torch.empty(arch.n_head, arch.head_size))
        for name in "wag":
            setattr(self, f"{name}1", nn.Parameter(torch.empty(width, ranks[name])))
            setattr(self, f"{name}2", nn.Parameter(torch.empty(ranks[name], width)))
        if layer > 0 or arch.layer0_value_residual:
            # layer 0 never reads v0, v1, v2: they are kept for the file only, and must not wait for a
            # gradient
            used = layer > 0
            self.v0 = vector(width, used)
            self.v1 = nn.Parameter(torch.empty(width, ranks["v"]), requires_grad=used)
            self.v2 = nn.Parameter(torch.empty(ranks["v"], width), requires_grad=used)
        self.receptance = Linear(width, width, bias=False)
        self.key = Linear(width, width, bias=False)
        self.value = Linear(width, width, bias=False)
        self.output = Linear(width, width, bias=False)
        self.ln_x = Mix(arch.n_head, width, eps=GROUP_NORM_EPS)
        self.time_state = initial_state(arch)
        self._init_weights(arch)

    @torch.no_grad()
    def _init_weights(self, arch: Arch) -> None:
        width = arch.n_embd
        rho, sigma = depth_ratios(self.layer, arch.n_layer)
        channel = torch.arange(width)
        share, linear = channel / width, channel / max(width - 1, 1) - 0.5
        centre = (arch.head_size - 1) / 2
        zigzag = (channel % arch.head_size - centre) / max(centre, 1)
        zigzag = zigzag * zigzag.abs()
        for names, power in (("rg", 0.2), ("wa", 0.9), ("kv", 0.7)):
            for name in names:
                getattr(self, f"x_{name}").copy_(1 - share ** (power * sigma))
        self.w0.copy_(-6 + 6 * (channel / max(width - 1, 1)) ** (1 + rho**0.3) + 0.5 + 2.5 * zigzag)
        self.a0.copy_(-0.19 + 0.3 * zigzag + 0.4 * linear)
        self.k_k.copy_(0.71 - 0.1 * linear)
        self.k_a.fill_(1.02)
        self.r_k.fill_(-0.04)
        if hasattr(self, "v0"):
            self.v0.copy_(0.73 - 0.4 * linear)
        for name in "wavg":
            if hasattr(self, f"{name}1"):
                getattr(self, f"{name}1").zero_()
                second = getattr(self, f"{name}2")
                nn.init.orthogonal_(second, gain=0.1 * max(1.0, second.shape[0] / second.shape[1]) ** 0.5)
        for linear_map, gain in ((self.receptance, 1.0), (self.key, 0.1), (self.value, 1.0)):
            nn.init.orthogonal_(linear_map.weight, gain)
        self.output.weight.zero_()
        self.ln_x.weight.fill_(((1 + self.layer) / arch.n_layer) ** 0.7)

    def start(self) -> Tensor | None:
        """The state [value, key] that documents start from, as files have it; None is zero."""
        return self.time_state

    def forward(
        self, z: Tensor, v_first: Tensor | None, last: Tensor, wkv: Tensor | None, reset: Tensor | None
    ):
        """z (B, T, C) after ln1, reset (B, T) -> (output (B, T, C), v_first (B, T, C), last z (B, C), wkv
        state).
        """
        r, w, k, v, a, g = self.project(z, v_first, last, reset)
        if self.layer == 0:
            v_first = v
        y, wkv = self.ln_x(
            r, w, k, v, a, g, self.k_k, self.k_a, self.r_k, wkv, reset, self.start(), self.kernel, self.native
        )
        return self.output(y), v_first, last_token(z), wkv

    def project(
        self, z: Tensor, v_first: Tensor | None, last: Tensor, reset: Tensor | None
    ) -> tuple[Tensor, ...]:
        """r, raw decay w, k, v, raw learning rate a and gate g, all (B, T, C): linear maps of z mixed with
        its predecessor.
        """
        p = Cast(self, z.dtype)
        x_r, x_w, x_k, x_v, x_a, x_g = shift_mix(
            z, last, reset, [self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g], self.native
        )
        v = self.value(x_v)
        if self.layer > 0:
            v = value_residual(v, v_first, low_rank(x_v, p.v1, p.v2, p.v0), self.native)
        w = low_rank(x_w, p.w1, p.w2, p.w0, torch.tanh)
        a = low_rank(x_a, p.a1, p.a2, p.a0)
        g = low_rank(x_g, p.g1, p.g2, act=torch.sigmoid)
        return self.receptance(x_r), w, self.key(x_k), v, a, g


class Mix(nn.GroupNorm):
    """mix7, with the parameters of ln_x: ZeRO-3 has parameters at hand while the module that they belong to
    is called, and then only.
    """

    def forward(self, r, w, k, v, a, g, k_k, k_a, r_k, *state_and_kernel) -> tuple[Tensor, Tensor]:
        return mix7(r, w, k, v, a, g, k_k, k_a, r_k, self.weight, self.bias, self.eps, *state_and_kernel)


class ChannelMix(nn.Module):
    """value(relu(key(mixed x))^2)."""

    def __init__(self, arch: Arch, layer: int, kernel: str):
        super().__init__()
        self.native = kernel == "cpu"
        self.x_k = vector(arch.n_embd)
        self.key = Linear(arch.n_embd, arch.dim_ffn, bias=False)
        self.value = Linear(arch.dim_ffn, arch.n_embd, bias=False)
        self._init_weights(arch, layer)

    @torch.no_grad()
    def _init_weights(self, arch: Arch, layer: int) -> None:
        _, sigma = depth_ratios(layer, arch.n_layer)
        self.x_k.copy_(1 - (torch.arange(arch.n_embd) / arch.n_embd) ** (sigma**4))
        nn.init.orthogonal_(self.key.weight)
        self.value.weight.zero_()

    def forward(
        self, z: Tensor, last: Tensor, reset: Tensor | None, wanted: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """z (B, T, C) after ln2, reset (B, T) -> (output (B, T, C), or of the wanted tokens, see `chosen`;
        last z (B, C)).
        """
        (x_k,) = shift_mix(z, last, reset, [self.x_k], self.native)
        return self.value(relu_squared(self.key(chosen(x_k, wanted)), self.native)), last_token(z)


def default_sizes(n_embd: int) -> tuple[int, dict[str, int]]:
    """(dim_ffn, ranks of the low-rank maps) of a new model: RWKV-LM's formulas, multiples of 32."""

    def rank(x: float) -> int:
        return max(32, 32 * round(x / 32))

    root = math.sqrt(n_embd)
    return 4 * n_embd, {
        "w": rank(2.5 * root),
        "a": rank(2.5 * root),
        "v": rank(1.7 * root),
        "g": rank(5 * root),
    }
