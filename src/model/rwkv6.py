"""RWKV-6 "Finch" (x060, arXiv 2404.05892): time mix, channel mix and RWKV-LM's initialisation. Shapes as in
model.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rwkv_miss.files.checkpoint import Arch
from rwkv_miss.functional import linear

from ..ops import wkv6
from ..ops.elementwise import readout6, relu_squared, shift_mix, shift_mix_low_rank
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

MIXES = "wkvrg"  # the order of the rows of time_maa_w2


class TimeMix(nn.Module):
    """Linear attention with a data-dependent decay and data-dependent token shift."""

    def __init__(self, arch: Arch, layer: int, kernel: str):
        super().__init__()
        self.layer, self.heads = layer, arch.n_head
        self.kernel, self.native = kernel, kernel == "cpu"
        width, inner, ranks = arch.n_embd, arch.dim_att, arch.ranks
        for name in ("x", *MIXES):
            setattr(self, f"time_maa_{name}", vector(width))
        self.time_maa_w1 = nn.Parameter(torch.empty(width, 5 * ranks["maa"]))
        self.time_maa_w2 = nn.Parameter(torch.empty(5, ranks["maa"], width))
        self.time_decay = vector(inner)
        self.time_decay_w1 = nn.Parameter(torch.empty(width, ranks["decay"]))
        self.time_decay_w2 = nn.Parameter(torch.empty(ranks["decay"], inner))
        self.time_faaaa = nn.Parameter(torch.empty(arch.n_head, arch.head_size))
        self.receptance = Linear(width, inner, bias=False)
        self.key = Linear(width, inner, bias=False)
        self.value = Linear(width, inner, bias=False)
        self.gate = Linear(width, inner, bias=False)
        self.output = Linear(inner, width, bias=False)
        self.ln_x = Readout(arch.n_head, inner, eps=GROUP_NORM_EPS)
        self.time_state = initial_state(arch)
        self._init_weights(arch)

    @torch.no_grad()
    def _init_weights(self, arch: Arch) -> None:
        rho, sigma = depth_ratios(self.layer, arch.n_layer)
        share = torch.arange(arch.n_embd) / arch.n_embd
        for name in "xwk":
            getattr(self, f"time_maa_{name}").copy_(1 - share**sigma)
        self.time_maa_v.copy_(1 - (share**sigma + 0.3 * rho))
        for name in "rg":
            getattr(self, f"time_maa_{name}").copy_(1 - share ** (0.5 * sigma))
        channel = torch.arange(arch.dim_att)
        height = channel / max(arch.dim_att - 1, 1)
        self.time_decay.copy_(-6 + 5 * height ** (0.7 + 1.3 * rho))
        self.time_faaaa.copy_((rho * (1 - height) + 0.1 * ((channel + 1) % 3 - 1)).view_as(self.time_faaaa))
        for name in ("time_maa", "time_decay"):
            getattr(self, f"{name}_w1").zero_()
            getattr(self, f"{name}_w2").uniform_(-0.01, 0.01)
        for linear_map, gain in (
            (self.receptance, 1.0),
            (self.key, 0.1),
            (self.value, 1.0),
            (self.gate, 0.1),
        ):
            nn.init.orthogonal_(linear_map.weight, gain)
        self.output.weight.zero_()
        self.ln_x.weight.fill_(((1 + self.layer) / arch.n_layer) ** 0.7)

    def start(self) -> Tensor | None:
        """The state [key, value] that documents start from; files have it as [value, key]. None is zero."""
        return None if self.time_state is None else self.time_state.mT

    def forward(
        self, z: Tensor, v_first: Tensor | None, last: Tensor, wkv: Tensor | None, reset: Tensor | None
    ):
        """z (B, T, C) after ln1, reset (B, T) -> (output (B, T, C), v_first untouched, last z (B, C), wkv
        state).
        """
        r, k, v, w, g = self.project(z, last, reset)
        heads = (x.unflatten(-1, (self.heads, -1)) for x in (r, k, v, w))
        y, wkv = wkv6(*heads, self.time_faaaa.to(z.dtype), wkv, reset, self.kernel, self.start())
        return self.output(self.ln_x(y.flatten(-2), g, self.native)), v_first, last_token(z), wkv

    def project(self, z: Tensor, last: Tensor, reset: Tensor | None) -> tuple[Tensor, ...]:
        """r, k, v, raw decay w and gate g before silu, all (B, T, A): linear maps of z mixed with its
        predecessor, in shares that depend on both.
        """
        p = Cast(self, z.dtype)
        (x,) = shift_mix(z, last, reset, [self.time_maa_x], self.native)
        q = (
            torch.tanh(linear(x, p.time_maa_w1, transposed=True))
            .view(z.shape[0] * z.shape[1], len(MIXES), -1)
            .transpose(0, 1)
        )
        mixes = [getattr(self, f"time_maa_{name}") for name in MIXES]
        x_w, x_k, x_v, x_r, x_g = shift_mix_low_rank(z, last, reset, mixes, q, self.time_maa_w2, self.native)
        w = low_rank(x_w, p.time_decay_w1, p.time_decay_w2, p.time_decay, torch.tanh)
        return self.receptance(x_r), self.key(x_k), self.value(x_v), w, self.gate(x_g)


class Readout(nn.GroupNorm):
    """ln_x and the gate: group_norm(y) silu(g)."""

    def forward(self, y: Tensor, g: Tensor, native: bool) -> Tensor:
        return readout6(y, g, self.weight, self.bias, self.num_groups, self.eps, native)


class ChannelMix(nn.Module):
    """sigmoid(receptance(mixed x)) * value(relu(key(mixed x))^2)."""

    def __init__(self, arch: Arch, layer: int, kernel: str):
        super().__init__()
        self.native = kernel == "cpu"
        self.time_maa_k = vector(arch.n_embd)
        self.time_maa_r = vector(arch.n_embd)
        self.key = Linear(arch.n_embd, arch.dim_ffn, bias=False)
        self.receptance = Linear(arch.n_embd, arch.n_embd, bias=False)
        self.value = Linear(arch.dim_ffn, arch.n_embd, bias=False)
        self._init_weights(arch, layer)

    @torch.no_grad()
    def _init_weights(self, arch: Arch, layer: int) -> None:
        _, sigma = depth_ratios(layer, arch.n_layer)
        mix = 1 - (torch.arange(arch.n_embd) / arch.n_embd) ** (sigma**3)
        self.time_maa_k.copy_(mix)
        self.time_maa_r.copy_(mix)
        nn.init.orthogonal_(self.key.weight)
        self.receptance.weight.zero_()
        self.value.weight.zero_()

    def forward(
        self, z: Tensor, last: Tensor, reset: Tensor | None, wanted: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """z (B, T, C) after ln2, reset (B, T) -> (output (B, T, C), or of the wanted tokens, see `chosen`;
        last z (B, C)).
        """
        x_k, x_r = shift_mix(z, last, reset, [self.time_maa_k, self.time_maa_r], self.native)
        k = relu_squared(self.key(chosen(x_k, wanted)), self.native)
        return torch.sigmoid(self.receptance(chosen(x_r, wanted))) * self.value(k), last_token(z)


def default_sizes(n_embd: int) -> tuple[int, dict[str, int]]:
    """(dim_ffn, ranks of the low-rank maps) of a new model, as in RWKV-LM."""
    wide = 2 if n_embd >= 4096 else 1
    return 32 * int(3.5 * n_embd / 32), {"maa": 32 * wide, "decay": 64 * wide}
