"""The checkpoints of a run as files: their names, which is newest, which are removed."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil

from rwkv_miss.files.checkpoint import read_metadata

CHECKPOINT = f"step-{'[0-9]' * 8}.pth"  # the pattern of checkpoint_name()


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}.pth"


def checkpoint_step(path: str) -> int:
    return int(os.path.basename(path)[len("step-") : -len(".pth")])


def list_checkpoints(folder: str) -> list[str]:
    """Paths of the checkpoints in a folder, oldest first. Each is whole: a file gets its name when it is
    complete.
    """
    return sorted(glob.glob(os.path.join(glob.escape(folder), CHECKPOINT)))


def remove_old(folder: str, keep: int) -> None:
    """Remove all checkpoints but the newest `keep`."""
    for path in list_checkpoints(folder)[:-keep]:
        os.remove(path)


def remove_leftovers(*paths: str) -> None:
    """Remove what a killed process was writing as one of these files, or as a checkpoint in one of these
    folders, under the temporary names of rwkv_miss.files.output.whole_file. Others may write beside them."""
    for path in paths:
        written = os.path.join(glob.escape(path), CHECKPOINT) if os.path.isdir(path) else glob.escape(path)
        for leftover in glob.glob(f"{written}.{'[0-9a-f]' * 8}.tmp"):
            os.remove(leftover)


def keep_best(path: str, folder: str) -> None:
    """Keep best.pth at `path` with the newest checkpoint in a folder, as it is now and by its own name: the
    next best.pth may be of a step that a run which goes on from here does not come to."""
    kept = os.path.join(folder, os.path.basename(path))
    if os.path.exists(path) and _evaluation(path) != _evaluation(kept):
        _link(path, kept)


def restore_best(path: str, folder: str, wanted: dict | None) -> str:
    """Have best.pth at `path` be the state of the evaluation `wanted`, the best one up to the step that a run
    goes on from, or be absent where there is none or it is lost. Returns what the user should know, "" for
    nothing."""
    found = _evaluation(path)
    best = (wanted["step"], wanted["loss"]) if wanted else None
    if found in (None, best):
        return ""
    step, _ = found
    kept = os.path.join(folder, os.path.basename(path))
    if best and _evaluation(kept) == best:
        _link(kept, path)
        return f"{path}, of step {step}, is that of step {best[0]} again: step {step} is not reached yet"
    os.remove(path)
    lost = f"; the best one so far, of step {best[0]}, is lost" if best else ""
    return f"{path}, of step {step}, is removed: step {step} is not reached yet{lost}"


def _evaluation(path: str) -> tuple | None:
    """(step, loss) of the evaluation whose state a file holds; None where there is no file."""
    if not os.path.exists(path):
        return None
    metadata = read_metadata(path) or {}
    return metadata.get("step"), metadata.get("validation_loss")


def _link(path: str, other: str) -> None:
    """Make `other` another name of the file at `path`, or a copy where there are no hard links."""
    temporary = f"{other}.tmp"  # what a killed run leaves, the next one takes over
    with contextlib.suppress(FileNotFoundError):
        os.remove(temporary)
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copyfile(path, temporary)
    os.replace(temporary, other)
