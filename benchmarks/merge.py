"""Merging, checking and comparing files against copying one: seconds, and memory above the start.

    python -m benchmarks.merge [--folder DIR] [--rounds 5] [--n_layer 24] [--n_embd 768]

merge (one MiSS adapter, and two with weights) and the copy end with an fsync and read a file that is in the
page cache; they run in turns, and the fastest of the rounds are compared, by wall time and by the process's
CPU time, which other programs on the machine change less. unmerge and diff read two such files, once after a
warm-up. Memory is the peak of RssAnon (mapped pages of files are not in it), in units of the file's largest
tensor. --n_embd 2048 is a file of 3 GB, of which three copies are on the disk at once, and a fourth while it
is written.
"""

import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable

import torch

from rwkv_miss import merge_file, read_checkpoint, write_checkpoint
from rwkv_miss.files.identity import fingerprint
from rwkv_miss.inject import ADAPTER_FORMAT
from rwkv_miss.merging.diff import diff_files
from rwkv_miss.merging.unmerge import check_merge

from .common import add_integers, argument_parser, peak_above_start, release_freed, report

VOCABULARY, RANK = 65536, 64
LINEARS = {
    "att.receptance": (1, 1),
    "att.key": (1, 1),
    "att.value": (1, 1),
    "att.output": (1, 1),
    "ffn.key": (4, 1),
    "ffn.value": (1, 4),
}


def base_file(path: pathlib.Path, layers: int, width: int) -> int:
    """Write random matrices with the shapes of RWKV-7, and a few of its vectors, in bf16; returns the bytes
    of the largest tensor.
    """
    shapes = {"emb.weight": (VOCABULARY, width)}
    for layer in range(layers):
        for norm in ("ln1", "ln2", "att.ln_x"):
            shapes |= {f"blocks.{layer}.{norm}.{part}": (width,) for part in ("weight", "bias")}
        shapes |= {f"blocks.{layer}.att.x_{name}": (1, 1, width) for name in "rwkvag"}
        shapes |= {
            f"blocks.{layer}.{name}.weight": (out * width, into * width)
            for name, (out, into) in LINEARS.items()
        }
    shapes["head.weight"] = (VOCABULARY, width)
    write_checkpoint(
        path,
        (
            (name, torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02))
            for name, shape in shapes.items()
        ),
    )
    return 2 * VOCABULARY * width


def adapter_file(path: pathlib.Path, base: pathlib.Path, layers: int) -> None:
    tensors = read_checkpoint(base)
    linears = [f"blocks.{layer}.{name}" for layer in range(layers) for name in LINEARS]
    shards = (
        (f"{name}.miss", torch.randn(RANK, tensors[f"{name}.weight"].shape[0]).mul_(1e-3)) for name in linears
    )
    write_checkpoint(
        path,
        shards,
        {
            "format": ADAPTER_FORMAT,
            "format_version": 1,
            "method": "miss",
            "options": {"rank": RANK},
            "linears": linears,
            "base": "base.pth",
            "base_fingerprint": fingerprint(tensors),
            "versions": {"torch": torch.__version__},
        },
    )


def times(work) -> tuple[float, float]:
    """(wall, CPU) seconds."""
    start, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - cpu


def copy(source: pathlib.Path, target: pathlib.Path) -> None:
    shutil.copyfile(source, target)
    with open(target, "r+b") as file:
        os.fsync(file.fileno())


def works_in(folder: str, args) -> tuple[dict[str, Callable], int, int]:
    """(what is measured, bytes of the base, bytes of its largest tensor); the files are made here"""
    names = ("base", "a", "b", "merged", "copy", "diff")
    base, first, second, out, copied, found = (pathlib.Path(folder, f"{name}.pth") for name in names)
    largest = base_file(base, args.n_layer, args.n_embd)
    for adapter in (first, second):
        adapter_file(adapter, base, args.n_layer)
    works = {
        "copy": lambda: copy(base, copied),
        "merge": lambda: merge_file(base, first, out),
        "merge of two": lambda: merge_file(base, [first, second], out, weights=[0.7, 0.3]),
        "unmerge": lambda: check_merge(base, out),
        "unmerge --adapter": lambda: check_merge(base, out, [first, second]),
        "diff": lambda: diff_files(base, out, found, RANK),
    }
    return works, base.stat().st_size, largest


def peaks_of(works: dict[str, Callable]) -> dict[str, int]:
    """Bytes above the start of each, which is its warm-up, too."""
    peaks = {}
    for name, work in works.items():
        release_freed()
        peaks[name] = peak_above_start(work)
    return peaks


def fastest(works: dict[str, Callable], rounds: int) -> dict[str, tuple[float, float]]:
    """The fewest (wall, CPU) seconds of each; those that write a file as large as the base take turns."""
    writing = [name for name in works if name.startswith(("copy", "merge"))]
    taken = {name: [] for name in works}
    for _ in range(rounds):
        for name in writing:
            taken[name].append(times(works[name]))
    for name in works:
        if name not in writing:
            taken[name].append(times(works[name]))
    return {name: tuple(map(min, zip(*found))) for name, found in taken.items()}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--folder", help="where the files are made; a temporary folder by default")
    add_integers(parser, rounds=5, n_layer=24)
    parser.add_argument("--n_embd", type=int, default=768, help="default %(default)s, a file of 0.5 GB")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))  # as the command does
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        works, size, largest = works_in(folder, args)
        peaks = peaks_of(works)
        seconds = fastest(works, args.rounds)

    print(
        f"{size / 1e9:.2f} GB bf16, RWKV-7 {args.n_layer} x {args.n_embd}, {args.n_layer * len(LINEARS)}"
        f" linears, MiSS rank {RANK}, largest tensor {largest / 1e6:.0f} MB"
    )
    print(f"{'':<18}  wall s  copy's speed   CPU s  peak / largest")
    figures = {}
    for name, (wall, cpu) in seconds.items():
        speed, peak = seconds["copy"][0] / wall, peaks[name] / largest
        measured = {"wall_s": wall, "of_copys_speed": speed, "cpu_s": cpu, "peak_over_largest": peak}
        figures[name] = {figure: round(value, 3) for figure, value in measured.items()}
        print(f"{name:<18}  {wall:6.2f}  {speed:12.2f}  {cpu:6.2f}  {peak:14.2f}")
    report(
        "merge",
        works=figures,
        bytes=size,
        rounds=args.rounds,
        dtype="bfloat16",
        shapes={"layers": args.n_layer, "width": args.n_embd, "vocabulary": VOCABULARY, "rank": RANK},
    )


if __name__ == "__main__":
    main()
