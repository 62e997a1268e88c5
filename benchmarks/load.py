"""Loading a checkpoint of 0.5 GB in its own dtype: memory above the start, in units of the file, and seconds.

python -m benchmarks.load
"""

import multiprocessing
import pathlib
import tempfile
import time

from src.model import RWKV

from .common import peak_above_start, report, write_random_base

LAYERS, WIDTH = 24, 768


def measure(path: str) -> tuple[int, float]:
    """(peak above start in bytes, seconds) of the first load of a process."""
    models: list[RWKV] = []
    start = time.perf_counter()
    peak = peak_above_start(lambda: models.append(RWKV.load(path)))
    return peak, time.perf_counter() - start


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "base.pth")
        write_random_base(path, 7, LAYERS, WIDTH)
        size = path.stat().st_size
        # a new process, because this one has more of torch, and freed memory from making the file
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peak, seconds = pool.apply(measure, (str(path),))
    print(
        f"{size / 1e9:.2f} GB bf16, RWKV-7 {LAYERS} x {WIDTH}: {seconds:.2f} s, peak RssAnon above start"
        f" {peak / size:.3f} x the file"
    )
    report(
        "load",
        seconds=round(seconds, 2),
        peak_over_file=round(peak / size, 4),
        bytes=size,
        dtype="bfloat16",
        shapes={"layers": LAYERS, "width": WIDTH, "vocabulary": 65536},
    )


if __name__ == "__main__":
    main()
