import torch

from .reference import log_decay7, recurrent7
from .wkv6 import join, split

def chunked7(r, w, k, v, a, b, s, chunk=16):
    B, T, H, N = r.shape
    if T == 1:
        return recurrent7(r, w, k, v, a, b, s)
    n = -(-T // chunk)
    C = -(-T // n)
    L = split(log_decay7(w), n, C)
    r, k, v, a, b = (split(x, n, C) for x in (r, k, v, a, b))
    P = L.cumsum(1)
    inc, inv = P.exp(), (-P).exp()
    Q = torch.cat([a * (P - L).exp(), r * inc], 1)
    K = torch.cat([b * inv, k * inv], 1)
    low = torch.ones(C, C, dtype=r.dtype, device=r.device).tril(-1)
    mask = torch.cat([low, low+torch.eye(C, dtype=r.dtype, device=r.device)]).repeat(1, 2)
    Sb, Sk = ((Q @ K.mT) * mask).chunk(2, 2)
    ab, rb = Sb.chunk(2, 1)
    Za, Zr = torch.cat([Sk @ v, Q], 2).chunk(2, 1)
    X = torch.linalg.solve_triangular(-ab, Za, upper=False, unitriangular=True)
    Y, R = torch.baddbmm(Zr, rb, X).chunk(2, 2)
    fw = inc[:, -1:]
    Kb, Kk = (K * fw).chunk(2, 1)
    P, D = torch.baddbmm(torch.cat([Kk.mT @ v, torch.diag_embed(fw[:, 0])], 2), Kb.mT, X).chunk(2, 2)
    m = s.reshape(B * H, N, N).mT
    M = []
    for P_c, D_c in zip(P.view(n, B*H, N, N).unbind(), D.view(n, B*H, N, N).unbind()):
        M.append(m)
        m = torch.baddbmm(P_c, D_c, m)
    y = torch.baddbmm(Y, R, torch.cat(M))
    return join(y, n, B, T), m.mT.reshape(B, H, N, N)
