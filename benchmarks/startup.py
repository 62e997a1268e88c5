"""Measure what a start costs: `import rwkv_miss` after torch, and the time to the first training step.

python -m benchmarks.startup [--rounds 7]
"""

import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

from .common import add_integers, argument_parser, as_flags, report

IMPORT = """
import time
import torch
start = time.perf_counter()
import rwkv_miss
print(1000 * (time.perf_counter() - start))
"""


def import_milliseconds() -> float:
    done = subprocess.run([sys.executable, "-c", IMPORT], check=True, capture_output=True, text=True)
    return float(done.stdout)


def first_step_seconds(strategy: str) -> float:
    """From the start of the process to the end of the first step, on the demo's base."""
    with tempfile.TemporaryDirectory() as folder:
        data = pathlib.Path(folder, "data.jsonl")
        data.write_text('{"text": "sort cab"}\n')
        flags = as_flags(
            load_model="demo/rwkv7-reverse.pth",
            data_file=data,
            proj_dir=f"{folder}/run",
            peft_config="r=8",
            strategy=strategy,
        )
        subprocess.run([sys.executable, "train.py", *flags], check=True, capture_output=True)
        return json.loads(pathlib.Path(folder, "run/run.json").read_text())["command_to_first_step_seconds"]


def main() -> None:
    parser = argument_parser(__doc__)
    add_integers(parser, rounds=7)
    rounds = parser.parse_args().rounds
    milliseconds = statistics.median(import_milliseconds() for _ in range(rounds))
    print(f"import rwkv_miss after torch: {milliseconds:.0f} ms, median of {rounds} processes")
    seconds = {
        strategy: statistics.median(first_step_seconds(strategy) for _ in range(3))
        for strategy in ("auto", "deepspeed_stage_1")
    }
    for strategy, value in seconds.items():
        print(f"command to first training step, strategy {strategy}: {value:.1f} s, median of 3")
    report(
        "startup",
        import_ms=round(milliseconds, 1),
        first_step_seconds={name: round(value, 2) for name, value in seconds.items()},
    )


if __name__ == "__main__":
    main()
