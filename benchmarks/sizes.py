"""Measure training steps with MiSS of random models of the released sizes.

The program prints tokens a second, memory, and the share of the machine's speed in matrix products.

    python -m benchmarks.sizes [--device cuda] [--models 0.1B 0.4B ... v6-3B] [--ctx_len 512 4096]
    [--precision auto] [--grad_cp 0] [--rounds 5]

A step is forward, loss, backward and AdamW with batch 1. The share is the speed of the step's matrix
products, divided by the speed of a product of two square matrices in the same run. Memory is the highest
memory of tensors on a GPU, or the process's peak. A model that does not fit has a row that says so. The last
line is JSON.
"""

import torch

import rwkv_miss
from scripts.memory_table import MODELS
from src import ops
from src.common.device import PRECISIONS, peak_memory
from src.model import RWKV, default_arch
from src.model.rwkv import replace_tensors
from src.training.optimizer import parameter_groups

from .common import add_integers, argument_parser, fastest_by_turns, precision_on, report, report_so_far
from .step import flops

SIZES = {name: (7, *sizes) for name, sizes in MODELS.items() if name != "13.3B"} | {"v6-3B": (6, 32, 2560)}
RANK = 64
SQUARE = {"cuda": 8192, "cpu": 2048}


def random_model(
    version: int, n_layer: int, n_embd: int, device: str, dtype: torch.dtype, grad_cp: int
) -> RWKV:
    """Make frozen random weights in `dtype`, with MiSS on them, directly on the device."""
    kernel, _ = ops.choose("auto", device)
    with torch.device("meta"):
        model = RWKV(default_arch(version, n_layer, n_embd), kernel)
    replace_tensors(model, lambda name, p: torch.empty(p.shape, dtype=dtype, device=device).normal_(std=0.02))
    rwkv_miss.inject(model, "miss", rank=RANK)
    model.grad_cp = grad_cp
    return model


def product_rate(device: str, dtype: torch.dtype) -> float:
    """Measure operations a second of a product of two square matrices."""
    n = SQUARE[device]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / fastest_by_turns({"": lambda: a @ b}, 5, device)[""]


def measure(name: str, ctx_len: int, args, rate: float) -> dict:
    version, n_layer, n_embd = SIZES[name]
    model = random_model(version, n_layer, n_embd, args.device, PRECISIONS[args.precision], args.grad_cp)
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-5, 0.0))
    ids = torch.randint(model.arch.vocab_size, (1, ctx_len + 1), device=args.device)
    wanted = torch.arange(ctx_len, device=args.device)

    def step() -> None:
        x, _ = model.features(ids[:, :-1], wanted=wanted)
        (model.loss(x, ids[0, 1:]) / ctx_len).backward()
        optimizer.step()
        optimizer.zero_grad()

    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = fastest_by_turns({"": step}, args.rounds, args.device)[""]
    return {
        "tokens_per_s": round(ctx_len / seconds, 1),
        "seconds": round(seconds, 4),
        "memory_GB": round(peak_memory(ids.device) / 1e9, 2),
        "share_of_products": round(flops(model, RANK, ctx_len) / seconds / rate, 3),
    }


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--device", default="cuda", choices=SQUARE)
    parser.add_argument("--models", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--ctx_len", nargs="+", type=int, default=[512, 4096])
    parser.add_argument("--precision", default="auto", choices=["auto", *PRECISIONS])
    parser.add_argument("--grad_cp", type=int, default=0, choices=(0, 1, 2))
    add_integers(parser, rounds=5)
    args = parser.parse_args()
    args.precision = precision_on(args.device, args.precision)
    settings = {k: getattr(args, k) for k in ("precision", "grad_cp", "rounds")}
    rate, rows = product_rate(args.device, PRECISIONS[args.precision]), []
    for name in args.models:
        for ctx_len in args.ctx_len:
            row = {"model": name, "ctx_len": ctx_len}
            try:
                row |= measure(name, ctx_len, args, rate)
            except torch.OutOfMemoryError:
                row |= {"memory_GB": "more than there is"}
            rows.append(row)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            report_so_far("sizes", rows=rows, **settings)
    report(
        "sizes",
        rows=rows,
        products_tflops=round(rate / 1e12, 2),
        gpu=torch.cuda.get_device_name() if args.device == "cuda" else None,
        **settings,
    )


if __name__ == "__main__":
    main()
