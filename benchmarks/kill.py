"""Kill a run without warning at random moments, over and over, and see that nothing is lost.

    python -m benchmarks.kill [--kills 30] [--steps 5000] [--strategy auto]

The same command is started again after every kill, with `--resume auto`. After each kill every checkpoint and
adapter file in the folder must load with real checksums, and the newest checkpoint must not be older than the
one before. At the end the losses of all steps must be those of a run that was left alone, digit for digit.
"""

import argparse
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

from .common import report

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        task.write(str(folder / "data.jsonl"), task.rows("sort", 2000, seed=1))
        command = [
            sys.executable,
            "train.py",
            "--load_model",
            "demo/rwkv7-reverse.pth",
            "--data_file",
            str(folder / "data.jsonl"),
            "--peft_config",
            "r=12",
            "--micro_bsz",
            "2",
            "--ctx_len",
            "64",
            "--epoch_steps",
            str(args.steps),
            "--save_steps",
            str(SAVE_STEPS),
            "--save_total_limit",
            "2",
            "--strategy",
            args.strategy,
            "--resume",
            "auto",
            "--proj_dir",
        ]
        subprocess.run([*command, str(folder / "whole")], check=True, capture_output=True)
        moments, steps = [], [0]
        while len(moments) < args.kills:
            moment = rng.uniform(0, LONGEST)
            process = subprocess.Popen(
                [*command, str(folder / "killed")],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            try:
                error = process.communicate(timeout=moment)[1]
                sys.exit(
                    f"after {len(moments)} kills the run "
                    + (f"failed:\n{error}" if process.returncode else "was done; raise --steps")
                )
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
            moments.append(moment)
            steps.append(newest_step(folder / "killed") if os.path.exists(folder / "killed") else 0)
            assert steps[-1] >= steps[-2], (
                f"the newest checkpoint went back from step {steps[-2]} to {steps[-1]}"
            )
            print(
                f"kill {len(moments)} after {moment:.2f} s: the newest checkpoint is of step {steps[-1]}",
                flush=True,
            )
        subprocess.run([*command, str(folder / "killed")], check=True, capture_output=True)
        leftovers = [str(path.relative_to(folder)) for path in (folder / "killed").rglob("*.tmp")]
        assert not leftovers, f"left behind: {leftovers}"
        assert losses(folder / "killed") == losses(folder / "whole"), (
            "the losses differ from those of the run that was left alone"
        )
    print(
        f"{len(moments)} kills, {len(set(steps)) - 1} of them after a new checkpoint; all {args.steps} losses"
        " are those of a run left alone"
    )
    report(
        "kill",
        kills=len(moments),
        seconds_to_kill=[round(statistics.fmean(moments), 2), round(max(moments), 2)],
        checkpoints_at_kills=steps[1:],
        steps=args.steps,
        save_steps=SAVE_STEPS,
        strategy=args.strategy,
        losses_equal=True,
    )


if __name__ == "__main__":
    main()
