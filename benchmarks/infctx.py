"""Measure peak memory and time of rows in chunks, up to a million tokens.

The gradient is compared with that of the whole row.

    python -m benchmarks.infctx [--tokens 65536 262144 1048576] [--whole 16384 65536] [--chunk_ctx 1024]
    [--version 7] [--n_layer 2] [--n_embd 64]

A random RWKV with MiSS computes loss and gradients of one row, every token trained: in chunks that keep a
state each, and with --state_cp. Every figure comes from a process of its own: its peak is VmHWM minus that of
before the row was run, when model, row and kernel were there; its time is that of the CPU, which other
programs do not prolong. What a chunk costs is the growth of the peak between the two longest rows over that
of the number of chunks. At the lengths of --whole the whole row runs too, and the gradients are compared. The
last line is JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable

import numpy as np
import torch

from src.common.device import peak_memory
from src.data.collate import trained_tokens
from src.model.batch_loss import Chunks, batch_loss, state_bytes

from .common import add_integers, argument_parser, as_flags, report, same_flags, settings_without
from .step import random_model

WHOLE, CHUNKS, SPARSE = "whole", "chunks", "chunks, state_cp"


def measure(args) -> dict:
    """One row in this process: loss, seconds, peak memory; the gradients go to the file --out."""
    torch.manual_seed(0)
    model = random_model(args.version, args.n_layer, args.n_embd, args.vocab_size, args.rank)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:  # MiSS begins at zero
        torch.nn.init.normal_(p, std=0.02)
    tokens = args.tokens[0]
    ids = torch.randint(args.vocab_size, (1, tokens + 1))

    def batch(length: int, chunks: Chunks) -> dict:
        targets, weights = ids[:, 1 : length + 1].numpy(), np.ones((1, length))
        return {"ids": ids[:, :length], "reset": None, **trained_tokens(targets, weights, chunks.size)}

    warm_up = Chunks(16)
    torch.autograd.grad(batch_loss(model, batch(48, warm_up), warm_up), parameters)

    chunks = Chunks() if args.mode == WHOLE else Chunks(args.chunk_ctx, sparse=args.mode == SPARSE)
    rows = batch(tokens, chunks)
    before, start = peak_memory(ids.device), time.process_time()
    loss = batch_loss(model, rows, chunks)
    gradients = torch.autograd.grad(loss / tokens, parameters)
    seconds, peak = time.process_time() - start, peak_memory(ids.device) - before
    torch.save(gradients, args.out)
    return {
        "mode": args.mode,
        "tokens": tokens,
        "cpu_seconds": round(seconds, 2),
        "peak_mb": round(peak / 1e6, 1),
        "loss": float(loss) / tokens,
        "chunks": chunks.count(tokens),
        "states": chunks.states(tokens),
        "state_bytes": state_bytes(model.arch, 1, 4),
    }


def in_a_process(args, mode: str, tokens: int) -> tuple[dict, list[torch.Tensor]]:
    """measure() in a fresh process, whose memory nothing has touched."""
    with tempfile.NamedTemporaryFile(suffix=".pth") as out:
        sizes = same_flags(args, "chunk_ctx", "version", "n_layer", "n_embd", "vocab_size", "rank")
        flags = as_flags(mode=mode, tokens=tokens, out=out.name)
        command = [sys.executable, "-m", "benchmarks.infctx", *flags, *sizes]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        return json.loads(done.stdout), torch.load(out.name, weights_only=True)


def arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[65536, 262144, 1048576])
    parser.add_argument("--whole", type=int, nargs="+", default=[16384, 65536])
    add_integers(parser, chunk_ctx=1024, version=7, n_layer=2, n_embd=64, vocab_size=256, rank=16)
    parser.add_argument("--mode", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    return parser.parse_args()


def show(row: dict) -> None:
    tokens, seconds = row["tokens"], row["cpu_seconds"]
    print(
        f"{tokens:>9,} tokens  {row['mode']:<17} {row['chunks']:>5} chunks  peak {row['peak_mb']:9,.1f} MB  "
        f" {seconds:7.2f} s   {tokens / seconds:9,.0f} tokens/s   loss {row['loss']:.6f}",
        flush=True,
    )


def difference(got: Iterable[torch.Tensor], wanted: Iterable[torch.Tensor]) -> float:
    """The largest relative error (rms) of a gradient."""
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(got, wanted, strict=True))


def main() -> None:
    args = arguments()
    if args.mode:
        print(json.dumps(measure(args)))
        return

    rows, errors, times = [], {}, {}
    for tokens in sorted({*args.tokens, *args.whole}):
        gradients, seconds = {}, {}
        modes = (WHOLE, CHUNKS, SPARSE) if tokens in args.whole else (CHUNKS, SPARSE)
        for mode in modes:
            row, gradients[mode] = in_a_process(args, mode, tokens)
            seconds[mode] = row["cpu_seconds"]
            rows.append(row)
            show(row)
        if tokens in args.whole:
            errors[tokens] = difference(gradients[CHUNKS], gradients[WHOLE])
            times[tokens] = round(seconds[CHUNKS] / seconds[WHOLE], 2)
            print(
                f"{tokens:>9,} tokens  gradients differ by {errors[tokens]:.1e} at most, time"
                f" {times[tokens]:.2f} of the whole row's",
                flush=True,
            )
    *_, short, long = (row for row in rows if row["mode"] == CHUNKS)
    growth = (long["peak_mb"] - short["peak_mb"]) * 1e6 / (long["chunks"] - short["chunks"])
    print(f"a chunk more costs {growth / 1e3:,.1f} kB; a state has {long['state_bytes'] / 1e3:,.1f} kB")
    report(
        "infctx",
        rows=rows,
        gradient_error=errors,
        times_whole=times,
        bytes_per_chunk=round(growth),
        state_bytes=long["state_bytes"],
        dtype="float32",
        **settings_without(args, "tokens", "whole", "mode", "out"),
    )


if __name__ == "__main__":
    main()
