"""Forward and backward of every WKV kernel: CPU time of one thread, memory kept for the backward, error against float64.

    python -m benchmarks.wkv [--shapes 1,512,768 4,512,768] [--head_size 64] [--dtype float32] [--rounds 10]

The fastest round counts; a ratio is against the reference of the same run. The last line is JSON.
"""

import argparse
import ctypes
import time

import torch

from src import ops

from .common import report

OPS = {6: ops.wkv6, 7: ops.wkv7}


def make(version: int, shape: tuple[int, int, int], head_size: int, dtype: torch.dtype):
    """Random inputs of `wkv6` or `wkv7` in the range of a trained model, and the gradient of y."""
    B, T, C = shape
    sizes = B, T, C // head_size, head_size
    torch.manual_seed(0)
    r, k, v, w, p, q, dy = (torch.randn(sizes) for _ in range(7))
    kappa = torch.nn.functional.normalize(p, dim=-1)
    inputs = [r, k, v, w - 2, torch.randn(sizes[2:])] if version == 6 else [r, 2 * w - 2, k, v, -kappa, kappa * torch.sigmoid(q)]
    return [x.to(dtype).requires_grad_() for x in inputs], dy.to(dtype)


def step(version: int, kernel: str, inputs, dy):
    y, _ = OPS[version](*inputs, kernel=kernel)
    return y, *torch.autograd.grad(y, inputs, dy)


def keep_pages() -> bool:
    """Have glibc keep freed memory. Left alone it returns large blocks to the system, and getting their pages again takes up to
    40 % of the time of a kernel, more or less of it as other allocations in the process happen to be."""
    mmap_threshold, trim_threshold = -3, -1
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda name, value: 0)
    return bool(mallopt(mmap_threshold, 1 << 25) and mallopt(trim_threshold, 2**31 - 1))


def cpu_ms(version: int, kernel: str, inputs, dy) -> float:
    start = time.process_time()
    step(version, kernel, inputs, dy)
    return 1e3 * (time.process_time() - start)


def kept_mb(version: int, kernel: str, inputs) -> float:
    """Bytes of distinct storages that autograd keeps between forward and backward, inputs not counted."""
    kept, known = {}, {x.untyped_storage().data_ptr() for x in inputs}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = OPS[version](*inputs, kernel=kernel)  # held, so that no address is used twice
    del out
    return sum(size for pointer, size in kept.items() if pointer not in known) / 1e6


def error(got, want) -> float:
    """The largest of the relative errors (rms) of y and the gradients."""
    return max(((g.double() - w).norm() / w.norm()).item() for g, w in zip(got, want))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--shapes", nargs="+", default=["1,512,768", "4,512,768", "1,1024,2048"], help="B,T,C each")
    parser.add_argument("--head_size", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float64"))
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pages_kept = keep_pages()

    print(f"{'shape':>12}  op    {'kernel':<10} {'fwd+bwd ms':>10} {'ratio':>6} {'kept MB':>8} {'error':>8}")
    rows = []
    for title in args.shapes:
        shape = tuple(map(int, title.split(",")))
        for version in (6, 7):
            inputs, dy = make(version, shape, args.head_size, getattr(torch, args.dtype))
            want = step(version, "reference", [x.detach().double().requires_grad_() for x in inputs], dy.double())
            errors = {kernel: error(step(version, kernel, inputs, dy), want) for kernel in ops.KERNELS}  # also the warm-up
            best = {kernel: min(cpu_ms(version, kernel, inputs, dy) for _ in range(args.rounds)) for kernel in ops.KERNELS}
            for kernel, ms in best.items():
                row = {
                    "shape": shape, "op": f"wkv{version}", "kernel": kernel, "ms": round(ms, 2), "ratio": round(ms / best["reference"], 3),
                    "kept_mb": round(kept_mb(version, kernel, inputs), 1), "error": float(f"{errors[kernel]:.1e}"),
                }
                rows.append(row)
                print(f"{title:>12}  {row['op']}  {kernel:<10} {ms:10.1f} {row['ratio']:6.2f} {row['kept_mb']:8.1f} {row['error']:8.1e}")
    report("wkv", rows=rows, dtype=args.dtype, head_size=args.head_size, rounds=args.rounds, pages_kept=pages_kept)


if __name__ == "__main__":
    main()
