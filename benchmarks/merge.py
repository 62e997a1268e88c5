"""Merging a MiSS adapter against copying the file: seconds, and memory above the start.

    python -m benchmarks.merge [--folder DIR] [--rounds 5]

Both sides end with an fsync and read a file that is in the page cache; they run in turns, and the medians are compared. Memory is
the peak of RssAnon (mapped pages of the base are not in it), in units of the file's largest tensor.
"""

import argparse
import os
import pathlib
import shutil
import statistics
import tempfile
import time

import torch

from rwkv_miss import merge_file, write_checkpoint
from rwkv_miss.checkpoint import fingerprint
from rwkv_miss.inject import ADAPTER_FORMAT

from .common import peak_above_start, report

LAYERS, WIDTH, VOCABULARY, RANK = 24, 768, 65536, 64  # 0.5 GB in bf16
LINEARS = {"att.receptance": (1, 1), "att.key": (1, 1), "att.value": (1, 1), "att.output": (1, 1), "ffn.key": (4, 1), "ffn.value": (1, 4)}


def base_tensors() -> dict[str, torch.Tensor]:
    """Random matrices with the shapes of RWKV-7, and a few of its vectors."""
    shapes = {"emb.weight": (VOCABULARY, WIDTH)}
    for layer in range(LAYERS):
        shapes |= {f"blocks.{layer}.{norm}.{part}": (WIDTH,) for norm in ("ln1", "ln2", "att.ln_x") for part in ("weight", "bias")}
        shapes |= {f"blocks.{layer}.att.x_{name}": (1, 1, WIDTH) for name in "rwkvag"}
        shapes |= {f"blocks.{layer}.{name}.weight": (out * WIDTH, into * WIDTH) for name, (out, into) in LINEARS.items()}
    shapes["head.weight"] = (VOCABULARY, WIDTH)
    return {name: torch.randn(shape).mul_(0.02).bfloat16() for name, shape in shapes.items()}


def adapter_file(path: pathlib.Path, base: dict[str, torch.Tensor]) -> None:
    linears = [f"blocks.{layer}.{name}" for layer in range(LAYERS) for name in LINEARS]
    shards = ((f"{name}.miss", torch.randn(RANK, base[f"{name}.weight"].shape[0]).mul_(1e-3)) for name in linears)
    write_checkpoint(path, shards, {
        "format": ADAPTER_FORMAT, "format_version": 1, "method": "miss", "options": {"rank": RANK}, "linears": linears,
        "base": "base.pth", "base_fingerprint": fingerprint(base), "versions": {"torch": torch.__version__},
    })


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def copy(source: pathlib.Path, target: pathlib.Path) -> None:
    shutil.copyfile(source, target)
    with open(target, "r+b") as file:
        os.fsync(file.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--folder", help="where the files are made; a temporary folder by default")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))  # as the command does
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        base, adapter, out, copied = (pathlib.Path(folder, name) for name in ("base.pth", "adapter.pth", "merged.pth", "copy.pth"))
        tensors = base_tensors()
        largest = max(tensor.nbytes for tensor in tensors.values())
        write_checkpoint(base, tensors.items())
        adapter_file(adapter, tensors)
        del tensors
        size = base.stat().st_size

        peak = peak_above_start(lambda: merge_file(base, adapter, out))
        copy(base, copied)  # the first round of each is a warm-up
        rounds = [(seconds(lambda: merge_file(base, adapter, out)), seconds(lambda: copy(base, copied))) for _ in range(args.rounds)]

    print(f"{size / 1e9:.2f} GB bf16, RWKV-7 {LAYERS} x {WIDTH}, {LAYERS * len(LINEARS)} linears, MiSS rank {RANK}")
    print("round   merge s    copy s   merge / copy")
    for number, (merge_s, copy_s) in enumerate(rounds, 1):
        print(f"{number:5}  {merge_s:8.2f}  {copy_s:8.2f}  {merge_s / copy_s:13.2f}")
    merge_s, copy_s = (statistics.median(column) for column in zip(*rounds))
    ratio = statistics.median(merge / copy for merge, copy in rounds)
    print(f"median {merge_s:8.2f}  {copy_s:8.2f}  {ratio:13.2f}")
    print(f"peak memory above start: {peak / largest:.2f} x the largest tensor ({largest / 1e6:.0f} MB)")
    report("merge", merge_s=round(merge_s, 3), copy_s=round(copy_s, 3), merge_over_copy=round(ratio, 3),
           peak_over_largest=round(peak / largest, 3), bytes=size, dtype="bfloat16",
           shapes={"layers": LAYERS, "width": WIDTH, "vocabulary": VOCABULARY, "rank": RANK})


if __name__ == "__main__":
    main()
