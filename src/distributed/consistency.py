"""Comparison of the ranks' settings, data, base and code before the first step.

Machines that differ in them would train together, but not what was asked for.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import socket
from pathlib import Path

import torch.distributed as dist

from rwkv_miss.errors import UserError

from ..config import FIELDS, Config

# settings that may differ between machines; for paths among them the contents are compared
OF_A_MACHINE = """
    load_model reference data_file eval_file reward_file proj_dir tokenizer template data_cache resume wkv
    wandb
""".split()


def agree(config: Config, inputs: dict[str, str | None], first_step: int) -> None:
    """Raise UserError on all ranks that names the first rank and field that differ from rank 0.

    Several processes need their process group before.
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
    for rank, (host, of_rank) in enumerate(everyone):
        for name in first | of_rank:
            expected, seen = first.get(name), of_rank.get(name)
            if seen != expected:
                advice = "make them the same on every machine"
                # a machine may have chosen the value itself, such as --micro_bsz for its memory
                if name.startswith("--"):
                    advice = f"give {name} on every machine"
                raise UserError(
                    f"rank {rank} ({host}) does not run what rank 0 ({first_host}) runs: {name} is {seen},"
                    f" on rank 0 it is {expected}; {advice}"
                )


def code_digest() -> str:
    """Hash the sources of a training step."""
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for path in sorted([*(root / "src").rglob("*.py"), *(root / "rwkv_miss").rglob("*.py")]):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
