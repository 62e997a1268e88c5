"""Ranks compare what they run before the first step: machines with other settings, data, bases or code would
train something else together.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import socket
from pathlib import Path

import torch.distributed as dist

from rwkv_miss.errors import UserError

from ..config import FIELDS, Config

# paths, whose contents are compared, and what each machine may have in its own way
OF_A_MACHINE = {
    "load_model",
    "data_file",
    "eval_file",
    "proj_dir",
    "tokenizer",
    "template",
    "data_cache",
    "resume",
    "wkv",
    "wandb",
}


def agree(config: Config, inputs: dict[str, str | None], first_step: int) -> None:
    """A UserError on all ranks that names the first rank and field that are not those of rank 0. Needs the
    process group, if there is one.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    facts = {f"--{name}": getattr(config, name) for name in FIELDS if name not in OF_A_MACHINE}
    facts |= {"the code of this project": code_digest(), "the step to go on from": first_step}
    facts |= {f"the {name}": value for name, value in inputs.items()}
    facts |= {f"the package {name}": importlib.metadata.version(name) for name in ("torch", "lightning")}
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (socket.gethostname(), facts))
    first_host, first = everyone[0]
    for rank, (host, theirs) in enumerate(everyone):
        for name in first | theirs:
            ours, other = first.get(name), theirs.get(name)
            if ours != other:
                # what was chosen for a machine, such as --micro_bsz for its memory, ends with a flag
                advice = (
                    f"give {name} on every machine"
                    if name.startswith("--")
                    else "make them the same on every machine"
                )
                raise UserError(
                    f"rank {rank} ({host}) does not run what rank 0 ({first_host}) runs: {name} is {other},"
                    f" on rank 0 it is {ours}; {advice}"
                )


def code_digest() -> str:
    """Hash of the sources that a step is computed by."""
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for path in sorted(path for folder in ("src", "rwkv_miss") for path in (root / folder).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
