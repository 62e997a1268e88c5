"""One training step of a random RWKV with MiSS under each WKV kernel, in one run: time, tokens a second, and the share of WKV.

    python -m benchmarks.step [--n_layer 12] [--n_embd 768] [--ctx_len 512] [--version 7] [--threads 2] [--rounds 5]

Forward, loss, backward and AdamW on one row. The kernels take turns; the fastest round counts, in wall time. The share of WKV is the time
inside the ops of the same model's shape, measured beside the step. The last line is JSON.
"""

import argparse
import time

import torch

import rwkv_miss
from src import ops
from src.loss import loss_sum
from src.model import RWKV, default_arch, parameter_groups

from .common import report
from .wkv import make, ours
from .wkv import step as wkv_step


def random_model(version: int, n_layer: int, n_embd: int, vocab_size: int, rank: int) -> RWKV:
    """A frozen model with MiSS on the paper's linears; weights as a new model has them, with maps that are zero there filled."""
    model = RWKV(default_arch(version, n_layer, n_embd, vocab_size))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2 and not p.any():
                p.normal_(std=0.02)
    rwkv_miss.inject(model, "miss", rank=rank)
    return model


def train_step(model: RWKV, optimizer, ids) -> float:
    """Seconds of one step."""
    start = time.perf_counter()
    logits, _ = model(ids[:, :-1])
    (loss_sum(logits.flatten(0, 1), ids[:, 1:].flatten()) / ids[:, 1:].numel()).backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    for name, default in (("version", 7), ("n_layer", 12), ("n_embd", 768), ("vocab_size", 65536), ("ctx_len", 512), ("rank", 64),
                          ("threads", torch.get_num_threads()), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--kernels", nargs="+", default=["cpu", "torch", "reference"], choices=[name for name in ops.KERNELS if "cuda" not in name])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = random_model(args.version, args.n_layer, args.n_embd, args.vocab_size, args.rank)
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-4, 0.0))
    ids = torch.randint(args.vocab_size, (1, args.ctx_len + 1))
    inputs, dy = make(args.version, (1, args.ctx_len, args.n_embd), 64, torch.float32)

    seconds, wkv = ({kernel: float("inf") for kernel in args.kernels} for _ in range(2))
    for _ in range(args.rounds + 1):  # the first is the warm-up, and too slow to count
        for kernel in args.kernels:
            model.set_kernel(kernel)
            seconds[kernel] = min(seconds[kernel], train_step(model, optimizer, ids))
            start = time.perf_counter()
            for _ in range(args.n_layer):
                wkv_step(ours(args.version, kernel), inputs, dy)
            wkv[kernel] = min(wkv[kernel], time.perf_counter() - start)

    rows, last = [], args.kernels[-1]
    for kernel in args.kernels:
        row = {"kernel": kernel, "step_s": round(seconds[kernel], 3), "tokens_per_s": round(args.ctx_len / seconds[kernel], 1),
               "wkv_share": round(wkv[kernel] / seconds[kernel], 3), f"times_{last}": round(seconds[last] / seconds[kernel], 2)}
        rows.append(row)
        print(f"{kernel:<10} {row['step_s']:7.3f} s a step {row['tokens_per_s']:7.1f} tokens/s   WKV {row['wkv_share']:6.1%}   "
              f"{row[f'times_{last}']:5.2f} times {last}")
    report("step", rows=rows, **{k: v for k, v in vars(args).items() if k != "kernels"}, dtype="float32")


if __name__ == "__main__":
    main()
