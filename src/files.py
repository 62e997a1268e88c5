"""Small files of a run, and which process writes them."""

from __future__ import annotations

import contextlib
import os

from rwkv_miss.errors import UserError

# what the launchers set: torchrun and Lightning's own, then SLURM
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID")


def is_first_process() -> bool:
    """Whether this process prints and writes for the whole run."""
    return all(int(os.environ.get(name, 0)) == 0 for name in RANK_VARIABLES)


def write_text(path: str, text: str) -> None:
    """write_bytes() of UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: str, content: bytes) -> None:
    """Write a file under a temporary name, then rename it; a full or read-only disk is a UserError."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise UserError(f"{path} could not be written ({error.strerror}); what was there before is unchanged") from None
