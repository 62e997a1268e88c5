"""Run folder: its files, whether it can be written, and its lock for one run at a time."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator

from rwkv_miss.errors import UserError
from rwkv_miss.files.checkpoint import read_metadata

from ..common.bounded_files import NUMBER, read_object
from ..common.files import write_text
from ..common.first_process import is_first_process
from ..distributed.watchdog import Watchdog

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ADAPTER = "adapter.pth"
MODEL = "model.pth"  # the file of full training
METRICS = "metrics.jsonl"
CONFIG = "config.yaml"
ROWS = "rows.jsonl"  # rows that were given to prepare()
SUMMARY = "run.json"
RUNNING = "running.json"  # there while a run writes into the folder, and after one that was killed
RUNNING_KINDS = {"pid": int, "started": NUMBER, "steps": int, "plan": list}
MERGED = "merged.pth"  # the file that the suggested merge writes
NEW_MODEL = "rwkv-init.pth"  # RWKV-LM's name
CHECKPOINTS = "checkpoints"
CHECKPOINT = f"step-{'[0-9]' * 8}.pth"  # the pattern of checkpoint_name()


def require_folder(folder: str) -> None:
    """Raise UserError unless files can be made in the folder, which need not be there yet.

    Call it before work that would be lost.
    """
    there = existing_part(folder)
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise UserError(
            f"--proj_dir {folder}: no file can be made in {there} ({error.strerror}); choose another one"
        ) from None


def existing_part(folder: str) -> str:
    """Return the folder, or its nearest parent that exists: where it will be made."""
    folder = os.path.abspath(folder)
    return folder if os.path.exists(folder) else existing_part(os.path.dirname(folder))


@contextlib.contextmanager
def folder_of_run(folder: str, others: Watchdog | None) -> Iterator[None]:
    """Use the run's folder in a process of the run, inside the block.

    The first process locks the folder. The others, which only read, look into it after that. `others` is the
    connection to them if the first one does not start them.
    """
    if is_first_process():
        with alone_in(folder):
            if others:
                others.tell_folder_is_held()
            yield
        return
    if others:
        others.wait_for_folder()
    yield


@contextlib.contextmanager
def alone_in(folder: str) -> Iterator[None]:
    """Lock the folder for one run. Raises UserError for a second one.

    The folder is made, and removed if it is empty at the end. The system releases the lock when the process
    dies. Windows and some network file systems have no such lock; there nothing is locked. running.json tells
    others which process it is.
    """
    require_folder(folder)
    there = existing_part(folder)
    place = _hold(folder)
    try:
        say_running(folder)
        yield
    finally:
        with contextlib.suppress(OSError):
            os.remove(os.path.join(folder, RUNNING))
        _remove_empty(folder, there)  # while it is locked: nobody else is about to use it
        if place is not None:
            os.close(place)


def _hold(folder: str) -> int | None:
    """Make the folder and lock it; returns the file descriptor of the lock, None if there are no locks."""
    if fcntl is None:
        os.makedirs(folder, exist_ok=True)
        return None
    while True:
        os.makedirs(folder, exist_ok=True)
        try:
            place = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # the run that made it has just removed it
            continue
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(place)
            raise UserError(
                f"another run is writing into {folder} now; wait for its end, or choose another --proj_dir"
            ) from None
        except OSError:
            pass
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(place), os.stat(folder)):
                return place
        os.close(place)  # the lock of a folder that was removed


def say_running(folder: str, **more: object) -> None:
    """Write running.json for the run of this process, with `more` that is known of it by now."""
    said = {"pid": os.getpid(), "started": time.time(), **more}
    write_text(os.path.join(folder, RUNNING), json.dumps(said))


def running(folder: str) -> dict | None:
    """Return what running.json says of the run that holds the folder's lock; None where none does."""
    if fcntl is None:
        return None
    try:
        said = read_object(os.path.join(folder, RUNNING), RUNNING_KINDS)
        with contextlib.suppress(PermissionError):  # a process of another user
            os.kill(said["pid"], 0)  # leave a dead run's lock alone: a new run may be about to take it
        place = os.open(folder, os.O_RDONLY)
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
    try:
        fcntl.flock(place, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except OSError:
        return said
    finally:
        os.close(place)


def _remove_empty(folder: str, there: str) -> None:
    """Remove the folder and those above it up to `there`, as far as they are empty."""
    folder = os.path.abspath(folder)
    with contextlib.suppress(OSError):
        while folder != there:
            os.rmdir(folder)
            folder = os.path.dirname(folder)


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}.pth"


def checkpoint_step(path: str) -> int:
    return int(os.path.basename(path)[len("step-") : -len(".pth")])


def list_checkpoints(folder: str) -> list[str]:
    """List the paths of the checkpoints in a folder, oldest first.

    Each is whole, because a file gets its name when it is complete.
    """
    return sorted(glob.glob(os.path.join(glob.escape(folder), CHECKPOINT)))


def remove_old(folder: str, keep: int) -> None:
    """Remove all checkpoints but the newest `keep`."""
    for path in list_checkpoints(folder)[:-keep]:
        os.remove(path)


def remove_leftovers(*paths: str) -> None:
    """Remove a killed process's leftovers of one of these files, or of a checkpoint in one of these folders.

    A leftover has a temporary name of rwkv_miss.files.output.whole_file(). Other files in the folder stay.
    """
    for path in paths:
        written = os.path.join(glob.escape(path), CHECKPOINT) if os.path.isdir(path) else glob.escape(path)
        for leftover in glob.glob(f"{written}.{'[0-9a-f]' * 8}.tmp"):
            os.remove(leftover)


def keep_adapter(path: str, step: int) -> None:
    """Keep adapter.pth at `path`, as it is now, under the name of its step: adapter-step-120.pth."""
    _link(path, os.path.join(os.path.dirname(path), adapter_of_step(step)))


def adapter_of_step(step: int | str) -> str:
    return f"adapter-step-{step}.pth"


def keep_best(path: str, folder: str) -> None:
    """Keep best.pth at `path`, as it is now, in the folder of checkpoints too.

    A run that resumes from this checkpoint may never reach the step of the next best.pth.
    """
    kept = os.path.join(folder, os.path.basename(path))
    if os.path.exists(path) and _evaluation(path) != _evaluation(kept):
        _link(path, kept)


def restore_best(path: str, folder: str, wanted: dict | None) -> str:
    """Restore best.pth at `path` to the state of the evaluation `wanted`.

    That is the best one up to the step that a run resumes from. If there is none, or its state is lost,
    best.pth is removed. Returns a note for the user, "" for nothing.
    """
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
    why = "no state so far is better than the model before the training"
    if best:
        why = f"step {step} is not reached yet; the best one so far, of step {best[0]}, is lost"
    return f"{path}, of step {step}, is removed: {why}"


def _evaluation(path: str) -> tuple | None:
    """Return (step, loss) of the evaluation whose state a file holds; None without a file."""
    if not os.path.exists(path):
        return None
    metadata = read_metadata(path) or {}
    return metadata.get("step"), metadata.get("validation_loss")


def _link(path: str, other: str) -> None:
    """Make `other` another name of the file at `path`, or a copy if there are no hard links."""
    temporary = f"{other}.tmp"  # the next run takes over a killed run's
    with contextlib.suppress(FileNotFoundError):
        os.remove(temporary)
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copyfile(path, temporary)
    os.replace(temporary, other)


def output_path(proj_dir: str, peft: str) -> str:
    return os.path.join(proj_dir, MODEL if peft == "none" else ADAPTER)
