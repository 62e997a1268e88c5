"""WKV-6 in chunks, plain torch and plain autograd.

Tokens of a chunk meet in a score matrix; chunks meet in the state.

With D(i,t) = prod_{i<s<t} delta_s, elementwise over the key channels, where `start` is before and `end` after
all tokens of the chunk, a chunk with incoming state S gives

    y_t    = (r_t * D(start,t)) S + sum_{i<=t} A[t,i] v_i
    S'     = D(start,end) * S + sum_i (k_i * D(i,end))^T v_i
    A[t,i] = sum_n r_t k_i D(i,t)  for i < t,    A[t,t] = sum_n r_t u k_t

A decay may be an exact 0, so D is never a quotient, nor a difference of logarithms: `scores` multiplies it up
from single tokens. A token that starts a document reads nothing from before and passes nothing on: its D
is 0.
"""

import torch
import torch.nn.functional as F

from .reference import decay6, recurrent6


def split(x, n, C, fill=0.0):
    """Split (B, T, H, N) into (n*B*H, C, N): n chunks of C tokens, chunk index outermost, filled up."""
    _, T, _, N = x.shape
    x = F.pad(x, (0, 0, 0, 0, 0, n * C - T), value=fill) if T < n * C else x
    return x.unflatten(1, (n, C)).permute(1, 0, 3, 2, 4).reshape(-1, C, N)


def split_reset(reset, n, C, H):
    """Split (B, T), bool, into (n*B*H, C, 1)."""
    return split(reset[:, :, None, None].expand(-1, -1, H, 1), n, C, fill=False)


def join(y, n, B, T):
    """Invert `split`: (n*B*H, C, N) -> (B, T, H, N), without the filling of the last chunk."""
    return y.unflatten(0, (n, B, -1)).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :T]


def scores(r, k, delta, u, inside):
    """Compute the parts inside chunks: A (G,C,C), r_t * D(start,t), k_i * D(i,end) and D(start,end).

    r, k and delta are (G,C,N), u (G,1,N), C a power of two. inside (G,C,1) is 0 where a document starts,
    else 1. Of the results the second and the third are (G,C,N), the last (G,1,N).

    These four describe a block of any size, of one token to begin with, and two neighbours make the block of
    both: for i in the first and t in the second, D(i,t) = D(i,end of first) D(start of second,t), which k_i
    and r_t already carry. All factors are in [0,1].
    """
    G, C, N = r.shape
    A = (r * u * k).sum(-1).view(G, C, 1, 1)
    r, k, d = (x.view(G, C, 1, N) for x in (r * inside, k, delta * inside))
    while A.shape[1] > 1:
        (A1, A2), (r1, r2), (k1, k2), (d1, d2) = (x.unflatten(1, (-1, 2)).unbind(2) for x in (A, r, k, d))
        A = torch.cat([F.pad(A1, (0, A1.shape[-1])), torch.cat([r2 @ k1.mT, A2], -1)], -2)
        r, k, d = torch.cat([r1, d1 * r2], 2), torch.cat([k1 * d2, k2], 2), d1 * d2
    return tuple(x.squeeze(1) for x in (A, r, k, d))


def chunked6(r, k, v, w, u, s, reset=None, chunk=32):
    """Compute `recurrent6` in chunks; `chunk` is a power of two.

    32 is as fast as 16, with half the states kept for the backward.
    """
    B, T, H, N = r.shape
    if T == 1:
        return recurrent6(r, k, v, w, u, s, reset)
    C = min(chunk, 1 << (T - 1).bit_length())
    n = -(-T // C)
    delta = decay6(split(w, n, C, fill=-torch.inf))
    r, k, v = (split(x, n, C) for x in (r, k, v))
    inside = delta.new_ones(()) if reset is None else 1 - split_reset(reset, n, C, H).to(delta.dtype)
    A, r, k, d = scores(r, k, delta, u.repeat(n * B, 1)[:, None], inside)
    s, ys = s.reshape(B * H, N, N), []
    # Everything above is batched over chunks. The loop has only what needs the state, so that there is no
    # (n, N, N) tensor.
    for y_c, r_c, k_c, v_c, d_c in zip(
        *(x.unflatten(0, (n, B * H)).unbind() for x in (A @ v, r, k.mT, v, d.mT)), strict=True
    ):
        ys.append(torch.baddbmm(y_c, r_c, s))
        s = torch.baddbmm(d_c * s, k_c, v_c)
    return join(torch.cat(ys), n, B, T), s.view(B, H, N, N)
