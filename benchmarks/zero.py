"""Measure the memory of one process under two strategies, ZeRO stages 2 and 3 unless told.

It runs on the CPU, with a random RWKV-7 base of 0.45 B parameters.

python -m benchmarks.zero [--strategies deepspeed_stage_2 deepspeed_stage_3] [--precision fp32]
[--layers 24] [--width 1024] [--steps 3]

What counts is the highest resident memory, above that of the process when all is imported and the base not
yet read. It is shown in three columns: the process's own (RssAnon), mapped pages of files (RssFile), and the
most of both at once. The processes of a machine share mapped pages, and the system can take them back.
Seconds are those of the last step.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import sys
import tempfile
import threading
from pathlib import Path

import torch

from .common import add_integers, as_flags, report, write_random_base

PROCESSES = 2
MIB = 2**20


def resident() -> dict[str, int]:
    """Bytes of this process's memory: its own, and mapped from files."""
    with open("/proc/self/status") as status:
        sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in status if line.startswith("Rss")}
    return {"own": sizes["RssAnon"] + sizes["RssShmem"], "mapped": sizes["RssFile"]}


def rank_main(rank: int, port: int, flags: list[str], results) -> None:
    """One process of a run: what `python train.py` does, watched every 2 ms."""
    import src.distributed.deepspeed_strategy  # noqa: F401  (what is imported counts as start)
    import train

    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(PROCESSES),
        "DS_ACCELERATOR": "cpu",
    }
    start, peak, done = resident(), {"own": 0, "mapped": 0, "together": 0}, threading.Event()

    def watch():
        while not done.wait(0.002):
            now = {name: size - start[name] for name, size in resident().items()}
            now["together"] = sum(now.values())
            for name, size in now.items():
                peak[name] = max(peak[name], size)

    threading.Thread(target=watch, daemon=True).start()
    sys.argv = ["train.py", *flags]
    train.main()
    done.set()
    results.put((rank, peak))


def run(flags: list[str]) -> dict[str, int]:
    """Peaks of the process with the highest of each kind."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [
        context.Process(target=rank_main, args=(rank, port, flags, results)) for rank in range(PROCESSES)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
        assert process.exitcode == 0, f"a rank ended with {process.exitcode}"
    peaks = dict(results.get() for _ in ranks)
    return {name: max(peak[name] for peak in peaks.values()) for name in peaks[0]}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--strategies",
        nargs="+",
        default=["deepspeed_stage_2", "deepspeed_stage_3"],
        help="the last one's memory over the first one's is the ratio",
    )
    parser.add_argument("--precision", default="fp32")
    add_integers(parser, layers=24, width=1024, steps=3)
    parser.add_argument("--tokens", type=int, default=64, help="in the row that each process has in a step")
    return parser.parse_args()


def measure(base: str, data: str, proj_dir: str, strategy: str, args) -> tuple[dict[str, int], float]:
    """(peaks, seconds of the last step) of a run."""
    peaks = run(
        as_flags(
            load_model=base,
            data_file=data,
            proj_dir=proj_dir,
            accelerator="cpu",
            devices=PROCESSES,
            strategy=strategy,
            precision=args.precision,
            packing=0,
            ctx_len=args.tokens,
            micro_bsz=1,
            peft_config="r=16",
        )
    )
    last = Path(proj_dir, "metrics.jsonl").read_text().splitlines()[-1]
    return peaks, json.loads(last)["seconds"]


def table(peaks: dict[str, dict[str, int]], seconds: dict[str, float]) -> str:
    """A row for every strategy, in Markdown."""
    lines = ["| strategy | own memory | mapped pages | both at once | s a step |", "|---|---|---|---|---|"]
    for strategy, peak in peaks.items():
        sizes = " | ".join(f"{size / MIB:.0f}" for size in peak.values())
        lines.append(f"| {strategy} | {sizes} | {seconds[strategy]:.2f} |")
    return "\n".join(lines)


def main() -> None:
    args = arguments()
    peaks, seconds = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        base, data = f"{folder}/base.pth", f"{folder}/rows.jsonl"
        parameters = write_random_base(base, 7, args.layers, args.width)
        row = json.dumps({"text": "x" * args.tokens}) + "\n"
        Path(data).write_text(row * PROCESSES * args.steps)
        print(
            f"{parameters / 1e6:.0f} M parameters, base in {args.precision}, {PROCESSES} processes,"
            f" {args.steps} steps; MiB above the start, of the process that has more"
        )
        for strategy in args.strategies:
            peaks[strategy], seconds[strategy] = measure(base, data, f"{folder}/{strategy}", strategy, args)
    first, last = (peaks[args.strategies[i]] for i in (0, -1))
    ratio = {name: round(last[name] / max(first[name], 1), 3) for name in first}
    print(table(peaks, seconds))
    print(
        f"{args.strategies[-1]} over {args.strategies[0]}: {ratio['own']} of the process's own memory,"
        f" {ratio['together']} with mapped pages"
    )
    report(
        "zero",
        parameters=parameters,
        precision=args.precision,
        processes=PROCESSES,
        steps=args.steps,
        tokens=args.tokens,
        peak_bytes=peaks,
        ratio=ratio,
        seconds_per_step=seconds,
    )


if __name__ == "__main__":
    main()
