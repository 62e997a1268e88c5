"""WKV token by token in plain torch: the specification.

It is also the oracle of the tests, the step of a decoder, and the last fallback.

B batch, T tokens, H heads, N head size. All tensors of a call share one dtype, float32 or float64, which is
the dtype of the arithmetic; `src.ops` checks and casts before. The state `s` is (B, H, N, N), and is returned
as it stands after the last token. Where `reset` (B, T), bool, is set a document starts: the state is zeroed
before that token.
"""

import math

import torch


def decay6(w):
    """Compute delta = exp(-exp(w)), in [0, 1]: RWKV-6 has no floor, large w give exactly 0, -inf gives 1."""
    # The clamp keeps 0 * inf out of the backward. It changes no value: above w = 6.7 delta is an exact 0 in
    # float64 too.
    return torch.exp(-torch.exp(w.clamp(max=7)))


def log_decay7(w):
    """Compute log delta = -exp(-1/2) sigmoid(w): RWKV-7 keeps delta in (0.5453, 1], and -inf gives 1."""
    return -math.exp(-0.5) * torch.sigmoid(w)


def enter(s, reset):
    """Return the state (B,H,N,N) before a token: zero where reset (B,), bool or None, is set for it."""
    return s if reset is None else s.masked_fill(reset[:, None, None, None], 0)


def resets(reset, T):
    """Split reset (B,T) or None into one (B,) or None for each token."""
    return [None] * T if reset is None else reset.unbind(1)


def recurrent6(r, k, v, w, u, s, reset=None):
    """Run RWKV-6: r, k, v, w (B,T,H,N), u (H,N), s [key i, value j] -> y (B,T,H,N), s.

    y_t[j]  = sum_i r_t[i] (s[i,j] + u[i] k_t[i] v_t[j])
    s[i,j] <- delta_t[i] s[i,j] + k_t[i] v_t[j]

    y_t reads the state before the decay. The current token enters it through u only.
    """
    ys = []
    tokens = zip(resets(reset, r.shape[1]), *(x.unbind(1) for x in (r, k, v, decay6(w))), strict=True)
    for reset_t, r_t, k_t, v_t, delta_t in tokens:
        s = enter(s, reset_t)
        kv = k_t[..., :, None] * v_t[..., None, :]
        ys.append((r_t[..., None, :] @ (s + u[..., None] * kv)).squeeze(-2))
        s = delta_t[..., None] * s + kv
    return torch.stack(ys, 1), s


def recurrent7(r, w, k, v, a, b, s, reset=None):
    """Run RWKV-7: r, w, k, v, a, b (B,T,H,N), s [value i, key j] -> y (B,T,H,N), s.

    s  <- s diag(delta_t) + (s a_t) b_t^T + v_t k_t^T
    y_t = s r_t

    s a_t reads the state before the decay. Unlike in RWKV-6, y_t reads the state after the update.
    """
    ys = []
    tokens = zip(
        resets(reset, r.shape[1]), *(x.unbind(1) for x in (r, log_decay7(w).exp(), k, v, a, b)), strict=True
    )
    for reset_t, r_t, delta_t, k_t, v_t, a_t, b_t in tokens:
        s = enter(s, reset_t)
        s = (
            s * delta_t[..., None, :]
            + (s @ a_t[..., None]) * b_t[..., None, :]
            + v_t[..., None] * k_t[..., None, :]
        )
        ys.append((s @ r_t[..., None]).squeeze(-1))
    return torch.stack(ys, 1), s
