"""Measure whether K adapters in one pass over the frozen base pay, for scripts.lr_sweep.

They stand against K passes one after the other.

    python -m benchmarks.sweep [--adapters 4] [--shapes 6:12:128:256:8x128 7:12:768:65536:1x512 ...]
    [--rounds 5] [--threads 1]

A shape is RWKV version:layers:width:vocabulary:rows x tokens. The batched pass has K times the rows; a linear
multiplies all of them by W, and each adapter's rows' shard sums by its own D: y_k = x_k W^T + S(x_k) D_k.
From the first adapted linear on the x_k differ, so that no frozen product is shared, and nothing but overhead
can be saved: what is common, the first layer's inputs and their products, is at most a 6 L-th of a step of L
layers. Memory for activations is K times as large. Shown are CPU seconds of forward and backward, the fastest
of the rounds, taken by turns. The last line is JSON.
"""

import time

import numpy as np
import torch
from torch import nn

import rwkv_miss
from rwkv_miss.adapter import adapted_linears
from rwkv_miss.functional import add_expanded_, shard_sum
from rwkv_miss.gemm import product
from src import ops
from src.data.collate import trained_tokens
from src.model import RWKV, default_arch
from src.model.batch_loss import Chunks, batch_loss

from .common import add_integers, argument_parser, keep_pages, report

RANK = 16


class _Batched(torch.autograd.Function):
    """x (K n, in), weight (out, in), D (K, r, out) -> y (K n, out); kept for the backward: the shard sums."""

    @staticmethod
    def forward(ctx, x, weight, D):
        s = shard_sum(x, D.shape[1]).unflatten(0, (len(D), -1))
        ctx.save_for_backward(s, weight, D)
        y = product(x, weight)
        y.unflatten(0, (len(D), -1)).baddbmm_(s, D)
        return y

    @staticmethod
    def backward(ctx, dy):
        s, weight, D = ctx.saved_tensors
        parts = dy.unflatten(0, (len(D), -1))
        dx = product(dy, weight.t())
        add_expanded_(dx, torch.bmm(parts, D.transpose(1, 2)).flatten(0, 1), False)
        return dx, None, torch.bmm(s.transpose(1, 2), parts)


def batch_adapters(model: RWKV, adapters: int) -> None:
    """Give every adapted linear so many adapters, each for its own share of the rows."""
    for layer in adapted_linears(model).values():
        layer.miss = nn.Parameter(layer.miss.detach().repeat(adapters, 1, 1))
        layer.forward = lambda x, layer=layer: _Batched.apply(
            x.flatten(0, -2), layer.weight, layer.miss
        ).view(*x.shape[:-1], -1)


def build(version: int, layers: int, width: int, vocabulary: int) -> RWKV:
    """A random model with MiSS on the paper's linears."""
    torch.manual_seed(0)
    arch = default_arch(version, layers, width, vocabulary, 64 if width >= 256 else 16)
    model = RWKV(arch, ops.choose("auto", "cpu", arch.head_size)[0])
    rwkv_miss.inject(model, rank=RANK)
    with torch.no_grad():
        for layer in adapted_linears(model).values():
            # the initialisation has zeros, behind which nothing is computed differently
            layer.weight.normal_(std=width**-0.5)
            layer.miss.normal_(std=1e-3)
    return model


def batch(vocabulary: int, rows: int, tokens: int) -> dict:
    ids = torch.randint(vocabulary, (rows, tokens + 1))
    trained = trained_tokens(ids[:, 1:].numpy(), np.ones((rows, tokens)))
    return {"ids": ids[:, :-1], "reset": None, **trained}


def step(model: RWKV, rows: dict, times: int = 1) -> float:
    total = 0.0
    for _ in range(times):
        loss = batch_loss(model, rows, Chunks())
        loss.backward()
        model.zero_grad()
        total += float(loss.detach())
    return total


def cpu_seconds(run) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def compare(shape: str, adapters: int, rounds: int) -> dict:
    """CPU seconds of both ways."""
    *sizes, form = shape.split(":")
    rows, tokens = map(int, form.split("x"))
    one, all_of_them = (build(*map(int, sizes)) for _ in range(2))
    batch_adapters(all_of_them, adapters)
    once = batch(int(sizes[-1]), rows, tokens)
    together = {name: None if t is None else t.repeat(adapters, 1) for name, t in once.items()}
    ways = {"in turn": lambda: step(one, once, adapters), "together": lambda: step(all_of_them, together)}
    losses = [run() for run in ways.values()]
    # the adapters are equal, so that both ways compute the same
    assert abs(losses[0] / losses[1] - 1) < 1e-4, losses
    seconds = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, run in ways.items():
            seconds[name] = min(seconds[name], cpu_seconds(run))
    ratio = seconds["together"] / seconds["in turn"]
    print(
        f"{shape:<24} {adapters} adapters: in turn {seconds['in turn']:.4f} s, together"
        f" {seconds['together']:.4f} s, {ratio:.3f} times",
        flush=True,
    )
    return {"shape": shape, "seconds": seconds, "ratio": round(ratio, 3)}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=["6:12:128:256:8x128", "6:12:128:256:1x128", "7:4:32:12:16x24", "7:12:768:65536:1x512"],
    )
    add_integers(parser, adapters=4, rounds=5, threads=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_pages()
    results = [compare(shape, args.adapters, args.rounds) for shape in args.shapes]
    report("sweep", rank=RANK, results=results, adapters=args.adapters, rounds=args.rounds)


if __name__ == "__main__":
    main()
