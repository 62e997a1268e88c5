"""Loading a checkpoint of 0.5 GB in its own dtype: memory above the start, in units of the file, and seconds.

    python -m benchmarks.load
"""

import multiprocessing
import pathlib
import tempfile
import time

import torch

from rwkv_miss import Arch, write_checkpoint
from src import rwkv7
from src.model import RWKV

from .common import peak_above_start, report

LAYERS, WIDTH, VOCABULARY = 24, 768, 65536


def random_items():
    """A random RWKV-7 in bf16, one tensor at a time."""
    dim_ffn, ranks = rwkv7.default_sizes(WIDTH)
    arch = Arch(
        version=7, vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=WIDTH // 64, head_size=64, dim_att=WIDTH, dim_ffn=dim_ffn,
        ranks=ranks, layer0_value_residual=True,
    )
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in RWKV(arch).named_parameters()}
    for name, shape in shapes.items():
        yield name, torch.randn(shape).mul_(0.02).bfloat16()


def measure(path: str) -> tuple[int, float]:
    """(peak above start in bytes, seconds) of the first load of a process."""
    models: list[RWKV] = []
    start = time.perf_counter()
    peak = peak_above_start(lambda: models.append(RWKV.load(path)))
    return peak, time.perf_counter() - start


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "base.pth")
        write_checkpoint(path, random_items())
        size = path.stat().st_size
        # a new process, because this one has imported parts of torch and has memory to spare from making the file
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peak, seconds = pool.apply(measure, (str(path),))
    print(f"{size / 1e9:.2f} GB bf16, RWKV-7 {LAYERS} x {WIDTH}: {seconds:.2f} s, peak RssAnon above start {peak / size:.3f} x the file")
    report("load", seconds=round(seconds, 2), peak_over_file=round(peak / size, 4), bytes=size, dtype="bfloat16",
           shapes={"layers": LAYERS, "width": WIDTH, "vocabulary": VOCABULARY})


if __name__ == "__main__":
    main()
