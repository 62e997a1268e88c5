"""RWKV-7 "Goose" (x070, arXiv 2503.14456): time mix, channel mix and RWKV-LM's initialisation. Shapes as in model.py."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_miss.checkpoint import Arch

from .ops import wkv7
from .shared import GROUP_NORM_EPS, Cast, GroupNorm, Linear, chosen, depth_ratios, initial_state, token_shift, vector


class TimeMix(nn.Module):
    """The generalised delta rule with a vector-valued decay and in-context learning rate."""

    def __init__(self, arch: Arch, layer: int, kernel: str):
        super().__init__()
        self.layer, self.heads, self.kernel = layer, arch.n_head, kernel
        width, ranks = arch.n_embd, arch.ranks
        for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "k_k", "k_a", "w0", "a0"):
            setattr(self, name, vector(width))
        self.r_k = nn.Parameter(torch.empty(arch.n_head, arch.head_size))
        for name in "wag":
            setattr(self, f"{name}1", nn.Parameter(torch.empty(width, ranks[name])))
            setattr(self, f"{name}2", nn.Parameter(torch.empty(ranks[name], width)))
        if layer > 0 or arch.layer0_value_residual:
            # layer 0 never reads v0, v1, v2: they are kept for the file only, and must not wait for a gradient
            used = layer > 0
            self.v0 = vector(width, used)
            self.v1 = nn.Parameter(torch.empty(width, ranks["v"]), requires_grad=used)
            self.v2 = nn.Parameter(torch.empty(ranks["v"], width), requires_grad=used)
        self.receptance = Linear(width, width, bias=False)
        self.key = Linear(width, width, bias=False)
        self.value = Linear(width, width, bias=False)
        self.output = Linear(width, width, bias=False)
        self.ln_x = GroupNorm(arch.n_head, width, eps=GROUP_NORM_EPS)
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

    def forward(self, z: Tensor, v_first: Tensor | None, last: Tensor, wkv: Tensor | None, reset: Tensor | None):
        """z (B, T, C) after ln1, reset (B, T) -> (output (B, T, C), v_first (B, T, C), last z (B, C), wkv state)."""
        B, T, C = z.shape
        d, p = token_shift(z, last, reset), Cast(self, z.dtype)
        r = self.receptance(z + d * p.x_r)
        w = p.w0 + torch.tanh((z + d * p.x_w) @ p.w1) @ p.w2
        k = self.key(z + d * p.x_k)
        x_v = z + d * p.x_v
        v = self.value(x_v)
        a = torch.sigmoid(p.a0 + (z + d * p.x_a) @ p.a1 @ p.a2)
        g = torch.sigmoid((z + d * p.x_g) @ p.g1) @ p.g2
        if self.layer == 0:
            v_first = v
        else:
            v = v + (v_first - v) * torch.sigmoid(p.v0 + x_v @ p.v1 @ p.v2)
        kappa = F.normalize((k * p.k_k).view(B, T, self.heads, -1), dim=-1)
        k = k * (1 + (a - 1) * p.k_a)

        r, w, k, v, a = (x.view(B, T, self.heads, -1) for x in (r, w, k, v, a))
        y, wkv = wkv7(r, w, k, v, -kappa, kappa * a, wkv, reset, self.kernel, self.start())
        y = self.ln_x(y.reshape(B * T, C)).view(B, T, self.heads, -1)
        y = y + (r * k * p.r_k).sum(-1, keepdim=True) * v
        return self.output(y.view(B, T, C) * g), v_first, z[:, -1], wkv


class ChannelMix(nn.Module):
    """value(relu(key(mixed x))^2)."""

    def __init__(self, arch: Arch, layer: int):
        super().__init__()
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

    def forward(self, z: Tensor, last: Tensor, reset: Tensor | None, wanted: Tensor | None) -> tuple[Tensor, Tensor]:
        """z (B, T, C) after ln2, reset (B, T) -> (output (B, T, C), or of the wanted tokens, see `chosen`; last z (B, C))."""
        k = self.key(chosen(z + token_shift(z, last, reset) * self.x_k.to(z.dtype), wanted))
        return self.value(torch.relu(k) ** 2), z[:, -1]


def default_sizes(n_embd: int) -> tuple[int, dict[str, int]]:
    """(dim_ffn, ranks of the low-rank maps) of a new model: RWKV-LM's formulas, multiples of 32."""

    def rank(x: float) -> int:
        return max(32, 32 * round(x / 32))

    root = math.sqrt(n_embd)
    return 4 * n_embd, {"w": rank(2.5 * root), "a": rank(2.5 * root), "v": rank(1.7 * root), "g": rank(5 * root)}
