"""The checkpoints of a run as files: their names, which is newest, which are removed."""

from __future__ import annotations

import glob
import os


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}.pth"


def checkpoint_step(path: str) -> int:
    return int(os.path.basename(path)[len("step-") : -len(".pth")])


def list_checkpoints(folder: str) -> list[str]:
    """Paths of the checkpoints in a folder, oldest first. Each is whole: a file gets its name when it is complete."""
    return sorted(glob.glob(os.path.join(glob.escape(folder), "step-*.pth")))


def remove_old(folder: str, keep: int) -> None:
    """Remove all checkpoints but the newest `keep`."""
    for path in list_checkpoints(folder)[:-keep]:
        os.remove(path)


def remove_leftovers(*folders: str) -> None:
    """Remove what a killed process was writing, under the temporary names of rwkv_miss.write_checkpoint."""
    for folder in folders:
        for path in glob.glob(os.path.join(glob.escape(folder), "*.pth.*.tmp")):
            os.remove(path)
