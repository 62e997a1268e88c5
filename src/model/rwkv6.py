"""RWKV-6 "Finch" (x060, arXiv 2404.05892): time mix, channel mix and RWKV-LM's initialisation.

Names are the checkpoint's, shapes as in rwkv.py: C n_embd, A dim_att = H heads of N channels, F dim_ffn. A
linear's weight is (out, in), a low-rank map (in, rank) and (rank, out).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rwkv_miss.files.checkpoint import Arch

from ..ops import wkv6
from ..ops.elementwise import (
    TokenShift,
    gated,
    native_functions,
    readout6,
    relu_squared,
    shift_mix,
    shift_mix_low_rank,
)
from .layers import (
    GROUP_NORM_EPS,
    LayerNorm,
    Linear,
    chosen,
    depth_ratios,
    last_token,
    low_rank,
    parameter,
    shard_rank,
    split_heads,
    time_state,
    times,
)


class TimeMix(nn.Module):
    """Linear attention with a data-dependent decay and data-dependent token shift."""

    def __init__(self, arch: Arch, layer: int, kernel: str):
        super().__init__()
        self.layer, self.heads = layer, arch.n_head
        self.kernel, self.native = kernel, native_functions(kernel)
        C, A, H, N, rank = arch.n_embd, arch.dim_att, arch.n_head, arch.head_size, arch.ranks
        self.time_maa_x = parameter(1, 1, C)  # token shift of x: z_t + (z_{t-1} - z_t) time_maa_x
        self.time_maa_w = parameter(1, 1, C)  # token shift of the decay w: its share is time_maa_w + m_w
        self.time_maa_k = parameter(1, 1, C)  # token shift of k
        self.time_maa_v = parameter(1, 1, C)  # token shift of v
        self.time_maa_r = parameter(1, 1, C)  # token shift of r
        self.time_maa_g = parameter(1, 1, C)  # token shift of the gate g
        self.time_maa_w1 = parameter(C, 5 * rank["maa"])  # (C, 5 Rm), q = tanh(x time_maa_w1), five parts
        self.time_maa_w2 = parameter(5, rank["maa"], C)  # (5, Rm, C), m_w = q_w time_maa_w2_w; k, v, r, g
        self.time_decay = parameter(1, 1, A)  # w = time_decay + tanh(x_w time_decay_w1) time_decay_w2
        self.time_decay_w1 = parameter(C, rank["decay"])  # (C, Rd)
        self.time_decay_w2 = parameter(rank["decay"], A)  # (Rd, A)
        self.time_faaaa = parameter(H, N)  # u of the WKV: the current token's weight in its own y
        self.receptance = Linear(C, A, bias=False)  # (A, C), r
        self.key = Linear(C, A, bias=False)  # (A, C), k
        self.value = Linear(C, A, bias=False)  # (A, C), v
        self.gate = Linear(C, A, bias=False)  # (A, C), g
        self.output = Linear(A, C, bias=False)  # (C, A)
        self.ln_x = nn.GroupNorm(H, A, eps=GROUP_NORM_EPS)  # (A), (A), applied in the readout
        self.time_state = time_state(arch)  # (H, N, N) or None
        if not self.key.weight.is_meta:  # which has no values: a model that is loaded or planned
            self._init_weights(arch)

    @torch.no_grad()
    def _init_weights(self, arch: Arch) -> None:
        rho, sigma = depth_ratios(self.layer, arch.n_layer)
        share = torch.arange(arch.n_embd) / arch.n_embd
        self.time_maa_x.copy_(1 - share**sigma)
        self.time_maa_w.copy_(1 - share**sigma)
        self.time_maa_k.copy_(1 - share**sigma)
        self.time_maa_v.copy_(1 - (share**sigma + 0.3 * rho))
        self.time_maa_r.copy_(1 - share ** (0.5 * sigma))
        self.time_maa_g.copy_(1 - share ** (0.5 * sigma))
        channel = torch.arange(arch.dim_att)
        height = channel / max(arch.dim_att - 1, 1)
        self.time_decay.copy_(-6 + 5 * height ** (0.7 + 1.3 * rho))
        self.time_faaaa.copy_((rho * (1 - height) + 0.1 * ((channel + 1) % 3 - 1)).view_as(self.time_faaaa))
        self.time_maa_w1.zero_()
        self.time_maa_w2.uniform_(-0.01, 0.01)
        self.time_decay_w1.zero_()
        self.time_decay_w2.uniform_(-0.01, 0.01)
        nn.init.orthogonal_(self.receptance.weight)
        nn.init.orthogonal_(self.key.weight, gain=0.1)
        nn.init.orthogonal_(self.value.weight)
        nn.init.orthogonal_(self.gate.weight, gain=0.1)
        self.output.weight.zero_()
        self.ln_x.weight.fill_(((1 + self.layer) / arch.n_layer) ** 0.7)

    def initial_state(self) -> Tensor | None:
        """Return the state [key, value] that documents start from; files have [value, key]. None is zero."""
        return None if self.time_state is None else self.time_state.mT

    def external_parameters(self) -> list[nn.Parameter]:
        """Return parameters that forward() reads of modules that it does not call: ZeRO-3 gathers them,
        too."""
        return [self.ln_x.weight, self.ln_x.bias]

    def project(self, z: Tensor, last: Tensor, reset: Tensor | None) -> tuple[Tensor, ...]:
        """Compute r, k, v, decay w and gate g, all (B, T, A); w and g are raw, before exponentials and
        silu."""
        # the share that every token adds to its mixes: m_c = q_c time_maa_w2_c, q = tanh(x time_maa_w1)
        (x,) = shift_mix(z, last, reset, [self.time_maa_x], self.native)
        q = torch.tanh(times(x, self.time_maa_w1))
        q = q.view(z.shape[0] * z.shape[1], 5, -1).transpose(0, 1)  # (5, B T, Rm)
        # token shift: the input of c is z_t + (z_{t-1} - z_t) (time_maa_c + m_c), for w, k, v, r and g
        mixes = [self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g]
        maps = self.time_maa_w2
        ranks = [0, *map(shard_rank, (self.key, self.value, self.receptance, self.gate))]
        x = shift_mix_low_rank(z, last, reset, mixes, q, maps, self.native, ranks)
        x_w, x_k, x_v, x_r, x_g = x
        w = low_rank(x_w, self.time_decay_w1, self.time_decay_w2, self.time_decay, torch.tanh)
        r = self.receptance(x_r)
        k = self.key(x_k)
        v = self.value(x_v)
        g = self.gate(x_g)
        return r, k, v, w, g

    def forward(
        self,
        x: Tensor,
        mixed: Tensor | None,
        norm: LayerNorm,
        v_first: Tensor | None,
        last: Tensor,
        state: Tensor | None,
        reset: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        """Return x + mixed, the output (B, T, C), v_first as given, the last z (B, C), the state after it.

        z (B, T, C): the input, norm(x + mixed). v_first: for RWKV-7 only. last (B, C): the z before the first
        one. state (B, H, N, N): the WKV state there. reset (B, T) bool: where documents start.
        """
        x, z = norm(x, mixed)
        r, k, v, w, g = self.project(z, last, reset)
        # WKV: y = r (S + u k^T v),  S <- diag(delta) S + k^T v,  delta the decay of w
        heads, u = split_heads(self.heads, r, k, v, w), self.time_faaaa.to(z.dtype)
        y, state = wkv6(*heads, u, state, reset, self.kernel, self.initial_state())
        # readout: ln_x(y) silu(g)
        ln_x = self.ln_x.weight, self.ln_x.bias, self.heads, self.ln_x.eps
        y = readout6(y.flatten(-2), g, *ln_x, self.native, shard_rank(self.output))
        return x, self.output(y), v_first, last_token(z), state


class ChannelMix(nn.Module):
    """sigmoid(receptance(x_r)) * value(relu(key(x_k))^2), with x_r and x_k the token-shifted inputs."""

    def __init__(self, arch: Arch, layer: int, kernel: str):
        super().__init__()
        self.native = native_functions(kernel)
        C, F = arch.n_embd, arch.dim_ffn
        self.time_maa_k = parameter(1, 1, C)  # token shift: the share of the token before in x_k
        self.time_maa_r = parameter(1, 1, C)  # and in x_r
        self.key = Linear(C, F, bias=False)  # (F, C)
        self.receptance = Linear(C, C, bias=False)  # (C, C)
        self.value = Linear(F, C, bias=False)  # (C, F)
        if not self.key.weight.is_meta:  # which has no values: a model that is loaded or planned
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
        mixes, ranks = [self.time_maa_k, self.time_maa_r], [shard_rank(self.key), shard_rank(self.receptance)]
        x, z_last, (x_k, x_r) = norm(x, mixed, TokenShift(last, reset, mixes, ranks=ranks))
        k = relu_squared(self.key(chosen(x_k, wanted)), self.native, shard_rank(self.value))
        gate = self.receptance(chosen(x_r, wanted))
        return x, gated(self.value(k), gate, self.native), z_last


def default_sizes(n_embd: int) -> tuple[int, dict[str, int]]:
    """Return (dim_ffn, ranks of the low-rank maps) of a new model, as in RWKV-LM."""
    wide = 2 if n_embd >= 4096 else 1
    return 32 * int(3.5 * n_embd / 32), {"maa": 32 * wide, "decay": 64 * wide}
