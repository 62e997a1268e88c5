"""Measure tokenising question-answer data, and what a run keeps of it.

It prints also the share of a training step that waits for data.

    python -m benchmarks.tokenise DATA.jsonl [--repeat 16] [--steps 60]
    python -m benchmarks.tokenise DATA.jsonl --memory 200 1000

The tokenizer is World's. Cold is into an empty cache, cached is the same call again, which maps the arrays.
The data, repeated, is then tokenised in one process, in two, and in one for each core. The share is measured
in a run of train.py on the demo's base (--micro_bsz 16 --ctx_len 128): the time spent in the iterator of
batches over that of the steps.

--memory: for the data once, and repeated to so many MB, a run of its own trains a tiny model, first into an
empty cache, then from it. What it has in its second step is its own memory (RssAnon) and mapped pages
(RssFile); growth is between two sizes, by bytes of the file. It needs 2.7 times the largest size on the disk.
The last line is JSON.
"""

import concurrent.futures
import contextlib
import itertools
import json
import multiprocessing
import os
import pathlib
import tempfile
import time

from src import config, run
from src.data import token_cache
from src.data.batches import Batches
from src.data.encode import Encoder, Tokens
from src.data.formats import BY_NAME, Report, sources
from src.data.tokenizer import load_tokenizer

from .common import add_integers, argument_parser, as_flags, release_freed, report, write_random_base


def timed(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_processes(path: str, encoder: Encoder, processes: int) -> float:
    """Seconds that all of the file takes, without a cache."""
    token_cache.available_cores = lambda: processes
    return timed(lambda: [None for _ in token_cache._encoded(sources(path)[0], encoder, Report(), BY_NAME)])


def loading_share(path: str, folder: str, steps: int) -> dict[str, float]:
    """Seconds in the iterator of batches and in all of the steps, of a run of `steps` steps."""
    waited = []
    batches = Batches.__iter__

    def watched(self):
        iterator = batches(self)
        while True:
            start = time.perf_counter()
            batch = next(iterator, None)
            waited.append(time.perf_counter() - start)
            if batch is None:
                return
            yield batch

    Batches.__iter__ = watched
    flags = as_flags(
        load_model="demo/rwkv7-reverse.pth",
        data_file=path,
        proj_dir=f"{folder}/run",
        peft_config="r=12",
        micro_bsz=16,
        ctx_len=128,
        epoch_steps=steps,
        data_cache="none",
    )
    with contextlib.redirect_stdout(None):
        run.main(*config.parse(flags))
    metrics = pathlib.Path(folder, "run/metrics.jsonl").read_text().splitlines()
    total = sum(json.loads(line)["seconds"] for line in metrics)
    return {"loading": sum(waited), "steps": total, "share": sum(waited) / total}


def watch_batches(watch) -> None:
    """Have the iterator of batches call watch(number of the batch) once a batch has been used."""
    batches = Batches.__iter__

    def watched(self):
        for number, batch in enumerate(batches(self)):
            yield batch
            watch(number)

    Batches.__iter__ = watched


def resident(path: str, cache: str, folder: str) -> dict[str, int]:
    """Bytes that a run on these data has in its second step."""
    found: dict[str, int] = {}

    def look(number: int) -> None:
        release_freed()
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith(("RssAnon", "RssFile")):
                    found[line.split(":")[0]] = int(line.split()[1]) << 10

    watch_batches(look)
    flags = as_flags(
        load_model=f"{folder}/base.pth",
        tokenizer="world",
        data_file=path,
        proj_dir=f"{path}.{cache}",
        micro_bsz=1,
        ctx_len=512,
        epoch_steps=2,
        eval_split="1e-4",
        eval_samples=0,
        data_cache=f"{folder}/cache",
    )
    with contextlib.redirect_stdout(None):
        run.main(*config.parse(flags))
    return found


def kept_memory(data: str, sizes: list[int], folder: str) -> None:
    """The table of --memory, and its JSON line."""
    write_random_base(f"{folder}/base.pth", 7, 1, 64)
    content = pathlib.Path(data).read_bytes()
    found, growth = {}, {}
    for size in [len(content), *(megabytes * 10**6 for megabytes in sizes)]:
        path = f"{folder}/{size}.jsonl"
        with open(path, "wb") as file:
            for _ in range(max(size // len(content), 1)):
                file.write(content)
        written = os.path.getsize(path)
        for cache in ("cold", "cached"):
            with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                found[cache, written] = pool.submit(resident, path, cache, folder).result()
            own, mapped = found[cache, written]["RssAnon"], found[cache, written]["RssFile"]
            print(
                f"{written / 1e6:7.0f} MB {cache:<6} own {own / 1e6:7.1f} MB, mapped {mapped / 1e6:7.1f} MB"
            )
        os.remove(path)
    for cache in ("cold", "cached"):
        own = [(size, memory["RssAnon"]) for (name, size), memory in found.items() if name == cache]
        growth[cache] = [
            round((after - before) / (larger - size), 3)
            for (size, before), (larger, after) in itertools.pairwise(own)
        ]
        print(
            f"growth     {cache:<6} {', '.join(f'{value:.3f}' for value in growth[cache])} bytes for each"
            " byte of the file"
        )
    report(
        "tokenise memory",
        growth=growth,
        sizes=sizes,
        memory=[{"cache": cache, "bytes": size, **memory} for (cache, size), memory in found.items()],
    )


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("data")
    add_integers(parser, repeat=16, steps=60)
    parser.add_argument(
        "--memory", type=int, nargs="+", metavar="MB", help="the memory that runs keep, instead of times"
    )
    parser.add_argument("--folder", help="where --memory has its files [a temporary folder]")
    args = parser.parse_args()
    if args.memory:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            return kept_memory(args.data, args.memory, folder)
    encoder = Encoder(load_tokenizer("world", 65536))
    with tempfile.TemporaryDirectory() as folder:

        def cached() -> Tokens:
            return token_cache.tokenise(sources(args.data)[0], encoder, Report(), cache=f"{folder}/cache")

        work = {name: timed(cached) for name in ("cold", "cached")}
        tokens = len(cached().ids)
        cores = token_cache.available_cores()
        many = pathlib.Path(folder, "many.jsonl")
        many.write_bytes(pathlib.Path(args.data).read_bytes() * args.repeat)
        work |= {f"{n} processes": in_processes(str(many), encoder, n) for n in sorted({1, 2, cores})}
        size = os.path.getsize(args.data)
        for name, seconds in work.items():
            megabytes = size / 1e6 * (args.repeat if "processes" in name else 1)
            print(f"{name:<12} {megabytes:7.1f} MB {seconds:8.3f} s {megabytes / seconds:8.1f} MB/s")
        share = loading_share(args.data, folder, args.steps)
    print(f"data loading takes {share['share']:.2%} of the time of {args.steps} steps of the demo's model")
    report(
        "tokenise",
        seconds={name: round(seconds, 4) for name, seconds in work.items()},
        bytes=size,
        tokens=tokens,
        repeat=args.repeat,
        loading={name: round(value, 4) for name, value in share.items()},
        steps=args.steps,
    )


if __name__ == "__main__":
    main()
