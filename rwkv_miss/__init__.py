"""MiSS and other adapters for RWKV checkpoints: inject, train, save, merge.

Needs torch and the standard library only.
"""

# ruff: noqa: E402  (torch is imported after the first call)

from collections.abc import Callable

from .interrupts import end_program_at_once

end_program_at_once()

from .errors import UserError, naming_missing_torch

with naming_missing_torch():
    from . import methods  # noqa: F401  (registers the methods)
    from .adapter import METHODS, AdapterLinear, register
    from .around_steps import after_step, before_step, penalty
    from .disabled import disabled
    from .files.checkpoint import Arch, read_checkpoint, read_metadata, write_checkpoint
    from .inject import inject
    from .merging.in_memory import merge, unload, unmerge
    from .optimizer import parameter_groups
    from .save_and_load import load_adapter, save_adapter

__all__ = [
    "METHODS",
    "AdapterLinear",
    "Arch",
    "UserError",
    "after_step",
    "before_step",
    "disabled",
    "inject",
    "load_adapter",
    "merge",
    "merge_file",
    "parameter_groups",
    "penalty",
    "read_checkpoint",
    "read_metadata",
    "register",
    "save_adapter",
    "unload",
    "unmerge",
    "write_checkpoint",
]


def __getattr__(name: str) -> Callable[..., None]:
    """Import merge_file when it is asked for: the formats of all projects come with it, and no training has
    one."""
    if name != "merge_file":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .merging.merge import merge_file

    return merge_file
