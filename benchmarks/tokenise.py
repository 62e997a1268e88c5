"""Tokenising question-answer data, and the share of a training step that waits for data.

    python -m benchmarks.tokenise DATA.jsonl [--repeat 16] [--steps 60]

The tokenizer is World's. Cold is into an empty cache, cached is the same call again, which maps the arrays. The data, repeated, is then
tokenised in one process and in two. The share is measured in a run of train.py on the
demo's base (--micro_bsz 16 --ctx_len 128): the time spent in the iterator of batches over that of the steps. The last line is JSON.
"""

import argparse
import contextlib
import itertools
import json
import os
import pathlib
import tempfile
import time

from src import config, run, tokenise
from src.data import Batches
from src.formats import Report, read_rows, sources
from src.tokenizer import load_tokenizer

from .common import report


def timed(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_processes(path: str, encoder: tokenise.Encoder, processes: int) -> float:
    """Seconds that all of the file takes, without a cache."""
    rows = iter(read_rows(path))
    chunks = iter(lambda: list(itertools.islice(rows, tokenise.CHUNK)), [])
    parts = map(encoder.encode_all, chunks) if processes == 1 else tokenise.in_parallel(chunks, encoder, processes)
    return timed(lambda: [None for _ in parts])


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
    flags = ["--load_model", "demo/rwkv7-reverse.pth", "--data_file", path, "--proj_dir", f"{folder}/run", "--peft_config", "r=12", "--micro_bsz",
             "16", "--ctx_len", "128", "--epoch_steps", str(steps), "--data_cache", "none"]
    with contextlib.redirect_stdout(None):
        run.main(*config.parse(flags))
    metrics = pathlib.Path(folder, "run/metrics.jsonl").read_text().splitlines()
    total = sum(json.loads(line)["seconds"] for line in metrics)
    return {"loading": sum(waited), "steps": total, "share": sum(waited) / total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("data")
    parser.add_argument("--repeat", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    encoder = tokenise.Encoder(load_tokenizer("world", 65536))
    with tempfile.TemporaryDirectory() as folder:
        def cached() -> tokenise.Tokens:
            return tokenise.tokenise(sources(args.data)[0], encoder, Report(), cache=f"{folder}/cache")

        work = {name: timed(cached) for name in ("cold", "cached")}
        tokens = len(cached().ids)
        many = pathlib.Path(folder, "many.jsonl")
        many.write_bytes(pathlib.Path(args.data).read_bytes() * args.repeat)
        work |= {f"{n} processes": in_processes(str(many), encoder, n) for n in (1, 2)}
        size = os.path.getsize(args.data)
        for name, seconds in work.items():
            megabytes = size / 1e6 * (args.repeat if "processes" in name else 1)
            print(f"{name:<12} {megabytes:7.1f} MB {seconds:8.3f} s {megabytes / seconds:8.1f} MB/s")
        share = loading_share(args.data, folder, args.steps)
    print(f"data loading takes {share['share']:.2%} of the time of {args.steps} steps of the demo's model")
    report("tokenise", seconds={name: round(seconds, 4) for name, seconds in work.items()}, bytes=size, tokens=tokens, repeat=args.repeat,
           loading={name: round(value, 4) for name, value in share.items()}, steps=args.steps)


if __name__ == "__main__":
    main()
