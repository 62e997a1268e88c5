import torch
import torch.nn.functional as F

from .reference import decay6, recurrent6


def split(x, n, C, fill=0.0):
    """(B, T, H, N) -> (n*B*H, C, N): n chunks of C tokens, the chunk index outermost; missing tokens are `fill`."""
    B, T, H, N = x.shape
    x = F.pad(x, (0, 0, 0, 0, 0, n * C - T), value=fill) if T < n * C else x
    return x.view(B, n, C, H, N).permute(1, 0, 3, 2, 4).reshape(n * B * H, C, N)


def join(y, n, B, T):
    G, C, N = y.shape
    H = G // (n * B)
    return y.view(n, B, H, C, N).permute(1, 0, 3, 2, 4).reshape(B, n * C, H, N)[:, :T]


def scores(r, k, d, u):
    G, C, N = r.shape
    A = (r * u * k).sum(-1).view(G, C, 1, 1)
    r, k, d = (x.view(G, C, 1, N) for x in (r, k, d))
    while A.shape[1] > 1:
        (A1, A2), (r1, r2), (k1, k2), (d1, d2) = (x.unflatten(1, (-1, 2)).unbind(2) for x in (A, r, k, d))
        A = torch.cat([torch.cat([A1, torch.zeros_like(A1)], -1), torch.cat([r2 @ k1.mT, A2], -1)], -2)
        r, k, d = torch.cat([r1, r2 * d1], 2), torch.cat([k1 * d2, k2], 2), d1 * d2
    return A.squeeze(1), r.squeeze(1), k.squeeze(1), d.squeeze(1)


def chunked6(r, k, v, w, u, s, chunk=16):
    B, T, H, N = r.shape
    if T == 1:
        return recurrent6(r, k, v, w, u, s)
    C = min(chunk, 1 << (T - 1).bit_length())
    n = -(-T // C)
    d = split(decay6(w), n, C, fill=1.0)
    r, k, v = (split(x, n, C) for x in (r, k, v))
    A, r, k, d = scores(r, k, d, u.repeat(n * B, 1)[:, None])
    kv = (k.mT @ v).view(n, B * H, N, N)
    d = d.view(n, B * H, N, 1)
    s = s.reshape(B * H, N, N)
    S = []
    for kv_c, d_c in zip(kv.unbind(), d.unbind()):
        S.append(s)
        s = torch.addcmul(kv_c, d_c, s)
    y = torch.baddbmm(A @ v, r, torch.cat(S))
    return join(y, n, B, T), s.view(B, H, N, N)
