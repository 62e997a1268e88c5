"""WKV-7 in chunks, plain torch and plain autograd.

A chunk of C tokens with incoming state S, here [key, value], and P_t = sum_{s<=t} log delta_s; all rows of
(C, N) matrices:

    A = a e^{P - log delta}     B = b e^{-P}     K = k e^{-P}     R = r e^{P}
    U  = (I - tril-(A B^T))^-1 (tril-(A K^T) V + A S)             U_t = a_t S_{t-1}, what the delta rule reads
    Y  = R S + tril(R B^T) U + tril(R K^T) V                      tril: lower; tril-: strictly so
    S' = e^{P_C} (S + B^T U + K^T V)

Where documents start inside the chunk, tokens of two documents do not meet in the (C, C) matrices, S meets
the first document only, and the last document alone enters S'.
"""

import torch

from .chunked6 import join, split, split_reset
from .reference import log_decay7, recurrent7


def chunked7(r, w, k, v, a, b, s, reset=None, chunk=16):
    """Compute `recurrent7` in chunks.

    e^{-P} <= e^{0.6065 chunk} is 1.6e4 for chunks of 16. 32 is no faster and up to 1.7x less exact.
    """
    B, T, H, N = r.shape
    if T == 1:
        return recurrent7(r, w, k, v, a, b, s, reset)
    n = -(-T // chunk)
    C = -(-T // n)
    log_delta = log_decay7(split(w, n, C, fill=-torch.inf))
    r, k, v, a, b = (split(x, n, C) for x in (r, k, v, a, b))
    P = log_delta.cumsum(1)
    grow, shrink, end = (-P).exp(), P.exp(), P[:, -1:].exp()
    r, k, a, b = r * shrink, k * grow, a * (P - log_delta).exp(), b * grow
    lower = r.new_ones(C, C).tril()
    strict = lower.tril(-1)
    first = last = lower.new_ones(1, 1, 1)
    if reset is not None:
        document = split_reset(reset, n, C, H).cumsum(1)
        same = (document == document.mT).to(r.dtype)
        lower, strict = lower * same, strict * same
        first, last = (document == 0).to(r.dtype), same[:, :, -1:]
    ab, ak, rb, rk = a @ b.mT * strict, a @ k.mT * strict, r @ b.mT * lower, r @ k.mT * lower
    inverse = torch.linalg.solve_triangular(
        -ab, torch.eye(C, dtype=r.dtype, device=r.device), upper=False, unitriangular=True
    )
    # U = u + a S, with the inverse applied to both. All this is batched over chunks. The loop has only what
    # needs the state.
    u, a = inverse @ (ak @ v), inverse @ (a * first)
    parts = (
        u,
        a,
        rk @ v,
        r * first,
        (k * end * last).mT,
        v,
        (b * end * last).mT,
        (end * first[..., -1:, :]).mT,
    )
    s, us, ys = s.reshape(B * H, N, N).mT, [], []
    for u_c, a_c, y_c, r_c, k_c, v_c, b_c, end_c in zip(
        *(x.unflatten(0, (n, B * H)).unbind() for x in parts), strict=True
    ):
        us.append(torch.baddbmm(u_c, a_c, s))
        ys.append(torch.baddbmm(y_c, r_c, s))
        s = torch.baddbmm(torch.baddbmm(end_c * s, k_c, v_c), b_c, us[-1])
    y = torch.baddbmm(torch.cat(ys), rb, torch.cat(us))
    return join(y, n, B, T), s.mT.contiguous().view(B, H, N, N)
