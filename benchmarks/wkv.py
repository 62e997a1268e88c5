"""Measure forward and backward of every WKV kernel beside the token-by-token form under autograd.

All forms run together; errors are against float64.

    python -m benchmarks.wkv [--shapes 1,512,768 1,1024,2048] [--head_size 64] [--dtype float32] [--rounds 10]
    [--device cpu|cuda] [--kernels cpu torch reference] [--peers] [--rwkv_lm FOLDER]

On a CPU: CPU time of one thread, the native kernel's share of the limit that multiply-adds set (their peak is
measured between its rounds), and its gain from a second thread in wall time, from paired runs. On a GPU: time
between events. The fastest round counts. Errors are of the first row of the batch. --peers adds
flash-linear-attention (pip install -e '.[bench]'), --rwkv_lm the kernels of a checkout of RWKV-LM, in bf16;
both run on GPUs only. The last line is JSON.
"""

import argparse
import ctypes
import pathlib
import time
from collections.abc import Callable

import torch

from src import ops
from src.common.device import cpu_features
from src.ops import build, toolchain

from . import rwkv_lm
from .common import add_integers, argument_parser, keep_pages, report

OPS = {6: ops.wkv6, 7: ops.wkv7}
# multiply-adds for each element of the state in forward and backward: cuda/wkv*_cpu.cpp
OPERATIONS = {6: 3 + 7, 7: 5 + 12}


def make(version: int, shape: tuple[int, int, int], head_size: int, dtype: torch.dtype, device: str = "cpu"):
    """Random inputs of `wkv6` or `wkv7` in the range of a trained model, and the gradient of y."""
    B, T, C = shape
    sizes = B, T, C // head_size, head_size
    torch.manual_seed(0)
    r, k, v, w, p, q, dy = (torch.randn(sizes) for _ in range(7))
    kappa = torch.nn.functional.normalize(p, dim=-1)
    inputs = (
        [r, k, v, w - 2, torch.randn(sizes[2:])]
        if version == 6
        else [r, 2 * w - 2, k, v, -kappa, kappa * torch.sigmoid(q)]
    )
    return [x.to(device, dtype).requires_grad_() for x in inputs], dy.to(device, dtype)


def step(run, inputs, dy):
    y = run(*inputs)
    return y, *torch.autograd.grad(y, inputs, dy)


def ours(version: int, kernel: str):
    return lambda *inputs: OPS[version](*inputs, kernel=kernel)[0]


def peers() -> dict[int, dict]:
    """fla's chunked kernels with our arguments: it takes log decays, and for RWKV-7 no raw ones."""
    from fla.ops.rwkv6 import chunk_rwkv6
    from fla.ops.rwkv7 import chunk_rwkv7

    from src.ops.reference import log_decay7

    return {
        6: {"fla": lambda r, k, v, w, u: chunk_rwkv6(r, k, v, -torch.exp(w.float()), u, scale=1.0)[0]},
        7: {"fla": lambda r, w, k, v, a, b: chunk_rwkv7(r, log_decay7(w.float()), k, v, a, b, scale=1.0)[0]},
    }


def milliseconds(run, inputs, dy) -> float:
    """CPU time of this process, or time on the GPU."""
    if not dy.is_cuda:
        start = time.process_time()
        step(run, inputs, dy)
        return 1e3 * (time.process_time() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step(run, inputs, dy)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def fma_probe():
    """A function that measures the peak of multiply-adds of this core, now, in FLOP per millisecond."""
    source = pathlib.Path(__file__).with_name("fma_peak.cpp")
    flags = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fPIC", "-pthread"]
    command = [toolchain.find_cxx(), *flags]
    name, title, version = "fma_peak", "the multiply-add probe", 2
    path = build.build(name, title, version, [source], build.headers(), command, (), cpu_features())
    library = ctypes.CDLL(str(path))
    repeats = 10_000_000
    flops = repeats * 2 * library.fma_width()

    def measure() -> float:
        fastest = 0.0
        for chains in (8, 12, 16, 20):
            start = time.process_time()
            library.fma_run(ctypes.c_int64(repeats), chains)
            fastest = max(fastest, flops / (1e3 * (time.process_time() - start)))
        return fastest

    return measure


def second_thread(run, inputs, dy, rounds: int) -> float:
    """Wall time with one thread over wall time with two, the best of paired runs."""
    best = 0.0
    for _ in range(rounds):
        wall = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            start = time.perf_counter()
            step(run, inputs, dy)
            wall.append(time.perf_counter() - start)
        best = max(best, wall[0] / wall[1])
    torch.set_num_threads(1)
    return best


def kept_mb(run, inputs) -> float:
    """Bytes of distinct storages that autograd keeps between forward and backward, inputs not counted."""
    kept, known = {}, {x.untyped_storage().data_ptr() for x in inputs}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = run(*inputs)  # held, so that no address is used twice
    del out
    return sum(size for pointer, size in kept.items() if pointer not in known) / 1e6


def error(got, want) -> float:
    """The largest of the relative errors (rms) of y and the gradients."""
    return max(((g.detach().cpu().double() - w).norm() / w.norm()).item() for g, w in zip(got, want))


def arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", default=["1,512,768", "1,1024,2048"], help="B,T,C each")
    add_integers(parser, head_size=64)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float64"))
    add_integers(parser, rounds=10)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--kernels", nargs="+", choices=ops.KERNELS, help="all that run on the device, when not given"
    )
    parser.add_argument("--peers", action="store_true", help="measure flash-linear-attention too")
    parser.add_argument("--rwkv_lm", type=pathlib.Path, help="a checkout of RWKV-LM, to measure its kernels")
    return parser.parse_args()


def errors_of(runs: dict[str, Callable], version: int, inputs, dy) -> dict[str, float]:
    """Against float64 on the first row of the batch; the warm-up, too."""
    first = [(x if x.dim() == 2 else x[:1]).detach().requires_grad_() for x in inputs]
    exact = [x.detach().cpu().double().requires_grad_() for x in first]
    want = [x.detach() for x in step(ours(version, "torch"), exact, dy[:1].cpu().double())]
    return {name: error(step(run, first, dy[:1]), want) for name, run in runs.items()}


def fastest(
    runs: dict[str, Callable], inputs, dy, rounds: int, limit: Callable[[], float]
) -> tuple[dict[str, float], float | None]:
    """(milliseconds of each, the native kernel's share of the limit); `limit` measures the fewest
    milliseconds that its multiply-adds can take, before and after it, since a core's clock changes.
    """
    best, shares = dict.fromkeys(runs, float("inf")), []
    for _ in range(rounds):
        for name, run in runs.items():
            before = limit() if name == "cpu" else 0
            ms = milliseconds(run, inputs, dy)
            best[name] = min(best[name], ms)
            if name == "cpu":
                shares.append((before + limit()) / 2 / ms)
    return best, sorted(shares)[len(shares) // 2] if shares else None


def measure(version: int, shape: tuple[int, int, int], kernels: list[str], peak, others, args) -> list[dict]:
    """A row for every kernel; `peak` is a fma_probe()."""
    inputs, dy = make(version, shape, args.head_size, getattr(torch, args.dtype), args.device)
    runs = {kernel: ours(version, kernel) for kernel in kernels} | others[version]
    errors = errors_of(runs, version, inputs, dy)
    operations = dy.numel() * args.head_size * OPERATIONS[version] * 2
    best, share = fastest(runs, inputs, dy, args.rounds, lambda: operations / peak())
    rows = []
    for name, ms in best.items():
        row = {
            "shape": shape,
            "op": f"wkv{version}",
            "kernel": name,
            "ms": round(ms, 2),
            "times_reference": round(best["reference"] / ms, 2) if "reference" in best else None,
            "of_fma_limit": None,
            "second_thread": None,
            "kept_mb": round(kept_mb(runs[name], inputs), 1),
            "error": float(f"{errors[name]:.1e}"),
        }
        if name == "cpu":
            row["of_fma_limit"] = round(share, 3)
            row["second_thread"] = round(second_thread(runs[name], inputs, dy, args.rounds), 2)
        rows.append(row)
    return rows


def show(title: str, row: dict) -> None:
    shown = [row[key] or "" for key in ("times_reference", "of_fma_limit", "second_thread")]
    print(
        f"{title:>12}  {row['op']}  {row['kernel']:<10} {row['ms']:10.2f} {shown[0]:>10} {shown[1]:>8}"
        f" {shown[2]:>9} {row['kept_mb']:8.1f} {row['error']:8.1e}",
        flush=True,
    )


def main() -> None:
    args = arguments()
    on_cpu = args.device == "cpu"
    if on_cpu:
        torch.set_num_threads(1)
    pages_kept = keep_pages()
    native = [name for name, device in ops.NATIVE.items() if device == args.device]
    if args.dtype == "float64":
        native = []
    kernels = args.kernels or [*native, *ops.PLAIN]
    peak = fma_probe() if "cpu" in kernels else None
    beside = peers() if args.peers else {6: {}, 7: {}}

    print(
        f"{'shape':>12}  op    {'kernel':<10} {'fwd+bwd ms':>10} {'times ref.':>10} {'of limit':>8}"
        f" {'2 threads':>9} {'kept MB':>8} {'error':>8}"
    )
    rows = []
    for title in args.shapes:
        shape = tuple(map(int, title.split(",")))
        theirs = rwkv_lm.peers(args.rwkv_lm.absolute(), shape[1]) if args.rwkv_lm else {6: {}, 7: {}}
        others = {version: beside[version] | theirs[version] for version in beside}
        for version in (6, 7):
            found = measure(version, shape, kernels, peak, others, args)
            for row in found:
                show(title, row)
            rows += found
    card = {} if on_cpu else {"card": torch.cuda.get_device_name()}
    report(
        "wkv",
        rows=rows,
        dtype=args.dtype,
        head_size=args.head_size,
        rounds=args.rounds,
        pages_kept=pages_kept,
        **card,
    )


if __name__ == "__main__":
    main()
