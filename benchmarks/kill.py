"""Kill a run without warning at random moments, over and over, and see that nothing is lost.

    python -m benchmarks.kill [--kills 30] [--steps 5000] [--strategy auto]

The same command is started again after every kill, with `--resume auto`. After each kill every checkpoint and
adapter file in the folder must load with real checksums, and the newest checkpoint must not be older than the
one before. At the end the losses of all steps must be those of a run that was left alone, digit for digit.
"""

import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import zipfile

from demo import task
from rwkv_miss import read_checkpoint
from src.training.run_folder import checkpoint_step, list_checkpoints

from .common import add_integers, argument_parser, as_flags, report

SAVE_STEPS = 3
LONGEST = 7.0  # seconds; a run is killed at a random moment between its start and this


def losses(folder: pathlib.Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def newest_step(folder: pathlib.Path) -> int:
    """The step of the newest checkpoint, 0 for none, after every finished file was read whole: an error where
    one does not load.
    """
    checkpoints = list_checkpoints(str(folder / "checkpoints"))
    for path in [*checkpoints, *map(str, folder.glob("*.pth"))]:
        assert zipfile.ZipFile(path).testzip() is None, f"{path} is damaged"
        assert len(read_checkpoint(path)) > 0, f"{path} is empty"
    return checkpoint_step(checkpoints[-1]) if checkpoints else 0


def train_command(args, folder: pathlib.Path) -> list[str]:
    """The command of every run but for its folder, after which --proj_dir waits."""
    flags = as_flags(
        load_model="demo/rwkv7-reverse.pth",
        data_file=folder / "data.jsonl",
        peft_config="r=12",
        micro_bsz=2,
        ctx_len=64,
        epoch_steps=args.steps,
        save_steps=SAVE_STEPS,
        save_total_limit=2,
        strategy=args.strategy,
        resume="auto",
    )
    return [sys.executable, "train.py", *flags, "--proj_dir"]


def killed_after(command: list[str], moment: float, kills: int) -> None:
    """Start a run and kill it after `moment` seconds. A run that ends before that ends the benchmark."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        error = process.communicate(timeout=moment)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return
    end = f"failed:\n{error}" if process.returncode else "was done; raise --steps"
    sys.exit(f"after {kills} kills the run {end}")


def kill_over_and_over(
    command: list[str], folder: pathlib.Path, kills: int, rng: random.Random
) -> tuple[list[float], list[int]]:
    """(seconds to every kill, step of the newest checkpoint after it)"""
    moments, steps = [], [0]
    while len(moments) < kills:
        moment = rng.uniform(0, LONGEST)
        killed_after([*command, str(folder)], moment, len(moments))
        moments.append(moment)
        steps.append(newest_step(folder) if os.path.exists(folder) else 0)
        assert steps[-1] >= steps[-2], f"the newest checkpoint went back from step {steps[-2]} to {steps[-1]}"
        print(
            f"kill {len(moments)} after {moment:.2f} s: the newest checkpoint is of step {steps[-1]}",
            flush=True,
        )
    return moments, steps[1:]


def check_end(killed: pathlib.Path, whole: pathlib.Path) -> None:
    leftovers = [str(path.relative_to(killed.parent)) for path in killed.rglob("*.tmp")]
    assert not leftovers, f"left behind: {leftovers}"
    assert losses(killed) == losses(whole), "the losses differ from those of the run that was left alone"


def main() -> None:
    parser = argument_parser(__doc__)
    add_integers(parser, kills=30, steps=5000)
    parser.add_argument("--strategy", default="auto")
    add_integers(parser, seed=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        killed, whole = folder / "killed", folder / "whole"
        task.write(str(folder / "data.jsonl"), task.rows("sort", 2000, seed=1))
        command = train_command(args, folder)
        subprocess.run([*command, str(whole)], check=True, capture_output=True)
        moments, steps = kill_over_and_over(command, killed, args.kills, random.Random(args.seed))
        subprocess.run([*command, str(killed)], check=True, capture_output=True)
        check_end(killed, whole)
    after_a_checkpoint = len({0, *steps}) - 1
    print(
        f"{len(moments)} kills, {after_a_checkpoint} of them after a new checkpoint;"
        f" all {args.steps} losses are those of a run left alone"
    )
    report(
        "kill",
        kills=len(moments),
        seconds_to_kill=[round(statistics.fmean(moments), 2), round(max(moments), 2)],
        checkpoints_at_kills=steps,
        steps=args.steps,
        save_steps=SAVE_STEPS,
        strategy=args.strategy,
        losses_equal=True,
    )


if __name__ == "__main__":
    main()
